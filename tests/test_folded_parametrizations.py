"""What a transform makes of normalized and parametrized weights is plain: it copies, saves and loads as a whole."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import kgraph

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Halved(nn.Module):
    """A parametrization of a user's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def _own(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def _older(norm: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def apply(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(layer)

    return apply


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm and own": lambda layer: _own(parametrizations.weight_norm(layer)),
    "weight_norm of a bias too": lambda layer: parametrizations.weight_norm(_own(layer), "bias", dim=0),
    "own": _own,
    "older weight_norm": _older(nn.utils.weight_norm),
    "older spectral_norm": _older(nn.utils.spectral_norm),
}


def _through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files(kind: str, inplace: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind](nn.Linear(8, 8)), nn.Tanh(), nn.Sequential(nn.Linear(8, 4)))
    shaped = kgraph.transform(model, "tat", X, inplace=inplace).eval()
    expected = shaped(X)
    for other in (copy.deepcopy(shaped), _through_file(shaped), pickle.loads(pickle.dumps(copy.deepcopy(shaped)))):
        assert torch.equal(other(X), expected)
        assert other.state_dict().keys() == {"0.weight", "0.bias", "2.0.weight", "2.0.bias"}
        with torch.no_grad():
            other.get_parameter("0.weight").zero_()
        other.load_state_dict(shaped.state_dict())
        assert torch.equal(other(X), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_keeps_its_own(kind: str) -> None:
    """Folding a copy leaves the hooks, and with them the old names, to the model."""
    torch.manual_seed(0)
    layer = KINDS[kind](nn.Linear(8, 8))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 4)).eval()
    keys, hooks = list(model.state_dict()), len(layer._load_state_dict_pre_hooks)
    expected = model(X)
    kgraph.transform(model, "tat", X)
    assert list(model.state_dict()) == keys and len(layer._load_state_dict_pre_hooks) == hooks
    assert torch.equal(model(X), expected)


def test_checkpoints_with_the_names_of_the_older_weight_norm_still_load_into_the_model() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 4))
    kgraph.transform(model, "tat", X)
    state = {key.replace("parametrizations.weight.original0", "weight_g"): v for key, v in model.state_dict().items()}
    state = {key.replace("parametrizations.weight.original1", "weight_v"): v for key, v in state.items()}
    model.load_state_dict(state)
