"""Example inputs: normalize what the caller gave, or infer them from what the model says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kgraph.checks import dense_inputs
from kgraph.errors import InputError


class Inputs(NamedTuple):
    """Positional and keyword arguments of ``model.forward``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def resolve_inputs(model: nn.Module, example_inputs: object = None) -> Inputs:
    """Return ``(args, kwargs)`` for ``model``, with a batch of at least two.

    ``example_inputs`` may be a tensor, a tuple or list of positional arguments, a mapping of keyword
    arguments, or None (inferred). A batch of one is doubled: a size of one cannot be told from a constant.

    Raises:
        InputError: nothing was given and the model does not say what it takes.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    args, kwargs = _as_arguments(example_inputs) if example_inputs is not None else infer_inputs(model)
    if not any(isinstance(value, Tensor) for value in pytree.tree_leaves((args, kwargs))):
        raise InputError(
            f"the example inputs hold no tensor (got {type(example_inputs).__name__})",
            hint="Pass a tensor, a tuple of positional arguments or a dict of keyword arguments",
        )
    dense_inputs((args, kwargs))
    return _with_batch(Inputs(args, kwargs))


def _as_arguments(example_inputs: object) -> Inputs:
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, Mapping):
        return Inputs((), {str(key): value for key, value in example_inputs.items()})
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return Inputs(tuple(example_inputs), {})
    raise InputError(
        f"example_inputs is a {type(example_inputs).__name__}",
        hint="Pass a tensor, a tuple of positional arguments or a dict of keyword arguments",
    )


def batch_size(inputs: Inputs) -> int:
    """Size of dimension 0 of the first tensor that has one."""
    for value in pytree.tree_leaves(tuple(inputs)):
        if isinstance(value, Tensor) and value.ndim > 0:
            return int(value.shape[0])
    return 1


def _with_batch(inputs: Inputs) -> Inputs:
    if batch_size(inputs) == 0:
        raise InputError("the example inputs have no rows: the first dimension is 0", hint="Pass at least one")
    if batch_size(inputs) != 1:
        return inputs

    def double(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 1
        return torch.cat([value, value]) if batched else value

    return Inputs(*pytree.tree_map(double, tuple(inputs)))


def infer_inputs(model: nn.Module) -> Inputs:
    """Infer inputs from timm's ``default_cfg``, transformers' ``dummy_inputs``, or the first layer.

    Raises:
        InputError: none of the three is there; the message says what to pass.
    """
    for source in (_from_record, _from_timm, _from_transformers, _from_first_layer):
        found = source(model)
        if found is not None:
            return found
    raise InputError(
        f"the inputs of {type(model).__name__} cannot be inferred from its first layer",
        hint="Pass example_inputs, for instance torch.randn(2, 3, 224, 224)",
    )


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _normal(model: nn.Module, *shape: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, *shape, generator=generator)
    return Inputs((sample.to(_device(model), _dtype(model)),), {})


RECORD = "kgraph_inputs"
"""Key under which an emitted module's ``meta`` keeps the layout of the inputs it was captured with."""


def record_of(inputs: Inputs) -> Inputs:
    """The inputs with float tensors reduced to their shape and dtype (meta tensors)."""

    def reduce(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().to("meta") if floating else value

    return Inputs(*pytree.tree_map(reduce, tuple(inputs)))


def _from_record(model: nn.Module) -> Inputs | None:
    record = model.meta.get(RECORD) if isinstance(model, fx.GraphModule) else None
    if record is None:
        return None
    generator = torch.Generator().manual_seed(0)

    def draw(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_meta:
            return value.to(_device(model))
        return torch.randn(value.shape, generator=generator).to(_device(model), value.dtype)

    return Inputs(*pytree.tree_map(draw, tuple(record)))


def _from_timm(model: nn.Module) -> Inputs | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if size is None:
        return None
    patch = getattr(model, "patch_embed", None)
    image = getattr(patch, "img_size", None)  # a model built for another size says so in its patch embedding
    return _normal(model, size[0], *(image or size[1:]))


def _from_transformers(model: nn.Module) -> Inputs | None:
    config = getattr(model, "config", None)
    dummy = getattr(model, "dummy_inputs", None)
    if config is None or not isinstance(dummy, Mapping):
        return None
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None or "input_ids" not in dummy:
        return Inputs((), dict(dummy))
    length = min(16, int(getattr(config, "max_position_embeddings", 16) or 16))
    ids = torch.randint(0, int(vocabulary), (2, length), generator=generator)
    return Inputs((), {"input_ids": ids.to(_device(model))})


def _from_first_layer(model: nn.Module) -> Inputs | None:
    spatial = {nn.Conv1d: (64,), nn.Conv2d: (64, 64), nn.Conv3d: (16, 16, 16)}
    small = {nn.ConvTranspose1d: (1,), nn.ConvTranspose2d: (1, 1), nn.ConvTranspose3d: (1, 1, 1)}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            return _normal(model, module.in_features)
        if isinstance(module, nn.Embedding):
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, module.num_embeddings, (2, 16), generator=generator)
            return Inputs((ids.to(_device(model)),), {})
        for kind, size in (*spatial.items(), *small.items()):
            if isinstance(module, kind):
                return _normal(model, module.in_channels, *size)  # pyright: ignore
    return None
