"""The ways in which the suite `production` runs, calls and loads a network."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .timing import summary

Call = Callable[[Tensor], Tensor]


def compiled(model: nn.Module, x: Tensor) -> Call:
    """Of torch.compile, as one graph for the shape of x."""
    return _compiled(model, x, {})


def frozen(model: nn.Module, x: Tensor) -> Call:
    """The same with the weights as constants, which inductor then lays out for oneDNN."""
    return _compiled(model, x, {"freezing": True})


def _compiled(model: nn.Module, x: Tensor, options: dict[str, Any]) -> Call:
    call: Call = torch.compile(model, fullgraph=True, dynamic=False, options=options)
    call(x)
    return call


def packaged(model: nn.Module, x: Tensor, folder: Path) -> Call:
    """Of AOTInductor, frozen too: exported for the shape of x, compiled into a package in folder and loaded from it."""
    program = torch.export.export(model, (x,))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "package.pt2"), inductor_configs={"freezing": True}
    )
    call: Call = torch._inductor.aoti_load_package(package)
    return call


def from_threads(
    calls: Mapping[str, Callable[[], Any]], callers: tuple[int, ...], windows: int, seconds: float
) -> dict[tuple[str, int], dict[str, float]]:
    """What each call takes while so many threads make it, each with one intra-op thread.

    All combinations take turns in a random order (seeded), a window of that many seconds each.

    Returns:
        For each name and number of callers what timing.summary makes of the windows: milliseconds over the number of
        calls that all callers finished together.
    """
    turns = [(name, count) for name in calls for count in callers]
    order = random.Random(0)
    times: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    with ThreadPoolExecutor(max(callers), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(windows):
            for name, count in order.sample(turns, len(turns)):
                times[name, count].append(1e3 / _calls_a_second(pool, calls[name], count, seconds))
    return {turn: summary(found) for turn, found in times.items()}


def _calls_a_second(pool: ThreadPoolExecutor, call: Callable[[], Any], callers: int, seconds: float) -> float:
    ready = threading.Barrier(callers)

    def one(_: int) -> float:
        with torch.inference_mode():
            call()  # its data are where they are in use
            ready.wait()
            start, made = time.perf_counter(), 0
            while (passed := time.perf_counter() - start) < seconds or not made:
                call()
                made += 1
        return made / passed

    return sum(pool.map(one, range(callers)))
