"""What stored records say: who is fastest in a case, where sparse starts to win, and how near the goals we are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from .implementations import Mode

Record = dict[str, Any]
MODES: tuple[Mode, ...] = ("float32", "bfloat16", "int8")

# Levels below this CPU's own, which a goal must name.
LOWER = ("scalar", "avx2")
FAMILY_FIELDS = ("suite", "case", "pattern", "active", "cache", "threads", "batch")


@dataclass(frozen=True)
class Goal:
    """A row of the numbers to reach: a peer's time over ours.

    Attributes:
        title: the case in words.
        where: fields that the records have.
        peers: names or globs of the peers, of which the fastest counts.
        ours: a glob of ours that count, the fastest again.
        without: a glob of ours that do not.
        modes: of ours that count.
        prototype, goal: for one thread and, where it differs, two; no prototype where none was measured.
    """

    title: str
    where: dict[str, Any]
    peers: tuple[str, ...]
    modes: tuple[Mode, ...]
    prototype: tuple[float, ...]
    goal: tuple[float, ...]
    ours: str = "tersetorch*"
    without: str = ""


@dataclass(frozen=True)
class Reached:
    """What became of a goal: a peer's record, ours, and their ratio."""

    goal: Goal
    threads: int
    peer: Record
    ours: Record

    @property
    def ratio(self) -> float:
        """The peer's time over ours."""
        return float(self.peer["p30_ms"] / self.ours["p30_ms"])

    @property
    def target(self) -> tuple[float | None, float]:
        """What the prototype reached, where it was measured, and what is aimed at, with that many threads."""
        prototype, goal = self.goal.prototype, self.goal.goal
        reached = prototype[min(self.threads, len(prototype)) - 1] if prototype else None
        return reached, goal[min(self.threads, len(goal)) - 1]


def _goals() -> Iterator[Goal]:
    fc6 = {"case": "alexnet fc6", "batch": 1, "cache": "warm", "active": 1.0, "pattern": "random"}
    cold = fc6 | {"cache": "cold"}
    fc7 = fc6 | {"case": "alexnet fc7", "batch": 64}
    linear, packed = ("torch F.linear float32",), ("oneDNN packed float32",)
    dynamic, csr = ("torch dynamic int8*",), ("torch sparse CSR",)
    codebook = "tersetorch*codebook*"
    name, square = "linear 4096x9216, batch 1", "linear 4096x4096, batch 64"

    def one(title: str, where: dict[str, Any], density: float, *rest: Any, **more: Any) -> Goal:
        return Goal(f"{title}, {100 * density:.0f} %", where | {"density": density}, *rest, **more)

    plain: tuple[Mode, ...] = ("float32",)
    yield one(f"{name}, float32 values", fc6, 0.09, packed, plain, (3.3, 3.5), (5, 5), without=codebook)
    yield one(f"{name}, codebook", fc6, 0.09, packed, plain, (5.5, 6.1), (7, 7), ours=codebook)
    yield one(f"{name}, codebook", fc6, 0.09, linear, plain, (5.8, 12), (7, 14), ours=codebook)
    yield one(f"{name}, float32 values", fc6, 0.03, csr, plain, (1.9, 1.8), (2.7,), without=codebook)
    yield one(f"{name}, int8, cold", cold, 0.09, dynamic, ("int8",), (3.5, 4.5), (4, 5))
    yield one(f"{name}, int8, cold", cold, 0.2, dynamic, ("int8",), (1.9,), (2.3,))
    yield one(f"{name}, int8, cold", cold, 0.35, dynamic, ("int8",), (1.3,), (1.5,))
    relu = fc6 | {"active": 0.4}
    yield one(f"{name}, codebook, 40 % active", relu, 0.09, linear, plain, (11, 21), (15, 28), ours=codebook)
    for density, prototype, goal in ((0.03, 14.9, 20), (0.09, 6.8, 8), (0.2, 3.6, 4.3), (0.35, 2.1, 2.5)):
        yield one(f"{square}, float32", fc7, density, packed, plain, (prototype,), (goal,))
    for density, prototype, goal in ((0.09, 4.0, 4.8), (0.2, 2.0, 2.4), (0.35, 1.3, 1.5)):
        peers = ("oneDNN packed bfloat16",)
        yield one(f"{square}, bfloat16", fc7, density, peers, ("bfloat16",), (prototype,), (goal,))
    for density, prototype, goal in ((0.03, 6.3, 7.5), (0.09, 2.5, 3), (0.2, 1.5, 1.7), (0.35, 1.1, 1.15)):
        yield one(f"{square}, int8", fc7, density, dynamic, ("int8",), (prototype,), (goal,))
    for density in (0.09, 0.2, 0.35):
        yield one(f"{square}, float32", fc7, density, csr, plain, (4.3,), (6,))
    eight = fc7 | {"batch": 8}
    yield one("linear 4096x4096, batch 8, float32", eight, 0.09, packed, plain, (5.7,), (7,))
    yield one("linear 4096x4096, batch 8, int8", eight, 0.09, dynamic, ("int8",), (1.25,), (1.6,))
    conv = fc6 | {"case": "resnet 256 at 14"}
    layouts = ("torch F.conv2d float32*",)
    yield one("conv 256 at 14x14, batch 1, float32", conv, 0.35, layouts, plain, (2.1,), (2.3,))
    yield one("conv 256 at 14x14, batch 1, float32", conv, 0.1, layouts, plain, (5.7,), (7,))
    vgg = fc6 | {"case": "vgg16 conv3_1", "batch": 16}
    half = ("torch F.conv2d bfloat16 channels_last",)
    yield one("conv VGG 3_1, batch 16, bfloat16", vgg, 0.35, half, ("bfloat16",), (1.09,), (1.3,))
    yield one("conv VGG 3_1, batch 16, bfloat16", vgg, 0.1, half, ("bfloat16",), (2.6,), (3.5,))
    yield from _codebook_goals()
    yield from _binary_goals()
    yield from _flat_goals()
    yield from _rounding_goals()
    for case in ("LeNet-300-100", "LeNet-5"):
        where = {"suite": "production", "case": case, "pattern": "compiled", "batch": 1}
        yield Goal(f"{case} converted, batch 1, each in its fastest form", where, ("torch dense*",), plain, (), (1,))
    for batch in (1, 16):
        where = {"case": "SqueezeNet of Deep Compression", "batch": batch}
        yield Goal(f"SqueezeNet as published, batch {batch}", where, ("torch dense*",), plain, (), (1.3,))


def _codebook_goals() -> Iterator[Goal]:
    linear, packed, dynamic = ("torch F.linear float32",), ("oneDNN packed bfloat16",), ("torch dynamic int8*",)
    fc6 = {"suite": "codebook", "case": "alexnet fc6", "cache": "warm"}

    def one(
        bits: int, batch: int, mode: Mode, peers: tuple[str, ...], prototype: tuple[float, ...], goal: tuple[float, ...]
    ) -> Goal:
        where = fc6 | {"batch": batch, "pattern": f"{bits} bits"}
        return Goal(f"codes of {bits} bits, 4096x9216, batch {batch}, {mode}", where, peers, (mode,), prototype, goal)

    yield one(4, 1, "int8", dynamic, (2.4, 3.4), (2.7, 3.6))
    yield one(4, 1, "bfloat16", packed, (3.5, 4.9), (4.5, 5))
    yield one(4, 1, "float32", linear, (3.4, 7.7), (5, 10))
    yield one(4, 8, "int8", dynamic, (1.3, 1.66), (1.6, 1.8))
    yield one(4, 8, "bfloat16", packed, (2.1, 2.5), (2.4,))
    yield one(4, 256, "bfloat16", packed, (0.97,), (1,))
    yield one(8, 256, "bfloat16", packed, (0.95,), (1,))
    yield one(8, 1, "int8", dynamic, (0.88,), (1.3,))


def _binary_goals() -> Iterator[Goal]:
    packed, linear, dynamic = ("oneDNN packed float32",), ("torch F.linear float32",), ("torch dynamic int8*",)
    mode: tuple[Mode, ...] = ("binary",)
    floats = "tersetorch xnor"  # samples come as floats and are packed within the time

    def one(case: str, batch: int, peers: tuple[str, ...], prototype: float | None, goal: float, **more: Any) -> Goal:
        words = f"signs, {case}, batch {batch}, {more.pop('words', 'floats out')}"
        where = {"suite": "binary", "case": case, "batch": batch, "pattern": "signs"} | more.pop("where", {})
        before = () if prototype is None else (prototype,)
        return Goal(words, where, peers, mode, before, (goal,), **({"ours": floats} | more))

    for batch, rows in (
        (64, ((packed, 21, 22), (linear, 30, 30), (dynamic, 6.1, 6.3))),
        (1024, ((packed, 19.4, 20), (linear, 23, 24), (dynamic, 5.7, 6))),
        (1, ((linear, 133, 140), (dynamic, 17, 18))),
    ):
        for peers, prototype, goal in rows:
            yield one("alexnet fc7", batch, peers, prototype, goal)
    conv = "resnet 256 at 14"
    yield one(conv, 1, ("torch F.conv2d float32*",), 21, 23)
    yield one(conv, 1, ("torch static int8 conv",), 6, 6.5)
    layout = ("torch F.conv2d float32 channels_last",)
    yield one(conv, 16, layout, 14, 20, ours="tersetorch xnor, signs out", words="signs out")
    theirs = {"ours": "tersetorch xnor packed", "words": "packed samples"}
    for case, batch, prototype, goal in (
        ("square 1024", 1024, 1.8, 1.9),
        ("1024 from 512", 1024, 2.3, 2.6),
        ("256 from 2304", 784, 1.5, 1.7),
    ):
        yield one(case, batch, ("NumKong packed",), prototype, goal, **theirs)
    for batch in (64, 1024):
        yield one("alexnet fc7", batch, linear, None, 7, where={"isa": "avx2"}, words="AVX2")
    for batch, goal in ((1, 40), (100, 12)):
        case = "MNIST MLP 784-4096-4096-4096-10"
        words = f"{case} of signs, batch {batch}"
        yield Goal(words, {"suite": "binary_networks", "case": case, "batch": batch}, packed, mode, (), (goal,))


def _flat_goals() -> Iterator[Goal]:
    chain, dense = ("torch chain float32 channels_last",), ("torch F.conv2d float32*",)

    def one(
        case: str,
        batch: int,
        peers: tuple[str, ...],
        prototype: tuple[float, ...],
        *goal: float,
        kept: bool = False,
        mode: Mode = "float32",
    ) -> Goal:
        words = f"{case}, batch {batch}{', pages kept' * kept}{', bfloat16' * (mode == 'bfloat16')}"
        words += f", against {'the dense convolution' if peers is dense else 'the chain'}"
        where = {"suite": "flat", "case": case, "batch": batch, "pattern": f"flattened{', pages kept' * kept}"}
        fused = f"tersetorch flat {'bfloat16 ' * (mode == 'bfloat16')}channels_last"
        return Goal(words, where, peers, (mode,), prototype, goal, ours=fused)

    yield one("flat 128 5x5 at 14", 1, chain, (2.2, 3.1), 2.6, 3.5)
    yield one("flat 128 5x5 at 56", 32, chain, (1.41,), 1.55, kept=True)
    yield one("flat 128 5x5 at 56", 32, chain, (2.0,), 2.2)
    for kept in (True, False):
        yield one("flat 128 5x5 at 56", 32, dense, (10.5,), 11.3, kept=kept)
    for channels, prototype in ((96, (4.3, 6.4)), (128, (4.2, 3.6)), (256, (4.3, 3.8))):
        yield one(f"flat {channels} 3x3 at 14", 1, dense, prototype, 4)
    yield one("flat 96 3x3 at 32", 32, dense, (2.9, 3.0), 4)
    halves = ("torch chain bfloat16 channels_last",)
    for case, batch, kept in (
        ("flat 128 5x5 at 14", 1, False),
        ("flat 128 5x5 at 56", 32, False),
        ("flat 128 5x5 at 56", 32, True),
    ):
        yield one(case, batch, halves, (), 1.5, kept=kept, mode="bfloat16")


def _rounding_goals() -> Iterator[Goal]:
    case = "round 16384 Ki floats to <4,12>"
    for pattern in ("floats", "floats, pages kept"):
        words = f"stochastic rounding of 16 Mi {pattern}, against fake_quantize to the nearest"
        where = {"suite": "fixed", "case": case, "pattern": pattern}
        yield Goal(words, where, ("torch fake_quantize*",), ("float32",), (), (2,), ours="tersetorch stochastic")


GOALS = tuple(_goals())


def reached(records: Iterable[Record]) -> Iterator[Goal | Reached]:
    """Every goal with what the records say of it, for each number of threads; the goal alone where they say nothing."""
    records = list(records)
    for goal in GOALS:
        here = [r for r in records if all(r[field] == value for field, value in goal.where.items())]
        if "isa" not in goal.where and any(r["isa"] not in LOWER for r in here):
            here = [r for r in here if r["isa"] not in LOWER]
        found = False
        for threads in sorted({r["threads"] for r in here}):
            same = [r for r in here if r["threads"] == threads]
            peers = [r for r in same if r["family"] != "ours" and _named(r, goal.peers)]
            ours = [r for r in same if r["family"] == "ours" and r["mode"] in goal.modes and _named(r, (goal.ours,))]
            ours = [r for r in ours if not _named(r, (goal.without,))]
            if peers and ours:
                found = True
                yield Reached(goal, threads, fastest(peers), fastest(ours))
        if not found:
            yield goal


def fastest(records: Iterable[Record]) -> Record:
    """The record with the smallest time."""
    return min(records, key=lambda record: float(record["p30_ms"]))


def by_case(records: Iterable[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Records that differ in the density and the implementation alone, in the order they come."""
    cases: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        cases.setdefault(tuple(record[field] for field in FAMILY_FIELDS), []).append(record)
    return cases


def break_even(records: list[Record], mode: Mode) -> str | None:
    """Up to which density ours is faster than the fastest dense form of one mode, in words.

    Ours counts in the same mode, or in float32, which is more accurate. Between two densities that were measured the
    ratio of the times is taken as straight.

    Args:
        records: of one case, all densities.
        mode: of the dense forms.

    Returns:
        Such as "to 27 % (oneDNN packed float32)"; None where one of the two sides was not measured.
    """
    ratios = []
    rival = ""
    for density in sorted({r["density"] for r in records}):
        same = [r for r in records if r["density"] == density]
        dense = [r for r in same if r["family"] == "dense" and r["mode"] == mode]
        ours = [r for r in same if r["family"] == "ours" and r["mode"] in ("float32", mode)]
        if dense and ours:
            best = fastest(dense)
            rival = best["implementation"]
            ratios.append((density, fastest(ours)["p30_ms"] / best["p30_ms"]))
    if not ratios:
        return None
    return f"{_crossing(ratios)} ({rival})"


def _crossing(ratios: list[tuple[float, float]]) -> str:
    if ratios[0][1] >= 1:
        return f"below {100 * ratios[0][0]:.0f} %"
    for (low, below), (high, above) in pairwise(ratios):
        if above >= 1:
            return f"to {100 * (low + (high - low) * (1 - below) / (above - below)):.0f} %"
    return f"beyond {100 * ratios[-1][0]:.0f} %"


def _named(record: Record, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(record["implementation"], pattern) for pattern in patterns)
