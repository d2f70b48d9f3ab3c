"""Replays recorded launches on PTX and compares what each leaves in memory with what the emulator left."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ptx_interpreter import recordings
from ptx_interpreter.machine import Blocks, Launch
from ptx_interpreter.memory import GlobalMemory, Range
from ptx_interpreter.parse import Kernel, Module, PtxError, parse

# Of the largest number in its array: what fused products may change where only some products of a kernel are.
TOLERANCE = 2.0**-18
# What a kernel for tensor cores lacks where it was compiled for an architecture without: nobody launches it there.
TENSOR_CORES = {"mma", "cp", "ldmatrix"}
Name = tuple[str, str]  # source file, and mangled name without hashes


@dataclass
class Outcome:
    """Of one kernel."""

    launches: int = 0
    executed: int = 0  # instructions times threads
    reached: set[int] = field(default_factory=set)
    how: set[str] = field(default_factory=set)
    worst: float = 0.0
    problems: list[str] = field(default_factory=list)
    costs: list[tuple[int, int]] = field(default_factory=list)  # what each launch executed, and which it was


def load(folder: Path, sources: set[str]) -> dict[Name, tuple[Module, Kernel]]:
    """The kernels of csr_matmul_cuda.ptx or, out of an object, csr_matmul_cuda.cu.1.sm_90.ptx."""
    kernels = {}
    for file in sorted(folder.glob("*.ptx")):
        if file.name.split(".")[0] not in sources:  # left from one that is gone
            continue
        module = parse(file.read_text())
        for kernel in module.kernels.values():
            kernels[file.name.split(".")[0], recordings.without_hashes(kernel.name)] = module, kernel
    return kernels


def unknown_instructions(module: Module, kernel: Kernel) -> list[str]:
    """Of the whole kernel, whether launches come by or not."""
    launch = Launch(module, kernel, (1, 1, 1), (1, 1, 1), bytes(kernel.parameter_bytes), GlobalMemory([]))
    block, problems = Blocks(launch, np.zeros((1, 3), np.uint32)), []
    for i in kernel.code:
        try:
            block.decode(i)
        except PtxError as error:
            problems.append(str(error))
    return problems


def run(module: Module, kernel: Kernel, recording: recordings.Recording, fuses: bool) -> tuple[Launch, float]:
    """The launch, and by how much it differs from the recorded one."""
    memory = GlobalMemory([Range(m.name, m.begin, m.before, m.read_only) for m in recording.memory])
    launch = Launch(
        module, kernel, recording.grid, recording.block, recording.parameters, memory, recording.dynamic_bytes, fuses
    )
    launch.run()
    wanted = {m.begin: np.frombuffer(m.after, np.uint8) for m in recording.memory}
    return launch, max((difference(r.data, wanted[r.begin]) for r in memory.ranges), default=0.0)


def difference(got: Any, want: Any) -> float:
    """Between arrays of bytes whose type nobody names, relative to the largest number: 0 if their bits agree, all NaN
    being the same; inf if they cannot be floats. Of halves, one in the last bit counts as TOLERANCE.
    """
    if (got == want).all():
        return 0.0
    padding = np.zeros(-got.size % 4, np.uint8)
    a, b = (np.concatenate([x, padding]).view(np.uint32) for x in (got, want))
    numbers = b.view(np.float32)
    largest = float(np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0))
    a, b = (x[a != b] for x in (a, b))
    x, y = a.view(np.float32), b.view(np.float32)
    halves = a.view(np.uint16).reshape(-1, 2), b.view(np.uint16).reshape(-1, 2)
    sizes = [half & 0x7FFF for half in halves]
    both_nan = np.isnan(x) & np.isnan(y)
    for infinity in (0x7F80, 0x7C00):  # of bfloat16 and of float16
        nan = (sizes[0] > infinity) & (sizes[1] > infinity)
        both_nan |= (nan | (halves[0] == halves[1])).all(1)
    # Small integers are no normal floats: what differs in them is wrong.
    normal = [(np.abs(z) >= 2.0**-126) & np.isfinite(z) for z in (x, y)]
    as_floats = np.where(normal[0] & normal[1], np.abs(x.astype(float) - y) / max(largest, 2.0**-126), np.inf)
    plausible = [((size >= 0x0400) & (size < 0x7C00)).all(1) for size in sizes]
    last_bit = (np.abs(halves[0].astype(int) - halves[1]) <= 1).all(1) & plausible[0] & plausible[1]
    distance = np.where(last_bit, np.minimum(as_floats, TOLERANCE), as_floats)
    return float(np.where(both_nan, 0.0, distance).max(initial=0.0))


def replay(module: Module, kernel: Kernel, recording: recordings.Recording, outcome: Outcome, number: int) -> None:
    """Adds a launch. Its bits must agree, either with products fused as a GPU does, or as the source says; where fused
    products are mixed with ones that the source itself fuses, neither need be so, and floats may differ by TOLERANCE.
    """
    outcome.launches += 1
    try:
        launch, worst = run(module, kernel, recording, fuses=True)
        outcome.executed += launch.steps
        outcome.costs.append((launch.steps, number))
        outcome.reached |= launch.executed
        how = "fused"
        if not any(kernel.code[pc].name == "fma" for pc in launch.executed):
            how = "bits"
            worst = np.inf if worst else 0.0
        elif worst:
            unfused = run(module, kernel, recording, fuses=False)[1]
            how, worst = ("unfused", 0.0) if unfused == 0 else ("near", worst)
    except PtxError as error:
        outcome.problems.append(f"{recording.grid} x {recording.block}: {error}")
        return
    outcome.how.add(how)
    outcome.worst = max(outcome.worst, worst)
    if worst > TOLERANCE:
        outcome.problems.append(
            f"{recording.grid} x {recording.block}: memory differs by {worst:.3g} from the emulator's"
        )


def tensor_cores(kernel: Kernel) -> set[str]:
    """What it holds of that."""
    return {i.name for i in kernel.code} & TENSOR_CORES


def replay_all(
    kernels: dict[Name, tuple[Module, Kernel]], launches: list[recordings.Recording]
) -> tuple[dict[Name, Outcome], list[str]]:
    """Of every kernel; and what is wrong besides."""
    outcomes: dict[Name, Outcome] = {}
    problems = []
    for number, recording in enumerate(launches):
        if recording.kernel not in kernels:
            problems.append(f"{recording.kernel[0]}: PTX lacks {recordings.readable([recording.kernel[1]])[0]}")
            continue
        replay(*kernels[recording.kernel], recording, outcomes.setdefault(recording.kernel, Outcome()), number)
    return outcomes, problems
