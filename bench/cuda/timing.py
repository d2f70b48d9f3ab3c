"""Interleaved timing on a GPU: replays of graphs whose calls walk over copies of the weight."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..timing import summary

MIN_SAMPLES, MAX_SAMPLES = 7, 50
# One replay: long beside the clock's half microsecond, and beside what a launch of a graph costs.
REPLAY_MS = 2.0
MAX_ROUNDS = 50

Calls = Sequence[Callable[[], Any]]


def interleave(candidates: Mapping[str, Calls], seconds: float) -> dict[str, dict[str, float]]:
    """Times the candidates in turns for about that many seconds altogether, in a random order (seeded).

    The calls of a candidate compute the same from different copies of their weight. They are captured, round after
    round, into one CUDA graph, and a sample is the mean of the calls of one replay: no launch of ours or of a peer is
    waited for, and a copy has left the L2 cache before its turn comes again if all copies together are larger than it.

    Returns:
        For each name what bench.timing.interleave returns.

    Raises:
        RuntimeError: a candidate cannot be captured, because it waits for the device or allocates behind torch's back.
    """
    graphs = {name: _capture(calls) for name, calls in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    share = 1e3 * seconds / max(1, len(candidates))
    order = random.Random(0)
    turns: list[tuple[float, str]] = []
    for name, (graph, calls) in graphs.items():
        count = max(MIN_SAMPLES, min(MAX_SAMPLES, int(share / max(_replay_ms(graph), 1e-3))))
        samples[name].append(_replay_ms(graph) / calls)
        turns += [((i + order.random()) / count, name) for i in range(count - 1)]
    for _, name in sorted(turns):
        graph, calls = graphs[name]
        samples[name].append(_replay_ms(graph) / calls)
    return {name: summary(times) for name, times in samples.items()}


def _capture(calls: Calls) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of some rounds, and how many calls it holds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    once = _timed_ms(lambda: [call() for call in calls])
    rounds = max(1, min(MAX_ROUNDS, int(REPLAY_MS / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    return graph, rounds * len(calls)


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    return _timed_ms(graph.replay)


def _timed_ms(run: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
