"""Mistakes in PTX that a replay must notice: what a kernel's inline assembly, or a compiler, could get wrong."""

import re
from collections.abc import Callable
from dataclasses import replace

from ptx_interpreter.parse import Instruction, Kernel, Module, PtxError, instruction
from ptx_interpreter.recordings import Recording
from ptx_interpreter.replay import TOLERANCE, Name, Outcome, run

NOTHING = "membar.cta"
KERNELS = 3  # that each mistake is made in, where so many have what it takes
Replacement = str | Callable[[re.Match[str]], str]

# What, in which instructions, and what these become.
MISTAKES: list[tuple[str, str, Replacement]] = [
    ("registers of A swapped", r"(mma\S* \{[^}]*\}, \{)([^,]+),([^,]+),", r"\1\3,\2,"),
    ("halves of A swapped", r"(mma\S* \{[^}]*\}, \{)([^,]+),([^,]+),([^,]+),", r"\1\4,\3,\2,"),
    ("registers of B swapped", r"(mma\S* \{[^}]*\}, \{[^}]*\}, \{)([^,]+),([^}]+)\}", r"\1\3,\2}"),
    ("registers of D swapped", r"(mma\S* \{)([^,]+),([^,]+),", r"\1\3,\2,"),
    ("different ones for common ones", r"and\.popc", "xor.popc"),
    ("bytes without their sign in mma", r"\.s8\.s8\.s32", ".u8.s8.s32"),
    ("no wait for copies", r"cp\.async\.wait_group \d+", NOTHING),
    ("copies in no group", r"cp\.async\.commit_group", NOTHING),
    ("one group of copies not waited for", r"wait_group (\d+)", lambda match: f"wait_group {int(match[1]) + 1}"),
    ("a copy's source one further", r"(cp\.async\.c[ag]\S+ \[[^]]*\], \[[^]+]*)(\+\d+)?\], (\d+)", r"\1+\3], \3"),
    ("halves of a pair swapped", r"(cvt\.rn\.b?f16x2\.f32 \S+), (\S+), (\S+)", r"\1, \3, \2"),
    ("the mask of half a warp", r"(shfl\.sync\..*), [^,]+$", r"\1, 65535"),
    ("one distance for all", r"(shfl\.sync\.bfly\.b32 [^,]+, [^,]+), [^,]+,", r"\1, 8,"),
    ("bytes read without their sign", r"ld\.global\.s8", "ld.global.u8"),
    ("bytes without their sign in dp4a", r"dp4a\.s32\.s32", "dp4a.u32.s32"),
    ("bytes in another order", r"(prmt\.b32 [^,]+, [^,]+, [^,]+), \d+$", r"\1, 8961"),
    ("rounded to zero", r"cvt\.rni\.", "cvt.rzi."),
    ("the upper half one bit off", r"shr\.u64 (.*), 32$", r"shr.u64 \1, 31"),
    ("no guard of the rest of a kernel", r"^@!?%\w+ bra \S+$", NOTHING),
    ("one number too many", r"^setp\.ge\.s64", "setp.gt.s64"),
    ("a vector off its alignment", r"(ld\.global\S*\.v4\.\S+ \{[^}]*\}, \[[^]+]+)\]", r"\1+4]"),
    ("a field for another of the parameters", r"(ld\.param\.\S+ .*\+)8\]", r"\g<1>16]"),
    ("wider stores than the numbers", r"st\.global\.u8", "st.global.u16"),
    ("an atomic that forgets the others", r"atom\.global\.(add|or)", "atom.global.exch"),
]


def mistaken(pattern: str, replacement: Replacement, kernel: Kernel, reached: set[int]) -> Kernel | None:
    """The kernel with every instruction changed that the pattern meets; none if no launch executed such a one."""
    changed: dict[int, Instruction] = {}
    for pc, i in enumerate(kernel.code):
        text = re.sub(pattern, replacement, i.text)
        if text != i.text:
            changed[pc] = instruction(text)
            if pattern.startswith("^@") and changed.keys() & reached:
                break  # one guard: without all of them loops would not end
    if not changed.keys() & reached:
        return None
    return replace(kernel, code=[changed.get(pc, i) for pc, i in enumerate(kernel.code)])


def noticed(module: Module, kernel: Kernel, launches: list[Recording]) -> str | None:
    """What one of the launches shows of it."""
    for launch in launches:
        try:
            fused = run(module, kernel, launch, True)[1]
            if fused and run(module, kernel, launch, False)[1] > TOLERANCE and fused > TOLERANCE:
                return f"memory differs by {fused:.3g}"
        except PtxError as error:
            return str(error)
    return None


def make_all(
    kernels: dict[Name, tuple[Module, Kernel]], outcomes: dict[Name, Outcome], launches: list[Recording]
) -> list[tuple[str, Name, str | None]]:
    """What, where, and how it was noticed: each in the kernels whose launches execute least."""
    result = []
    by_cost = sorted((name for name in outcomes if outcomes[name].costs), key=lambda name: sum(outcomes[name].costs[0]))
    for what, pattern, replacement in MISTAKES:
        made = 0
        for name in by_cost:
            module, kernel = kernels[name]
            wrong = mistaken(pattern, replacement, kernel, outcomes[name].reached)
            if wrong is not None and made < KERNELS:
                made += 1
                costs = sorted(outcomes[name].costs, reverse=True)
                result.append((what, name, noticed(module, wrong, [launches[number] for _, number in costs])))
    return result
