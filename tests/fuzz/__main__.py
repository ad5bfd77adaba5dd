"""`python -m tests.fuzz analyze --count 2000`: judge random programs, print figures, keep a file to go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import print as show
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from .judge import WIDTH
from .runs import FAILED, Job, figures, read, run_all


def main(
    target: Annotated[Literal["analyze", "kernels"], typer.Argument(help="What is judged.")],
    count: Annotated[int, typer.Option(help="Number of programs.")] = 50,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    width: Annotated[int, typer.Option(help="Smaller of the two widths.")] = WIDTH,
    effort: Annotated[float, typer.Option(help="Factor on the number of networks drawn.")] = 1.0,
    limit: Annotated[int, typer.Option(help="CPU seconds a program.")] = 120,
    shrink: Annotated[bool, typer.Option(help="Shrink what fails.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Lines of JSON, one a program; seeds in it are not run again.")
    ] = None,
) -> None:
    """Judge random programs against plain torch; exit 1 if a number or an error is wrong."""
    path = out or Path(f"fuzz_{target}.jsonl")
    lines = [line for line in read(path) if seed <= line["seed"] < seed + count]
    known = {line["seed"] for line in lines}
    todo = [Job(target, s, width, effort, limit, shrink) for s in range(seed, seed + count) if s not in known]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(target, total=count, completed=len(lines))
        for line in run_all(todo, path, jobs):
            lines.append(line)
            progress.advance(task)
            _tell(progress, line)
    found = figures(lines)
    show(json.dumps(found, indent=2))
    raise typer.Exit(any(found["failures"].values()))


def _tell(progress: Progress, line: dict[str, Any]) -> None:
    if line["status"] in FAILED:
        progress.console.print(f"seed {line['seed']} {line['status']} {line['detail']}", markup=False)
        for c in line["wrong"]:
            off = f"off by {c['deviation']:+.4f} +- {c['error']:.4f}"
            progress.console.print(f"  {c['value']} {c['quantity']}: {c['said']:.5g} ({c['how']}), {off}", markup=False)
        progress.console.print(line.get("program", ""), markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
