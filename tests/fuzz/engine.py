"""A small coverage-guided fuzzer: inputs that reach a new step of the watched sources are kept and changed further.

A step is two lines of a function that ran one after the other. One input runs at a time in this process, within a limit
of time; it is on disk while it runs, as CRASHES/running, so that a crash of native code leaves it behind.
"""

import hashlib
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

# Of one input. Bounds of readers are smaller; this one also holds what they use besides.
MEMORY = 512 << 20
SECONDS = 20


class Hang(BaseException):
    """An input that takes too long; no reader catches it."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        seeds: inputs to begin with.
        run: reads one input; returns what it came to, which counts as coverage, too.
        mutate: an input from another one and from any third, by a random generator.
        refusals: what run may raise.
        sources: folders or files whose steps count.
    """

    seeds: Callable[[], Iterable[bytes]]
    run: Callable[[bytes], object]
    mutate: Callable[[random.Random, bytes, bytes], bytes]
    refusals: tuple[type[Exception], ...]
    sources: tuple[str, ...]


@dataclass
class Session:
    """One target, its corpus in memory and on disk, and where crashes go."""

    target: Target
    crashes: Path
    corpus_folder: Path | None = None
    corpus: list[bytes] = field(default_factory=list)
    runs: int = 0
    found: list[Path] = field(default_factory=list)
    _covered: set[Any] = field(default_factory=set)

    def fuzz(self, seconds: float, runs: int, seed: int, report: Callable[[str], None] = lambda line: None) -> None:
        """Runs the seeds, the corpus on disk, and changed inputs until the time or the number of runs is used up."""
        self.crashes.mkdir(parents=True, exist_ok=True)
        rng = random.Random(seed)
        end = time.monotonic() + seconds
        for data in self._first():
            self.try_one(data, keep=True)
        said = time.monotonic()
        while self.runs < runs and time.monotonic() < end:
            one, other = rng.choice(self.corpus[-64:] if rng.random() < 0.3 else self.corpus), rng.choice(self.corpus)
            self.try_one(self.target.mutate(rng, one, other))
            if time.monotonic() > said + 30:
                said = time.monotonic()
                report(self.summary())
        report(self.summary())

    def summary(self) -> str:
        """What was done so far."""
        return f"{self.runs} runs, {len(self.corpus)} inputs, {len(self._covered)} steps, {len(self.found)} crashes"

    def try_one(self, data: bytes, keep: bool = False) -> None:
        """Runs one input and keeps it if it is new, or if it crashed."""
        self.runs += 1
        running = self.crashes / "running"
        running.write_bytes(data)
        steps, failure = observe(self.target, data)
        running.unlink()
        if failure is not None:
            name = hashlib.sha1(data).hexdigest()[:16]
            # One of each kind is enough to mend it.
            if ("crash", failure.splitlines()[-1], _place(failure)) not in self._covered:
                self.found.append(self.crashes / name)
                self.found[-1].write_bytes(data)
                (self.crashes / f"{name}.txt").write_text(failure)
                self._covered.add(("crash", failure.splitlines()[-1], _place(failure)))
            return
        if keep or not steps <= self._covered:
            self.corpus.append(data)
            if self.corpus_folder is not None:
                (self.corpus_folder / hashlib.sha1(data).hexdigest()[:16]).write_bytes(data)
        self._covered |= steps

    def _first(self) -> list[bytes]:
        first = list(self.target.seeds())
        if self.corpus_folder is not None:
            self.corpus_folder.mkdir(parents=True, exist_ok=True)
            first += [file.read_bytes() for file in sorted(self.corpus_folder.iterdir())]
        return first


def observe(target: Target, data: bytes) -> tuple[set[Any], str | None]:
    """The steps that an input takes, and the traceback if it fails in another way than by a refusal in a sentence."""
    steps: set[Any] = set()

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            code = frame.f_code
            steps.add((code.co_filename, frame.f_lineno, last.get(code)))
            last[code] = frame.f_lineno
        return local

    def begin(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(target.sources):
            return None
        last[code] = 0
        return local

    def out_of_time(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {SECONDS} seconds")

    last: dict[Any, int] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    sys.settrace(begin)
    try:
        steps.add(("came to", target.run(data)))
    except target.refusals as error:
        if not _is_sentence(str(error)):
            return steps, traceback.format_exc()
    except (Exception, Hang):
        return steps, traceback.format_exc()
    finally:
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if grown > MEMORY:
        return steps, f"MemoryError: {grown >> 20} MiB for {len(data)} bytes\n"
    return steps, None


def _is_sentence(text: str) -> bool:
    """Whether an error says the rule and what came."""
    return "must " in text and ", got " in text


def _place(failure: str) -> str:
    """The line of the project, or of the library it called, that failed."""
    return next((line for line in reversed(failure.splitlines()) if line.startswith("  File ")), "")
