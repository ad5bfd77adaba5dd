"""The certificate of an emitted module: what passes, what fails and where, and what it leaves alone."""

from __future__ import annotations

import copy
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformed import record

import kgraph
from kgraph import Certificate, InputError, ModelError
from kgraph.certificate import measure
from kgraph.certificate.redraw import Redraw
from kgraph.emitted import EmittedModule
from kgraph.modules import ShapedActivation

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # PyTorch, about its own pytree


def chain(depth: int, width: int, activation: type[nn.Module] = nn.ReLU, out: int = 24) -> nn.Module:
    return nn.Sequential(
        *[m for _ in range(depth) for m in (nn.Linear(width, width), activation())], nn.Linear(width, out)
    )


def he(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model


def transformed(model: nn.Module, method: Any, *shape: int) -> EmittedModule:
    return kgraph.transform(model, method, torch.randn(2, *shape))


def numbers(certificate: Certificate) -> str:
    return certificate.to_json()


def test_thirty_layers_pass_what_dks_promises() -> None:
    certificate = record(transformed(he(chain(30, 128)), "dks", 128)).certificate()
    assert certificate.passed and "passed" in certificate.words[2]
    final = certificate.final
    assert final.promised_slope == pytest.approx(1.5, rel=1e-6) and final.promised_c[0] == pytest.approx(0, abs=1e-9)
    assert abs(final.slope.value - 1.5) < 0.15 and abs(final.c[0].value) < 0.1 and not final.departures
    assert [row.node for row in certificate.rows] == ["linear", *(f"linear_{i}" for i in range(1, 31))]


@pytest.mark.parametrize("name", ["output_scale", "input_scale", "output_shift"])
def test_a_changed_constant_fails_where_it_is(name: str) -> None:
    shaped = transformed(chain(6, 96, nn.Softplus), "dks", 96)
    assert record(shaped).certificate().passed
    activation = shaped.get_submodule("5")
    assert isinstance(activation, ShapedActivation)
    setattr(activation, name, getattr(activation, name) * 1.3)
    certificate = record(shaped).certificate()
    assert certificate.passed is False and certificate.departing[0].node == "linear_3"
    assert "failed" in certificate.words[2] and "first departs at linear_3 (input of" in certificate.words[2]


class Product(nn.Module):
    """Two branches multiplied: slope 2 by itself, which no constant repairs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.one(x)) * torch.tanh(self.two(x)))


def test_a_target_that_the_plan_itself_misses_is_no_promise_kept() -> None:
    shaped = transformed(Product(), "dks", 64)
    certificate = record(shaped).certificate()
    assert record(shaped).ledger.unmet and certificate.final.promised_slope == 1.5
    assert "not met by its own plan, which has 3" in certificate.words[0]
    assert certificate.passed is False and "slope" in certificate.final.departures


def test_weights_and_generators_stay_as_they_are() -> None:
    shaped = transformed(chain(3, 32), "tat", 32)
    shaped.train()
    before = {name: value.clone() for name, value in shaped.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # pyright: ignore
    record(shaped).certificate(2)
    assert all(torch.equal(value, before[name]) for name, value in shaped.state_dict().items())
    assert shaped.training and torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and np.random.get_state()[1].tolist() == states[2]  # pyright: ignore


def test_trained_weights_are_drawn_anew() -> None:
    shaped = transformed(chain(3, 32), "tat", 32)
    first = record(shaped).certificate(3)
    with torch.no_grad():
        for parameter in shaped.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert numbers(record(shaped).certificate(3)) == numbers(first)
    assert numbers(record(shaped).certificate(3, seed=1)) != numbers(first)


def copies(shaped: EmittedModule) -> dict[str, EmittedModule]:
    file = io.BytesIO()
    torch.save(shaped, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    return {"copy": copy.deepcopy(shaped), "file": loaded, "copy of it": copy.deepcopy(loaded)}


class Named(nn.Module):
    """Module calls between functions: code that is read again numbers them anew."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.one(x))
        return self.three(torch.tanh(torch.cat([y[:, :8], torch.nn.functional.linear(y, self.two.weight)[:, 8:]], 1)))


@pytest.mark.parametrize("build", [lambda: chain(3, 16), Named], ids=["chain", "functions"])
def test_copies_carry_it(build: Any) -> None:
    shaped = transformed(build(), "dks", 16)
    first = numbers(record(shaped).certificate(2))
    for one in copies(shaped).values():
        assert numbers(record(one).certificate(2)) == first


class Tied(nn.Module):
    """One weight in four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.head(x)


def test_a_record_alone_leaves_the_module_behind() -> None:
    shaped = transformed(chain(2, 8), "dks", 8)
    alone = copy.deepcopy(record(shaped))
    assert alone.module is None and record(shaped).module is shaped and alone == record(shaped)


def test_half_precision_is_measured_in_single() -> None:
    shaped = transformed(chain(3, 32), "dks", 32)
    first, half = record(shaped).certificate(3), record(copy.deepcopy(shaped).to(torch.bfloat16)).certificate(3)
    assert half.final.slope.value == pytest.approx(first.final.slope.value, rel=1e-2)


def test_tied_weights_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shaped = transformed(Tied(), "dks", 64)
    assert len([name for name in record(shaped).laws if name.endswith("weight")]) == 1
    assert not shaped.get_parameter("head.bias").any() and not shaped.get_parameter("layer.bias").any()
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(Redraw):
        def __call__(self, generator: torch.Generator) -> None:
            super().__call__(generator)
            seen.append(
                (self.module.get_parameter("layer.weight").clone(), self.module.get_parameter("head.weight").clone())
            )

    monkeypatch.setattr(measure, "Redraw", Watched)
    record(shaped).certificate(2)
    assert len(seen) == 2 and all(torch.equal(*pair) for pair in seen) and not torch.equal(seen[0][0], seen[1][0])
    assert torch.allclose(seen[0][0] @ seen[0][0].T, torch.eye(64), atol=1e-5)


def test_pairs_of_the_given_examples() -> None:
    """C of two examples as they come; the first layer keeps their cosine, and the prediction is that of the batch."""
    shaped = transformed(chain(4, 128, nn.Tanh), "dks", 128)
    x = torch.randn(40, 128) + 0.7
    x = x / x.square().mean().sqrt()
    certificate = record(shaped).certificate(inputs=x)
    unit = x / x.norm(dim=1, keepdim=True)
    cosine = float(((unit @ unit.T).sum() - 40) / (40 * 39))
    first = certificate["linear"]
    assert certificate.cosines[0] == pytest.approx(cosine, abs=0.02) and certificate.inputs == "the given inputs"
    assert first.c[0].value == pytest.approx(certificate.cosines[0], abs=1e-3)
    assert first.slope.value == pytest.approx(1, rel=1e-3)
    assert all(abs(row.c[0].value - row.predicted_c[0]) < 0.05 for row in certificate.rows)
    assert certificate.final.promised_c[0] < certificate.cosines[0] and certificate.passed


def test_inputs_of_another_size_are_told() -> None:
    shaped = transformed(chain(3, 64), "dks", 64)
    certificate = record(shaped).certificate(inputs=2 * torch.randn(16, 64))
    assert certificate.passed is False and "q" in certificate["linear"].departures
    assert any("q = 4" in note and "promise is about q = 1" in note for note in certificate.notes)


def test_a_method_without_a_promise_passes_nothing() -> None:
    shaped = transformed(chain(4, 32, nn.Tanh), "edge-of-chaos", 32)
    certificate = record(shaped).certificate()
    assert certificate.passed is None and "promises nothing" in certificate.words[0]
    assert all(math.isnan(row.promised_q) and not row.departures for row in certificate.rows)
    for row in certificate.rows[:-1]:
        assert abs(row.q.value / row.predicted_q - 1) < 0.2, row
    assert any("no law is recorded" in note for note in certificate.notes)


class Text(nn.Module):
    def __init__(self, vocabulary: int = 50, width: int = 64) -> None:
        super().__init__()
        self.table, self.inner, self.head = (
            nn.Embedding(vocabulary, width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(tokens))))


def test_tokens_are_pairs_of_embeddings() -> None:
    shaped = kgraph.transform(Text(), "dks", torch.randint(0, 50, (2, 7)))
    certificate = record(shaped).certificate(6)
    assert certificate.inputs == "tokens"
    first = certificate["linear"]
    for cosine, figure in zip((0.0, 0.5, 0.9), first.c, strict=True):
        assert abs(figure.value - cosine) < 0.05
    assert (
        abs(first.slope.value - 1) < 0.05
        and abs(certificate.final.slope.value / certificate.final.predicted_slope - 1) < 0.1
    )


def test_narrow_networks_are_told() -> None:
    narrow = record(transformed(chain(20, 12, nn.ReLU), "tat", 12)).certificate(8)
    assert narrow.narrow and "at width 12 one draw's q differs from the mean by" in narrow.warning
    assert narrow.warning.split(":")[0] in str(narrow)
    wide = record(transformed(chain(2, 256, nn.Tanh), "dks", 256)).certificate()
    assert not wide.narrow and wide.warning == ""


def test_a_coarse_measurement_is_told() -> None:
    """Two draws of a narrow network decide nothing, and the certificate says so."""
    certificate = record(transformed(chain(10, 12, nn.ReLU), "tat", 12)).certificate(2, pairs=4)
    assert certificate.passed is False or "leave more room than the tolerance" in certificate.words[2]


def test_views() -> None:
    shaped = transformed(chain(40, 16), "tat", 16)
    certificate = record(shaped).certificate(2, pairs=4)
    text = str(certificate)
    assert max(map(len, text.splitlines())) <= 100 and "rows hidden" in text
    assert [" ".join(text.split()).count(" ".join(line.split())) for line in certificate.words] == [1, 1, 1]
    assert len(certificate.text(all_nodes=True).splitlines()) > 41 and "<pre" in certificate._repr_html_()
    found = json.loads(certificate.to_json())
    assert found["format"] == "kgraph-certificate/1" and found["words"] == list(certificate.words)
    assert len(found["rows"]) == 41 and found["rows"][3]["q"]["value"] == certificate.rows[3].q.value
    page = record(shaped).comparison.to_html(certificate=certificate)
    assert "Certificate: <span" in page and "Certificate: <span" not in record(shaped).comparison.to_html()
    assert "Certificate: <span" in record(shaped).after.to_html(certificate=certificate)


def test_in_an_onnx_file(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    shaped = transformed(chain(2, 8), "dks", 8)
    certificate = record(shaped).certificate(2, pairs=2)
    for name, given in (("with", certificate), ("without", None)):
        file = tmp_path / f"{name}.onnx"
        kgraph.export_onnx(shaped, file, torch.randn(2, 8), certificate=given)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        held = json.loads(session.get_modelmeta().custom_metadata_map["kgraph"])
        assert held.get("certificate") == (None if given is None else json.loads(given.to_json()))


def test_progress_and_refusals() -> None:
    shaped = transformed(chain(2, 8), "dks", 8)
    seen: list[tuple[int, int]] = []
    record(shaped).certificate(3, progress=lambda *done: seen.append(done))  # pyright: ignore[reportArgumentType]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(InputError, match="at least 2"):
        record(shaped).certificate(1)
    with pytest.raises(InputError, match="multiples of one another"):
        record(shaped).certificate(inputs=torch.randn(1, 8))
    with pytest.raises(InputError, match="multiples of one another"):
        record(shaped).certificate(inputs=torch.ones(3, 8))
    with pytest.raises(InputError, match="no node is called 'nonsense'"):
        record(shaped).certificate(2)["nonsense"]
    with pytest.raises(InputError, match="knows no module"):
        shaped.meta["kgraph"].certificate()
    with pytest.raises(ModelError, match="meta device"):
        record(copy.deepcopy(shaped).to("meta")).certificate()


@pytest.mark.parametrize(("factor", "q"), [(2.0, 4.0), (0.1, 0.01)])
def test_what_stands_behind_the_last_layer_is_not_promised(factor: float, q: float) -> None:
    """y + y has q = 4: neither "q = 1 at the output" nor silence, and not the network's fault."""

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            y = self.layers(x)
            return y + y if factor == 2 else y * factor

    shaped = kgraph.transform(Behind(), "dks", torch.randn(2, 64))
    found = shaped.kgraph.certificate(n=4)
    assert "q = 1 up to what stands behind the last layer" in str(found).replace("\n", " ")
    assert found.passed
    assert any(f"(q = {q:g})" in note and "behind the last layer" in note for note in shaped.kgraph.ledger.notes)
