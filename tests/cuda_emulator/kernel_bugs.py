"""Bugs put into copies of the real CUDA kernels, which the kernels' own emulated tests must notice.

    python tests/cuda_emulator/kernel_bugs.py [--kernels csr_matmul,sign_pack] [--quick] [--out FILE]

A bug is a piece of a kernel's source, which occurs there once, and what a mistaken author would have written
(`seeded_kernel_bugs.py`). All bugs of one source are compiled into one copy of it, each behind a switch
(`kernel_bugs.h`), so that a kernel costs one compilation. The copy takes the kernel's place in its test program, which
must pass with no bug chosen and fail with each. `kernel_mutants.py` makes bugs by rule instead.

Needs the kernel tests, built by `make test-kernels`.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

import seeded_kernel_bugs

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels"
# Tests whose name is not that of the kernel's source.
TESTS = {
    "bitmap_tiles": "bitmap_matmul",
    "codebook_few": "codebook_matmul",
    "codebook_tiles": "codebook_matmul",
    "conv_fragments": "sparse_conv2d",
}


@dataclasses.dataclass(frozen=True)
class Span:
    """Text put before and after source[start:end]."""

    start: int
    end: int
    before: str
    after: str = ""


def insert(source: str, spans: list[Span]) -> str:
    """Source with all spans, the wider ones outside."""
    opened: dict[int, list[Span]] = collections.defaultdict(list)
    closed: dict[int, list[Span]] = collections.defaultdict(list)
    for span in spans:
        opened[span.start].append(span)
        if span.after:
            closed[span.end].append(span)
    pieces, begin = [], 0
    for at in sorted({*opened, *closed}):
        pieces.append(source[begin:at])
        pieces += [span.after for span in sorted(closed[at], key=lambda s: s.end - s.start)]
        pieces += [span.before for span in sorted(opened[at], key=lambda s: s.start - s.end)]
        begin = at
    return "".join([*pieces, source[begin:]])


class KernelTest:
    """The test program of csrc/kernels/*/{kernel}_cuda.cu, to be built with changed copies of sources."""

    def __init__(self, kernel: str, build: pathlib.Path) -> None:
        self.kernel, self.build = kernel, build
        (self.source,) = KERNELS.glob(f"*/{kernel}_cuda.cu")
        self.test = f"test_{TESTS.get(kernel, kernel)}_cuda_emulated"
        target = f"tests/cuda_emulator/{self.test}"
        listed = subprocess.run(
            ["ninja", "-C", build, "-t", "commands", target], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        (self.compile,) = [line for line in listed if line.endswith(f"-c {self.source}")]
        self.link = listed[-1]

    def make(self, folder: pathlib.Path, changed: dict[pathlib.Path, str], check_only: bool = False) -> str:
        """Builds folder/test from the sources with some of them changed; the compiler's complaint, or ''."""
        for path, text in changed.items():
            copy = folder / path.relative_to(ROOT / "csrc")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
        words = shlex.split(self.compile)
        source = folder / self.source.relative_to(ROOT / "csrc") if self.source in changed else self.source
        kept, skip = [], False
        for word in words:
            if skip or word in ("-MD", "-c", "-Werror"):
                skip = False
            elif word in ("-MT", "-MF", "-o"):
                skip = True
            elif word != str(self.source):
                kept.append(word)
        first_include = next(i for i, word in enumerate(kept) if word.startswith("-I"))
        header = pathlib.Path(__file__).with_suffix(".h")
        kept[first_include:first_include] = [f"-I{folder}"]
        command = [*kept, "-w", "-include", str(header), "-c", str(source)]
        command += ["-fsyntax-only"] if check_only else ["-o", str(folder / "kernel.o")]
        done = subprocess.run(command, cwd=self.build, capture_output=True, text=True)
        if done.returncode or check_only:
            return done.stderr if done.returncode else ""
        object_name = re.search(rf"\S+/{self.source.name}\.o", self.link)
        assert object_name is not None
        link = self.link.replace(object_name[0], str(folder / "kernel.o"))
        link = re.sub(r" -o \S+", f" -o {folder / 'test'}", link)
        subprocess.run(link, shell=True, check=True, cwd=self.build)
        return ""

    def run(self, folder: pathlib.Path, number: int, limit_s: float) -> tuple[str, float]:
        """How the test fails with a bug (the emulator's report, `result`, `crash` or `time`), or '', and seconds."""
        started = time.monotonic()
        environment = {**os.environ, "TERSETORCH_KERNEL_BUG": str(number)}
        process = subprocess.Popen(
            [folder / "test"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        killer = concurrent.futures.ThreadPoolExecutor(1).submit(self._wait, process, limit_s)
        line = next((line for line in process.stdout if line.startswith("FAILED")), "")
        if line:
            process.kill()
        process.stdout.close()
        late = killer.result()
        seconds = time.monotonic() - started
        if line:
            report = re.search(r"error \d+, ([\w-]+): ", line)
            return (report[1] if report else "result"), seconds
        return ("time" if late else "crash" if process.returncode else ""), seconds

    @staticmethod
    def _wait(process: "subprocess.Popen[str]", limit_s: float) -> bool:
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True
        return False


@dataclasses.dataclass(frozen=True)
class Outcome:
    bug: "seeded_kernel_bugs.Bug"
    report: str

    @property
    def right(self) -> bool:
        return self.report == self.bug.report


def switched(source: str, bug: "seeded_kernel_bugs.Bug", number: int) -> list[Span]:
    """The spans that put a bug behind its switch."""
    before, rest = bug.text.split("«")
    old, after = rest.split("»")
    if source.count(before + old + after) != 1:
        sys.exit(f"{bug.file}: {bug.text!r} must occur once, got {source.count(before + old + after)} times")
    start = source.index(before + old + after) + len(before)
    code = re.sub(r"//[^\n]*", "", old).rstrip()
    if code.endswith(";"):
        return [Span(start, start + len(old), f"if (kernel_bugs::Bug({number})) {{ {bug.mistake} }} else {{ ", "\n}")]
    return [Span(start, start + len(old), f"(kernel_bugs::Bug({number}) ? ({bug.mistake}) : (", "))")]


def try_kernel(kernel: str, bugs: list["seeded_kernel_bugs.Bug"], build: pathlib.Path) -> list[Outcome]:
    """Builds the kernel with its bugs, and runs its test without any and with each."""
    test = KernelTest(kernel, build)
    spans: dict[pathlib.Path, list[Span]] = collections.defaultdict(list)
    for number, bug in enumerate(bugs, start=1):
        path = KERNELS / bug.file
        spans[path] += switched(path.read_text(), bug, number)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        complaint = test.make(folder, {path: insert(path.read_text(), of_path) for path, of_path in spans.items()})
        if complaint:
            sys.exit(f"{kernel}: the bugs must compile, got\n{complaint[:3000]}")
        failure, seconds = test.run(folder, 0, 600)
        if failure:
            sys.exit(f"{kernel}: the test must pass without a bug, got {failure}")
        outcomes = []
        for number, bug in enumerate(bugs, start=1):
            report, taken = test.run(folder, number, 60 + 10 * seconds)
            outcomes.append(Outcome(bug, report))
            print(f"{bug.file}: {bug.why}: {report or 'NOT NOTICED'}, {taken:.1f} s", flush=True)
        return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default="", help="only these, separated by commas")
    parser.add_argument("--quick", action="store_true", help="only the kernels that compile fast")
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build" / sys.implementation.cache_tag)
    parser.add_argument("--out", type=pathlib.Path, help="write the outcomes there, a line for each bug")
    args = parser.parse_args()
    by_kernel: dict[str, list[seeded_kernel_bugs.Bug]] = collections.defaultdict(list)
    for bug in seeded_kernel_bugs.BUGS:
        by_kernel[bug.kernel].append(bug)
    for bug in seeded_kernel_bugs.BUGS:
        switched((KERNELS / bug.file).read_text(), bug, 0)  # must fit the sources
    names = [name for name in args.kernels.split(",") if name] or list(by_kernel)
    if args.quick:
        names = [name for name in names if name in seeded_kernel_bugs.QUICK]
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outcomes = [
            outcome
            for of_kernel in pool.map(lambda name: try_kernel(name, by_kernel[name], args.build), names)
            for outcome in of_kernel
        ]
    if args.out:
        lines = [f"{o.bug.file}: {o.bug.why}: {o.report or 'NOT NOTICED'}\n" for o in outcomes]
        args.out.write_text("".join(lines))
    print(f"{len(outcomes)} bugs in {len(names)} kernels, {time.monotonic() - started:.0f} s")
    wrong = [f"{o.bug.why}: must be {o.bug.report}, got {o.report or 'nothing'}" for o in outcomes if not o.right]
    if wrong:
        sys.exit("\n".join(["every bug must be noticed as what the list says:", *wrong]))


if __name__ == "__main__":
    main()
