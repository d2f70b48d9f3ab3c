"""What the kernels must come to: instructions by kernel and architecture, and nothing in local memory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .reading import Kernel

# CMakeLists.txt's, unless CUDAARCHS names others; the last one as PTX too, for later GPUs.
ARCHITECTURES = (75, 80, 86, 89, 90, 100)
NEWEST = 10_000


@dataclass(frozen=True)
class Expected:
    """Kernels whose names begin so (a regular expression) hold such an instruction on these architectures."""

    kernels: str
    opcode: str  # a pattern of fnmatch
    first: int = 80
    last: int = NEWEST


# A line for each kind of product. What a kernel holds and no line names fails too, as does a line that fits no kernel.
EXPECTED = (
    Expected("Codebook(Few|Tile)Kernel<.*BFloat16Fragments", "HMMA.16816.F32.BF16"),
    Expected("Codebook(Few|Tile)Kernel<.*Int8Fragments", "IMMA.16832.S8.S8"),
    Expected("CodebookTileKernel<", "LDGSTS*"),
    Expected("BitmapTileKernel<.*BFloat16Tiles", "HMMA.16816.F32.BF16"),
    Expected("BitmapTileKernel<.*Int8Tiles", "IMMA.16832.S8.S8"),
    Expected("BitmapTileKernel<", "LDGSTS*"),
    Expected("ConvFragmentsKernel<.*BFloat16Words", "HMMA.16816.F32.BF16"),
    Expected("ConvFragmentsKernel<.*Int8Words", "IMMA.16832.S8.S8"),
    Expected("ConvFragmentsKernel<", "LDGSTS*"),
    Expected("MultiplyNarrow<", "IMMA.16832.S8.S8"),
    # Where it is one instruction: not on sm_100.
    Expected("Xnor(Few|Many|ConvFragments)Kernel<", "BMMA.168256.AND.POPC", last=90),
    Expected("Xnor(Many|ConvFragments)Kernel<", "LDGSTS*"),
)
# (kernel, architecture) -> why it may use local memory.
EXPLAINED: dict[tuple[str, int], str] = {}


def problems(
    kernels: Iterable[Kernel],
    names: dict[str, str],
    *,
    architectures: Iterable[int] = ARCHITECTURES,
    in_sources: Iterable[str] = (),
    expected: tuple[Expected, ...] = EXPECTED,
    explained: dict[tuple[str, int], str] = EXPLAINED,
) -> list[str]:
    """What is wrong with the kernels of a library, a sentence each; `names` makes linker's names readable."""
    found: dict[str, dict[int, Kernel]] = {}
    for kernel in kernels:
        found.setdefault(names[kernel.name], {})[kernel.architecture] = kernel
    wrong = [
        f"{name} must be in the library, got a library without it; build it anew"
        for name in sorted(set(in_sources) - {name.split("<")[0] for name in found})
    ]
    wrong += [
        f"EXPECTED must fit the kernels, got {line.kernels!r}, which fits none; drop the line or mend it"
        for line in expected
        if not any(re.match(line.kernels, name) for name in found)
    ]
    for name, of_kernel in sorted(found.items()):
        if missing := sorted(set(architectures) - of_kernel.keys()):
            wrong.append(f"{name} must be compiled for {sorted(architectures)}, got none for {missing}")
        lines = [line for line in expected if re.match(line.kernels, name)]
        for architecture, kernel in sorted(of_kernel.items()):
            where = f"{name} on sm_{architecture}"
            if kernel.local and (name, architecture) not in explained:
                wrong.append(
                    f"{where} must not use local memory, or EXPLAINED says why, got {kernel.local} bytes a thread; "
                    "use fewer registers, or index arrays by constants"
                )
            if not kernel.threads:
                wrong.append(f"{where} must say __launch_bounds__, got none")
            due = [line.opcode for line in lines if line.first <= architecture <= line.last]
            wrong += [
                f"{where} must hold {opcode}, got {kernel.opcodes or 'no such instruction'}"
                for opcode in due
                if not any(fnmatchcase(held, opcode) for held in kernel.opcodes)
            ]
            wrong += [
                f"{where} holds {held}, which no line of EXPECTED names; add one"
                for held in kernel.opcodes
                if not any(fnmatchcase(held, opcode) for opcode in due)
            ]
    return wrong
