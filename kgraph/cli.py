"""The command line: `kgraph analyze | explain | transform | verify | export | demo`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from kgraph.cli_options import (
    HtmlOption,
    Inputs,
    JsonOption,
    Kwargs,
    MethodName,
    MethodOption,
    MethodOptions,
    Model,
    ModeOption,
    OnnxOption,
    OwnMethods,
    Seed,
    Shortcut,
    Trust,
)
from kgraph.errors import FileError
from kgraph.files import destination, folder
from kgraph.terminal import Group, bar, console, errors, spinner

FAILED = 3
"""Exit code of a certificate that fails."""


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A compiler for the initialization-time kernel of neural networks.\n\nMODEL is `timm:NAME`, "
    "`package.module:FACTORY` or `path/to/file.py:FACTORY`, where FACTORY is a model class or a function "
    "that returns a model: the module or file is run. Or MODEL is a file that `kgraph transform --out` wrote.",
    epilog="Example: `kgraph analyze timm:resnet50 --html report.html`",
)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"kgraph {importlib.metadata.version('kgraph')}")
        except importlib.metadata.PackageNotFoundError:
            typer.echo("kgraph (not installed)")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options that stand before the command."""


@app.command(epilog="Example: `kgraph analyze timm:resnet50 --mode train --html report.html`")
def analyze(
    model: Model,
    kwargs: Kwargs = "{}",
    inputs: Inputs = None,
    mode: ModeOption = None,
    seed: Seed = 0,
    trust: Trust = False,
    html: HtmlOption = None,
    json: JsonOption = None,
    all_nodes: Annotated[bool, typer.Option("--all-nodes", help="Also list nodes that only re-index.")] = False,
) -> None:
    """Print what happens to q values and c values at every node of MODEL."""
    import kgraph

    _check_places(html, json)
    module, examples = _load(model, kwargs, inputs, seed, trust)
    with spinner(f"analyzing {model}"):
        report = kgraph.analyze(module, examples, mode=mode)
    if not _is_stdout(json):
        out = console()
        out.print(report if not all_nodes else Text(report.text(all_nodes=True, width=out.width)))
    _write(report, html, json)


@app.command(epilog="Example: `kgraph explain timm:resnet18 --input 2,3,64,64`")
def explain(
    model: Model,
    kwargs: Kwargs = "{}",
    inputs: Inputs = None,
    mode: ModeOption = None,
    seed: Seed = 0,
    trust: Trust = False,
    json: JsonOption = None,
) -> None:
    """Print what each component of MODEL does to its kernel: norms, skips, activations, initializers, pools."""
    import kgraph

    _check_places(json)
    module, examples = _load(model, kwargs, inputs, seed, trust)
    found = kgraph.explain(module, examples, mode=mode, seed=seed)
    if not _is_stdout(json):
        console().print(found)
    _write(found, None, json)


@app.command(epilog="Example: `kgraph transform timm:resnet50 --method tat --shortcut-weight 0.8 --out model.pt`")
def transform(
    model: Model,
    methods: MethodOptions = [MethodName.auto],  # noqa: B006 (typer copies it)
    kwargs: Kwargs = "{}",
    inputs: Inputs = None,
    shortcut_weight: Shortcut = None,
    seed: Seed = 0,
    trust: Trust = False,
    html: HtmlOption = None,
    json: JsonOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Save the model: weights and how to make it, for MODEL and kgraph.load.")
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="--out pickles the whole module (torch.save); reading that runs code.")
    ] = False,
    onnx: OnnxOption = None,
) -> None:
    """Rewrite MODEL until its kernel has the shape that the method wants; print what changed."""
    _check_places(html, json, out, onnx)
    _check_options(methods, shortcut_weight)
    recipe = None if out is None or whole else _recipe(model, kwargs, seed, methods, shortcut_weight)
    module, examples = _load(model, kwargs, inputs, seed, trust)
    result = _transformed(model, module, methods, examples, shortcut_weight, seed)
    if not _is_stdout(json):
        console().print(result.kgraph.comparison)
    _write(result.kgraph.comparison, html, json)
    if out is not None:
        from kgraph import saved

        with _files():
            saved.write(result, out) if recipe is None else saved.save(result, out, recipe, examples)
        _wrote(out)
    if onnx is not None:
        _export(result, onnx, examples)


@app.command(
    epilog="Example: `kgraph verify shaped.pt` or `kgraph verify timm:resnet18 --method dks --input 1,3,64,64`"
)
def verify(
    model: Model,
    methods: OwnMethods = None,
    kwargs: Kwargs = "{}",
    inputs: Inputs = None,
    shortcut_weight: Shortcut = None,
    draws: Annotated[int, typer.Option("--draws", "-n", help="Draws of the weights.")] = 4,
    seed: Seed = 0,
    trust: Trust = False,
    html: HtmlOption = None,
    json: JsonOption = None,
    all_nodes: Annotated[bool, typer.Option("--all-nodes", help="List all nodes of a deep model.")] = False,
) -> None:
    """Measure a transformed MODEL and hold it against what its method promises; exits with 3 where it fails.

    A MODEL that is not transformed yet is transformed first. Its weights are drawn anew: trained ones do not matter.
    """
    from kgraph.checks import count
    from kgraph.emitted import EmittedModule

    _check_places(html, json)
    _check_options(methods or [], shortcut_weight)
    count("draws", draws, 2, "A standard error needs at least 2 draws")
    module, examples = _load(model, kwargs, inputs, seed, trust)
    if not isinstance(module, EmittedModule) or module.kgraph is None:
        module = _transformed(model, module, methods or [MethodName.auto], examples, shortcut_weight, seed)
    elif methods or inputs or shortcut_weight is not None:
        raise typer.BadParameter(f"'{model}' is transformed already: leave --method, --input and --shortcut-weight out")
    found = _certified(module, draws, seed)
    if not _is_stdout(json):
        out = console()
        out.print(found if not all_nodes else Text(found.text(all_nodes=True, width=out.width)))
    _write(found, None, json)
    if html is not None:
        with _files():
            module.kgraph.comparison.to_html(html, certificate=found)
        _wrote(html)
    if found.passed is False:
        raise typer.Exit(FAILED)


@app.command(epilog="Example: `kgraph export timm:resnet18 --onnx resnet18.onnx --input 1,3,224,224`")
def export(
    model: Model,
    onnx: Annotated[Path, typer.Option(help="File to write.")] = Path("model.onnx"),
    kwargs: Kwargs = "{}",
    inputs: Inputs = None,
    seed: Seed = 0,
    trust: Trust = False,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 23.")] = 20,
    fold: Annotated[bool, typer.Option(help="Write a transformed model's constants into its weights.")] = True,
) -> None:
    """Export MODEL to ONNX and check the file against it."""
    from kgraph.export import checked_opset

    _check_places(onnx)
    checked_opset(opset)
    module, examples = _load(model, kwargs, inputs, seed, trust)
    _export(module, onnx, examples, opset, fold=fold)


@app.command(epilog="Example: `kgraph demo --out kgraph-demo`")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and model.onnx.")] = Path(),
    method: MethodOption = "dks",
    seed: Seed = 0,
) -> None:
    """Compile a bundled 50-layer residual network: leaves report.html and model.onnx."""
    import kgraph
    from kgraph.checks import seeded
    from kgraph.demo import model_and_input

    seeded(seed)
    with _files():
        folder(out)
    _check_places(out / "report.html", out / "model.onnx")
    model, examples = model_and_input(seed)
    with spinner(f"transforming {type(model).__name__}"):
        result = kgraph.transform(model, method, examples, seed=seed)
    info, screen = result.kgraph, console()
    for label, report in (("before", info.before), ("after", info.after)):
        screen.print(Text(label, style="bold"))
        for line in report.summary:
            screen.print(Text(f"  {line}"))
    done = ", ".join(f"{number} x {what}" for what, number in info.ledger.counts().items())
    screen.print(Text(f"changes: {done or 'none'}"))
    for line in info.ledger.unmet:
        screen.print(Text(f"not met: {line}", style="red"))
    for line in info.ledger.notes:
        screen.print(Text(f"note: {line}"))
    certificate = _certified(result, 4, seed)
    screen.print(Text("certificate", style="bold"))
    for line in filter(None, (*certificate.words, certificate.warning)):
        screen.print(Text(f"  {line}"))
    with _files():
        info.comparison.to_html(out / "report.html", certificate=certificate)
    _wrote(out / "report.html")
    _export(result, out / "model.onnx", examples, certificate=certificate)


def _load(
    model: str, kwargs: str, inputs: list[str] | None, seed: int, trust: bool
) -> tuple[Any, tuple[Any, ...] | None]:
    from kgraph.naming import NamingError, read_input
    from kgraph.reading import load_any

    try:
        examples = tuple(read_input(text) for text in inputs) if inputs else None
        with spinner(f"building {model}"):
            return load_any(model, kwargs, seed, trust=trust), examples
    except NamingError as error:
        raise typer.BadParameter(str(error)) from error


def _transformed(
    name: str, module: Any, methods: list[MethodName], examples: Any, shortcut_weight: float | None, seed: int
) -> Any:
    import kgraph

    chosen = [method.value for method in methods]
    with spinner(f"transforming {name}"):
        return kgraph.transform(module, chosen, examples, shortcut_weight=shortcut_weight, seed=seed)


def _certified(module: Any, draws: int, seed: int) -> Any:
    with bar("measuring") as progress:
        return module.kgraph.certificate(draws, seed=seed, progress=progress)


def _recipe(model: str, kwargs: str, seed: int, methods: list[MethodName], shortcut_weight: float | None) -> Any:
    from kgraph.naming import NamingError
    from kgraph.reading import recipe_of

    try:
        return recipe_of(model, kwargs, seed, [method.value for method in methods], shortcut_weight)
    except NamingError as error:
        raise typer.BadParameter(str(error)) from error


def _export(model: Any, path: Path, examples: tuple[Any, ...] | None, opset: int = 20, **options: Any) -> None:
    import kgraph

    with spinner(f"exporting {path}"), _files():
        result = kgraph.export_onnx(model, path, examples, opset=opset, **options)
    _wrote(path, f"differs from the model by at most {result.max_abs_error:.1e}")


def _write(report: Any, html: Path | None, json: Path | None) -> None:
    if html is not None:
        with _files():
            report.to_html(html)
        _wrote(html)
    if _is_stdout(json):
        print(report.to_json())
    elif json is not None:
        with _files():
            report.to_json(json)
        _wrote(json)


def _check_places(*paths: Path | None) -> None:
    """Before the work, not after it."""
    with _files():
        for path in paths:
            if path is not None and not _is_stdout(path):
                destination(path)


def _check_options(methods: list[MethodName], shortcut_weight: float | None) -> None:
    """What `kgraph.transform` would refuse, before the model is built."""
    from kgraph.checks import weight_of_shortcut
    from kgraph.systems import resolve_methods

    if methods:
        resolve_methods([method.value for method in methods])
    if shortcut_weight is not None:
        weight_of_shortcut(shortcut_weight)


@contextmanager
def _files() -> Iterator[None]:
    """Files that cannot be written are wrong usage, in one line."""
    try:
        yield
    except FileError as error:
        raise typer.BadParameter(str(error)) from error


def _wrote(path: Path, remark: str = "") -> None:
    errors().print(Text(f"wrote {path}{f' ({remark})' if remark else ''}", style="green"), soft_wrap=True)


def _is_stdout(path: Path | None) -> bool:
    return path == Path("-")


if __name__ == "__main__":
    app()
