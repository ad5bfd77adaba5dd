"""Arguments and options of the command line, each with its help."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="timm:NAME, package.module:FACTORY or path/to/file.py:FACTORY (the file is run), "
        "or a file that transform --out wrote."
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run what a saved file holds or names: whole modules, factories it does not lie by."),
]
Kwargs = Annotated[str, typer.Option(help="Arguments of the factory, as JSON: '{\"width\": 3}'.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", help="Shape of an input: 1,3,64,64 or 1,128:long. Repeat for more. Default: inferred."),
]


class MethodName(str, Enum):
    """Names of `kgraph.transform`'s methods: typer takes lists of enumerations, not of literals."""

    auto = "auto"
    dks = "dks"
    tat = "tat"
    edge_of_chaos = "edge-of-chaos"
    ntk_chaos = "ntk-chaos"
    residual_scaling = "residual-scaling"


MethodOption = Annotated[Literal["dks", "tat"], typer.Option(help="How to shape the kernel.")]
MethodOptions = Annotated[
    list[MethodName],
    typer.Option("--method", help="How to shape the kernel. Repeat it for methods that set different things."),
]
OwnMethods = Annotated[
    list[MethodName] | None,
    typer.Option("--method", help="How to transform a MODEL that is not transformed yet. Default: auto."),
]
Shortcut = Annotated[float | None, typer.Option(help="Weight of the shortcut in residual sums, in [0, 1].")]
Seed = Annotated[int, typer.Option(help="Seed of the model's and the method's random weights.")]
ModeOption = Annotated[Literal["train", "eval"] | None, typer.Option(help="Mode to analyse. Default: the model's own.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML file.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON ('-': standard output).")]
OnnxOption = Annotated[Path | None, typer.Option("--onnx", help="Export the result to ONNX.")]
