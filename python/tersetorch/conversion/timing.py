"""Randomised interleaved rounds: is one way to compute the same thing faster than another, beyond doubt?"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

ROUNDS = 15
WINS = 13
RATIO = 0.95
# A stretch lasts at least this long, so that the clock's own cost and resolution do not count.
STRETCH_SECONDS = 2e-4
# A sample is the best of so many stretches, so that another process's time slice does not count.
STRETCHES = 3
# A call this long meets its own weights as cold as in use, whoever ran before it, and outlasts a time slice.
LONG_CALL_SECONDS = 2e-2
MAX_REPEATS = 10_000
# The first dense form a second time: how much it differs from itself is what the machine's noise can pretend.
AGAIN = "dense again"

Run = Callable[[], object]
# (label, run, repeats) -> seconds a call. Tests decide outcomes by passing their own.
Timer = Callable[[str, Run, int], float]


def time_calls(label: str, run: Run, repeats: int) -> float:
    """Seconds a call takes: one sample.

    A long call is timed once. For a short one that call only brings its data as near as in use, and the sample is the
    best of three stretches of repeats calls each.
    """
    first = _stretch(run, 1)
    return first if first >= LONG_CALL_SECONDS else min(_stretch(run, repeats) for _ in range(STRETCHES))


def _stretch(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


@dataclass(frozen=True)
class Score:
    """How a candidate did against the strongest dense form.

    Attributes:
        median_ms: median time of a call.
        ratio: median over the rounds of its time over the dense form's in the same round.
        wins: rounds in which it was faster.
        rounds: rounds it ran in; fewer than 15 when it could no longer win 13.
    """

    median_ms: float
    ratio: float
    wins: int
    rounds: int


@dataclass(frozen=True)
class Contest:
    """What the rounds showed.

    Attributes:
        dense_form: the dense form with the lowest median, which the candidates are held against.
        dense_ms: its median.
        noise: median over the rounds of |t / t' - 1|, t and t' two samples of the same dense form.
        scores: one for each candidate.
    """

    dense_form: str
    dense_ms: float
    noise: float
    scores: dict[str, Score]

    def passes(self, name: str) -> bool:
        """Whether the candidate is faster: ratio <= 0.95, at least 13 wins of 15, and a lead larger than the noise."""
        score = self.scores[name]
        return score.ratio <= RATIO and score.wins >= WINS and 1 - score.ratio > self.noise

    def too_noisy(self, name: str) -> bool:
        """Whether the candidate looked faster, but not beyond what noise can pretend."""
        return self.scores[name].ratio <= RATIO and not self.passes(name)

    def describe(self, name: str) -> str:
        """The result in words."""
        score = self.scores[name]
        figures = (
            f"{score.median_ms:.4g} ms against {self.dense_ms:.4g} ms ({self.dense_form}), ratio {score.ratio:.2f}, "
            f"won {score.wins} of {score.rounds}"
        )
        if self.passes(name):
            return f"faster: {figures}"
        if self.too_noisy(name):
            return f"too noisy to decide: {figures}, dense against itself differs by {self.noise:.0%}"
        return f"not faster: {figures}"


def contest(
    dense: Mapping[str, Run], candidates: Mapping[str, Run], *, seed: int, timer: Timer, label: str = ""
) -> Contest:
    """Times every form once a round, in a new random order each round, for 15 rounds.

    A candidate that has lost so many rounds to every dense form that it can no longer win 13 stops early.

    Args:
        dense: the dense forms by name, at least one.
        candidates: what is compared with the strongest of them, at least one.
        seed: of the order.
        timer: what measures.
        label: what the timer is told before each form's name.
    """
    first = next(iter(dense))
    runs = {**dense, AGAIN: dense[first], **candidates}
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in runs}
    running = list(runs)
    collecting = gc.isenabled()
    gc.disable()
    try:
        repeats = {name: _repeats(label + name, run, timer) for name, run in runs.items()}
        for _ in range(ROUNDS):
            shuffle(running)
            for name in running:
                samples[name].append(timer(label + name, runs[name], repeats[name]))
            beaten = {name for name in candidates if name in running and _lost(name, dense, samples) > ROUNDS - WINS}
            running = [name for name in running if name not in beaten]
            if not any(name in candidates for name in running):
                break
    finally:
        if collecting:
            gc.enable()
    strongest = min(dense, key=lambda name: statistics.median(samples[name]))
    noise = statistics.median(abs(_over(a, b) - 1) for a, b in zip(samples[AGAIN], samples[first], strict=True))
    return Contest(
        strongest,
        1e3 * statistics.median(samples[strongest]),
        noise,
        {name: _score(samples[name], samples[strongest]) for name in candidates},
    )


def _repeats(label: str, run: Run, timer: Timer) -> int:
    seconds = timer(label, run, 1)
    return min(MAX_REPEATS, math.ceil(STRETCH_SECONDS / seconds)) if seconds > 0 else MAX_REPEATS


def _lost(name: str, dense: Mapping[str, Run], samples: Mapping[str, list[float]]) -> int:
    slowest = zip(*(samples[form] for form in dense), strict=True)
    return sum(mine >= max(theirs) for mine, theirs in zip(samples[name], slowest, strict=True))


def _score(mine: list[float], theirs: list[float]) -> Score:
    pairs = list(zip(mine, theirs, strict=False))
    return Score(
        median_ms=1e3 * statistics.median(mine),
        ratio=statistics.median(_over(a, b) for a, b in pairs),
        wins=sum(a < b for a, b in pairs),
        rounds=len(pairs),
    )


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else (1.0 if a == 0 else math.inf)
