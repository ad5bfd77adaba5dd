"""What a transform did: the record that a transformed module carries as ``module.kgraph``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from kgraph.analysis import Ledger
from kgraph.certificate import Certificate, certify
from kgraph.emitted import Bound, EmittedModule
from kgraph.errors import InputError
from kgraph.promised import Promise
from kgraph.report import Comparison, Report
from kgraph.systems import AnyMethod
from kgraph.targets import ShapingTargets
from kgraph.weight_laws import Law

STALE = (
    "a state dict was loaded after the transform: the report describes the module as it was emitted; "
    "kgraph.analyze(module) describes it as it is"
)


class LoadWatch:
    """A post hook of ``load_state_dict`` that remembers that it was called."""

    def __init__(self) -> None:
        self.loaded = False

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        self.loaded = True

    def over(self, emitted: EmittedModule) -> LoadWatch:
        """Watch a module and the modules that it calls: copies and pickles of it keep the hooks of the latter only."""
        called = {str(node.target) for node in emitted.graph.nodes if node.op == "call_module"}
        for module in (emitted, *(emitted.get_submodule(path) for path in sorted(called))):
            module.register_load_state_dict_post_hook(self)
        return self


@dataclass(frozen=True)
class TransformRecord(Bound):
    """What a transform did; `shaped.kgraph`.

    Attributes:
        method: the options used; a tuple of them where several methods were combined.
        shortcut_weight: weight of shortcuts, as given or chosen; None where the method leaves them.
        targets: local targets of DKS or TAT, None where none could be solved.
        ledger: every change, what was kept and why, what is unmet.
        before, emitted: reports of the model as given and as emitted, both in the mode it was given in: that of a
            later ``kgraph.analyze(shaped)``. The ledger's promises are about eval mode.
        evaluated: report of the module as emitted in eval mode.
        promise: what the method promises at every nonlinear layer's input and at the output.
        laws: how the parameters that the method set are drawn again.
        watch: whether a state dict was loaded since.
        module: the module that carries the record, where the record was read off it.
    """

    method: AnyMethod | tuple[AnyMethod, ...]
    shortcut_weight: float | None
    targets: ShapingTargets | None
    ledger: Ledger
    before: Report
    emitted: Report
    evaluated: Report
    promise: Promise
    laws: dict[str, Law] = field(repr=False)
    watch: LoadWatch = field(default_factory=LoadWatch, compare=False, repr=False)
    module: EmittedModule | None = field(default=None, compare=False, repr=False)

    def _of(self, module: EmittedModule) -> TransformRecord:
        """The same record, knowing its module."""
        return replace(self, module=module)

    def __getstate__(self) -> dict[str, Any]:
        """The module stays where it is: a copied or saved record knows none."""
        return {**vars(self), "module": None}

    def certificate(
        self,
        n: int = 4,
        inputs: object = None,
        *,
        seed: int = 0,
        pairs: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Certificate:
        """Measure the module itself in eval mode and hold it against prediction and promise.

        The weights are drawn anew in a copy: module and random generators stay as they are. Parameters that the
        method drew come from their law again, whatever they hold now (after training the certificate is still that
        of the initialization); others are permuted with random signs; constants are the module's own.

            q = mean u^2,  C = cosine of two inputs' u,  C'(1) by two inputs 0.002 apart;  +- over draws

        Args:
            n: draws of the weights, at least 2.
            inputs: a batch as the model will see it, whose pairs are taken; None: white noise of q = 1.
            seed: of weights and inputs.
            pairs: of inputs, for every draw; None: 256 of vectors, 8 of large images.
            progress: called with (done, n).

        Raises:
            InputError: the record was not read off its module, or the module does not run on a batch of any size.
        """
        if self.module is None:
            raise InputError("the record knows no module", hint="Read it off one: shaped.kgraph.certificate()")
        title, report = self.ledger.method, self.evaluated.analysis
        options = {"n": n, "inputs": inputs, "seed": seed, "pairs": pairs, "progress": progress}
        return certify(self.module, self.promise, self.laws, report, title, **options)  # type: ignore[arg-type]

    @property
    def stale(self) -> str:
        """Why the report no longer describes the module, or ""."""
        return STALE if self.watch.loaded else ""

    @property
    def after(self) -> Report:
        """The module as it was emitted; with a note where a state dict was loaded since."""
        if not self.stale:
            return self.emitted
        analysis = self.emitted.analysis
        return Report(replace(analysis, notes=(self.stale, *analysis.notes)))

    @property
    def comparison(self) -> Comparison:
        """Before and after side by side."""
        notes = (self.stale, *self.ledger.notes) if self.stale else self.ledger.notes
        return Comparison(self.before, self.after, replace(self.ledger, notes=notes))
