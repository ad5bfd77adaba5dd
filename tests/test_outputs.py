"""What models return beside a tensor: losses, numbers, None, dataclasses, caches; emission returns the same."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture
from kgraph.outputs import closed, opened

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


@dataclass
class Inner:
    code: Tensor
    name: str


@dataclass(frozen=True)
class Outer:
    output: Tensor
    parts: list[Inner]
    nothing: None = None


class Named(NamedTuple):
    output: Tensor
    loss: Tensor


class Cache:
    """No type that PyTorch knows."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Model(nn.Module):
    """Two layers whose output comes in one of many forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.head, self.form = nn.Linear(16, 32), nn.Linear(32, 4), form

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.first(x))
        y = self.head(hidden)
        share = torch.softmax(hidden, -1)
        loss = (share * torch.log(share + 1e-5)).sum(-1).mean()
        forms: dict[str, Any] = {
            "loss": (y, loss),
            "loss first": (loss, y),
            "only a loss": y.square().mean(),
            "numbers": {"y": y, "count": 3, "rate": 0.5, "none": None, "text": "a"},
            "named tuple": Named(y, loss),
            "nested": [{"y": (y, [hidden])}, ()],
            "dataclass": Outer(y, [Inner(hidden, "hidden"), Inner(share, "share")]),
            "cache": {"y": y, "cache": Cache(hidden)},
        }
        return forms[self.form]


FORMS = ("loss", "loss first", "only a loss", "numbers", "named tuple", "nested", "dataclass", "cache")


def same(one: Any, two: Any) -> None:
    """One structure, of the same types, with the same tensors."""
    assert type(one) is type(two)
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            same(a, b)
    elif isinstance(one, (Inner, Outer)):
        same(vars(one), vars(two))
    else:
        assert one == two


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_analysed_and_emitted(form: str) -> None:
    model = Model(form)
    report = kgraph.analyze(model, X)
    assert report.to_dict()["nodes"]
    emitted = capture(model, X).emit().eval()
    expected = model.eval()(X)
    if form == "cache":
        expected["cache"] = None
    for module in (emitted, copy.deepcopy(emitted), pickle.loads(pickle.dumps(emitted))):
        same(module(X), expected)
    made = kgraph.transform(model, "dks", X)
    assert type(made(X)) is type(expected)
    assert "forward" not in vars(model)


def test_the_kernel_does_not_see_the_loss() -> None:
    """q, c and slope of the output are those of the model that returns it alone."""
    model = Model("loss")
    alone = nn.Sequential(model.first, nn.ReLU(), model.head)
    one, two = ({row["name"]: row for row in kgraph.analyze(m, X).to_dict()["nodes"]} for m in (model, alone))
    for key in ("q", "c", "slope"):
        assert one["linear_1"][key] == pytest.approx(two["linear_1"][key], rel=1e-12)


def test_what_is_left_out_is_said() -> None:
    report = kgraph.analyze(Model("cache"), X)
    assert any("holds Cache: no tensor, and left out" in note for note in report.analysis.notes)


def test_no_tensor_at_all_is_refused() -> None:
    class Mute(nn.Module):
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.layer, self.value = nn.Linear(16, 4), value

        def forward(self, x: Tensor) -> Any:
            self.layer(x)
            return self.value

    for value, name in ((None, "NoneType"), (3, "int"), (Cache(X), "Cache")):
        with pytest.raises(kgraph.CaptureError, match=rf"returns no tensor but {name}\. Return tensors"):
            kgraph.analyze(Mute(value), X)


def test_opening_is_undone() -> None:
    output = {"a": Outer(X, [Inner(X, "x")]), "b": (1, None)}
    values, form = opened(output)
    assert values == {"a": {"output": X, "parts": [{"code": X, "name": "x"}], "nothing": None}, "b": (1, None)}
    same(closed(values, form), output)


def tiny(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """transformers' models as their configs build them: with a cache."""
    import transformers as t

    ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    tokens: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size["max_position_embeddings"] = 16
    if name == "gpt2":
        config = t.GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=16, **tokens)
        return t.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}
    if name == "llama":
        config = t.LlamaConfig(intermediate_size=24, num_key_value_heads=2, **size, **tokens)
        return t.LlamaForCausalLM(config), {"input_ids": ids}
    if name == "opt":
        return t.OPTModel(t.OPTConfig(ffn_dim=24, word_embed_proj_dim=16, **size, **tokens)), {"input_ids": ids}
    if name == "bert":
        return t.BertModel(t.BertConfig(intermediate_size=24, **size, vocab_size=50)), {"input_ids": ids}
    config = t.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0)
    return t.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert", "t5"])
def test_language_models_with_their_default_config(name: str) -> None:
    model, inputs = tiny(name)
    asks = model.config.use_cache
    report = kgraph.analyze(model, inputs)
    notes = [note for note in report.analysis.notes if "use_cache=False" in note]
    assert len(notes) == (name != "bert")
    emitted = capture(model, inputs).emit().eval()
    with torch.no_grad():
        expected, found = model.eval()(**inputs), emitted(**inputs)
    assert type(found) is type(expected)
    for key in ("logits", "last_hidden_state", "loss"):
        if key in expected:
            torch.testing.assert_close(found[key], expected[key])
    assert type(kgraph.transform(model, "dks", inputs)(**inputs)) is type(expected)
    assert model.config.use_cache is asks
