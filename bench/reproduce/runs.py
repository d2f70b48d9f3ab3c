"""One run for each seed, shared out over processes, and what the seeds say together."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tersetorch.bench.records import machine_facts
from tersetorch.zoo.ranks import from_rank_0, rank, ranks

SEEDS = (0, 1, 2)


class OneSeed(Protocol):
    """Does everything that one seed asks for; its row is JSON-able."""

    def __call__(self, seed: int, *, progress: Progress | None) -> dict[str, Any]:
        """The row of seed; bars are added to progress."""


@dataclass(frozen=True)
class How:
    """How a reproduction is run.

    Attributes:
        seeds: each draws held-out images, weights and batches.
        quick: a shorter plan, to see that everything runs; its figures are worth little.
        progress: bars are added to it; with more than one worker a single one, which counts seeds.
        workers: processes that share out the seeds; the figures do not depend on it.
        notes: a file that keeps the seeds that are done: a run of the same plan on as many ranks takes them from there.
    """

    seeds: Sequence[int] = SEEDS
    quick: bool = False
    progress: Progress | None = None
    workers: int = 1
    notes: Path | None = None

    def folder(self, plan: Mapping[str, Any]) -> Path | None:
        """A folder beside the notes for what seeds have come to by plan on as many ranks; reproduce deletes it."""
        if self.notes is None:
            return None
        digest = hashlib.sha256(json.dumps([plan, ranks()], sort_keys=True).encode()).hexdigest()
        return self.notes.with_name(f"{self.notes.name}.{digest[:16]}")


@dataclass(frozen=True)
class Reproduction:
    """One row of the papers' tables.

    Attributes:
        name: what `tersetorch reproduce` calls it, and its record's file.
        words: what it shows, in a line.
        run: the JSON-able record.
        table: the record as a person reads it.
        draw: the record as a picture in a file, where one says more.
    """

    name: str
    words: str
    run: Callable[[How], dict[str, Any]]
    table: Callable[[dict[str, Any]], Table]
    draw: Callable[[dict[str, Any], Path], None] | None = None


def over_seeds(
    name: str, one: OneSeed, how: How, plan: Mapping[str, Any], paper: Mapping[str, Any], figures: Mapping[str, str]
) -> dict[str, Any]:
    """Runs one(seed) for each seed.

    Args:
        name: the reproduction's.
        one: picklable where there is more than one worker.
        how: seeds, workers and notes.
        plan: what decides the figures beside the seeds; notes of another plan are not taken.
        paper: the published figures.
        figures: the figures of a row that are put together, by name: "least" or "most" says which is the worst.

    Returns:
        The record: reproduction, paper, plan, seeds, mean and worst of the figures, machine and seconds.

    Where torch.distributed has started, every rank must call it; rank 0 alone reads and writes the notes.

    Raises:
        ValueError: there are no seeds, no workers, or several workers where there are several ranks.
    """
    if not how.seeds:
        raise ValueError("run: seeds must hold at least one seed, got none; pass for example [0, 1, 2]")
    if how.workers < 1:
        raise ValueError(f"run: workers must be at least 1, got {how.workers}; pass the processes to use")
    if how.workers > 1 and ranks() > 1:
        raise ValueError(f"run: workers must be 1 on {ranks()} ranks, got {how.workers}; leave it out")
    started = time.monotonic()
    described = json.loads(json.dumps(plan))
    done = from_rank_0(partial(_noted, how.notes, described))
    for row in _rows(one, [seed for seed in how.seeds if seed not in done], how):
        done[row["seed"]] = row
        if how.notes is not None and rank() == 0:
            partial_notes = how.notes.with_name(how.notes.name + ".partial")
            partial_notes.write_text(
                json.dumps({"plan": described, "ranks": ranks(), "seeds": list(done.values())}) + "\n", "utf-8"
            )
            partial_notes.replace(how.notes)
    rows = [done[seed] for seed in how.seeds]
    worst = {"least": max, "most": min}
    return {
        "reproduction": name,
        "paper": paper,
        "plan": described,
        "seeds": rows,
        "mean": {figure: statistics.mean(row[figure] for row in rows) for figure in figures},
        "worst": {figure: worst[best](row[figure] for row in rows) for figure, best in figures.items()},
        "machine": machine_facts() | {"threads": torch.get_num_threads()},
        **({"ranks": ranks()} if ranks() > 1 else {}),
        "seconds": time.monotonic() - started,
    }


def _noted(notes: Path | None, plan: object) -> dict[int, dict[str, Any]]:
    """The rows that a run of the same plan on as many ranks has left."""
    if notes is None or not notes.exists():
        return {}
    noted = json.loads(notes.read_text(encoding="utf-8"))
    same = noted["plan"] == plan and noted.get("ranks", 1) == ranks()
    return {row["seed"]: row for row in noted["seeds"]} if same else {}


def _rows(one: OneSeed, seeds: Sequence[int], how: How) -> Iterator[dict[str, Any]]:
    """The seeds' rows, each as soon as it is there."""
    if how.workers == 1:
        yield from (_timed(one, seed, how.progress) for seed in seeds)
        return
    bar = how.progress if how.progress is not None else Progress(disable=True)
    job = partial(_in_worker, one, threads=torch.get_num_threads())
    with ProcessPoolExecutor(how.workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(job, seed) for seed in seeds]
        for each in bar.track(as_completed(waiting), total=len(waiting), description="seeds"):
            yield each.result()


def _in_worker(one: OneSeed, seed: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return _timed(one, seed, None)


def _timed(one: OneSeed, seed: int, progress: Progress | None) -> dict[str, Any]:
    started = time.monotonic()
    row = one(seed, progress=progress)
    return {"seed": seed, **row, "seconds": time.monotonic() - started}


def reproduce(
    row: Reproduction,
    seeds: Sequence[int] = SEEDS,
    quick: bool = False,
    workers: int = 1,
    threads: int = 1,
    record: Path | None = None,
) -> dict[str, Any]:
    """Runs a reproduction with bars, prints its table, stores its record; until then its seeds wait in FILE.notes.

    Where torch.distributed has started, every rank must call it, and rank 0 alone prints and stores.
    """
    notes = None if record is None else record.with_name(record.name + ".notes")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    console = Console()
    try:
        with Progress(console=console, disable=rank() > 0) as progress:
            found = row.run(How(seeds, quick, progress, workers, notes))
    finally:
        torch.set_num_threads(before)
    if rank() > 0:
        return found
    Console(width=max(160, console.width)).print(row.table(found))
    if record is not None and notes is not None:
        record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        notes.unlink(missing_ok=True)
        for path in notes.parent.iterdir():
            if path.is_dir() and re.fullmatch(re.escape(notes.name) + r"\.[0-9a-f]{16}", path.name):
                shutil.rmtree(path)
    return found
