"""What a transform did: the record that a transformed module carries as ``module.kgraph``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from kgraph.analysis import Ledger
from kgraph.emitted import EmittedModule
from kgraph.report import Comparison, Report
from kgraph.systems import AnyMethod
from kgraph.targets import ShapingTargets

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
class TransformRecord:
    """What a transform did; `shaped.kgraph`.

    Attributes:
        method: the options used; a tuple of them where several methods were combined.
        shortcut_weight: weight of shortcuts, as given or chosen; None where the method leaves them.
        targets: local targets of DKS or TAT, None where none could be solved.
        ledger: every change, what was kept and why, what is unmet.
        before, emitted: reports of the model as given and as emitted, both in the mode it was given in: that of a
            later ``kgraph.analyze(shaped)``. The ledger's promises are about eval mode.
        watch: whether a state dict was loaded since.
    """

    method: AnyMethod | tuple[AnyMethod, ...]
    shortcut_weight: float | None
    targets: ShapingTargets | None
    ledger: Ledger
    before: Report
    emitted: Report
    watch: LoadWatch = field(default_factory=LoadWatch, compare=False, repr=False)

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
