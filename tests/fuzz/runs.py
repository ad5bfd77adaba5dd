"""Many programs: in parallel, within a time each, one line of JSON a program, figures of all lines."""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .judge import Verdict
from .program import PRELUDE
from .targets import TARGETS

MEMORY = 10 * 2**30
"""Bytes of address space a process: a program that takes more is a crash, not the end of the run."""
FAILED = ("wrong", "crashed", "slow", "large")
WITHIN = 2.0
"""Printed errors that the truth should be within, 95 of 100 times."""


@dataclass(frozen=True)
class Job:
    """One program to judge."""

    target: str
    seed: int
    width: int
    effort: float
    limit: int
    shrinks: bool


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so much CPU time: other work on the machine does not count."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(job: Job) -> dict[str, Any]:
    """The verdict as a line, with the shrunk program of a failure."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    target = TARGETS[job.target]
    try:
        with _limited(job.limit):
            verdict = target.judge(job.seed, job.width, job.effort)
    except TimeoutError:
        verdict = Verdict(job.seed, "slow", f"more than {job.limit} s of CPU")
    line = verdict.as_dict()
    if verdict.status in FAILED:
        program = target.generate(job.seed)
        if job.shrinks and verdict.status in ("wrong", "crashed"):
            try:
                with _limited(20 * job.limit):
                    program = target.smallest(verdict)
            except TimeoutError:
                pass  # the program as it was generated is a finding too
        if verdict.status == "wrong":
            line["shrunk"] = [str(c) for c in target.wrong(program)]
        line["program"] = program.source().removeprefix(PRELUDE).strip()
    return line


def run_all(jobs: list[Job], path: Path, workers: int) -> Iterator[dict[str, Any]]:
    """Lines of all jobs as they end, each appended to the file first."""
    with path.open("a") as file:
        for line in _results(jobs, workers):
            file.write(json.dumps(line) + "\n")
            file.flush()
            yield line


def _results(jobs: list[Job], workers: int) -> Iterator[dict[str, Any]]:
    if workers == 1:
        yield from map(run, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=50) as pool:
        yield from pool.imap_unordered(run, jobs)


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of an earlier run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def figures(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts by status, by how, by refusal; wrong seeds; how often the truth is within two printed errors."""
    lines = list(lines)
    hows: Counter[str] = Counter()
    for line in lines:
        hows.update(line["counts"])
    return {
        "programs": len(lines),
        "status": dict(Counter(line["status"] for line in lines)),
        "values": dict(hows),
        "numbers compared": sum(line["compared"] for line in lines),
        "refusals": dict(Counter(line["detail"] for line in lines if line["status"] == "refused").most_common()),
        "failures": {s: [x["seed"] for x in lines if x["status"] == s] for s in FAILED},
        "sampled": calibration(lines),
    }


def calibration(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Share of sampled numbers within two errors, printed and the oracle's own together, where the latter is small."""
    found: dict[str, list[bool]] = {}
    for line in lines:
        for c in line["sampled"]:
            if c["printed"] > 0 and c["error"] <= c["printed"] / 2:
                allowed = WITHIN * (c["printed"] ** 2 + c["error"] ** 2) ** 0.5
                found.setdefault(c["quantity"], []).append(abs(c["deviation"]) <= allowed)
    return {name: {"numbers": len(hits), "within": sum(hits) / len(hits)} for name, hits in found.items()}
