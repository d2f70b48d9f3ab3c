"""Tables of what nvcc made of the kernels, as .ci/check_cuda_kernels stores it, for docs/cuda_kernels.md."""

from __future__ import annotations

from typing import Any

from ..markdown import markdown

Record = dict[str, Any]
LETTERS = {"warps": "", "blocks": " b", "registers": " r", "shared memory": " s"}


def resources(stored: Record) -> str:
    """A row a kernel: of its variants, on each architecture, the one that fills a multiprocessor the least."""
    architectures = _architectures(stored)
    rows = []
    for (op, kernel), variants in _by_kernel(stored).items():
        threads = _range(variant["threads"] for variant in variants)
        shared = _range(max(on["shared"] for on in variant["on"].values()) for variant in variants)
        if any(variant["dynamic"] for variant in variants):
            shared = "dynamic"
        cells = []
        for architecture in architectures:
            worst = min(
                (variant["on"][architecture] for variant in variants if architecture in variant["on"]),
                key=lambda on: (on["occupancy"], -on["registers"]),
            )
            cells.append(f"{worst['registers']}, {100 * worst['occupancy']:.0f} %{LETTERS[worst['limit']]}")
        rows.append((op, kernel, len(variants), threads, shared, *cells))
    head = ("op", "kernel", "variants", "threads", "shared, bytes", *(f"sm_{name}" for name in architectures))
    return markdown(head, rows)


def opcodes(stored: Record) -> str:
    """A row for each kernel and instruction: how many of them a variant holds, and where."""
    rows = []
    for (op, kernel), variants in _by_kernel(stored).items():
        held: dict[str, dict[str, list[int]]] = {}
        for variant in variants:
            for architecture, on in variant["on"].items():
                for opcode, count in on.get("opcodes", {}).items():
                    held.setdefault(opcode, {}).setdefault(architecture, []).append(count)
        for opcode, counts in sorted(held.items()):
            of_variants = max(len(of_one) for of_one in counts.values())
            least_to_most = _range(count for of_one in counts.values() for count in of_one)
            where = ", ".join(f"sm_{name}" for name in sorted(counts, key=int))
            rows.append((op, kernel, f"`{opcode}`", f"{of_variants} of {len(variants)}", least_to_most, where))
    return markdown(("op", "kernel", "instruction", "variants", "in one variant", "architectures"), rows)


def compiler(stored: Record) -> str:
    """Which nvcc, and for what."""
    names = ", ".join(f"sm_{name}" for name in _architectures(stored))
    ptx = ", ".join(f"compute_{name}" for name in stored["ptx"])
    kernels = stored["kernels"]
    local = sum(on["local"] > 0 for kernel in kernels for on in kernel["on"].values())
    return (
        f"nvcc {stored['nvcc']}, {len(kernels)} kernels on {names}, and as PTX of {ptx} for later GPUs; "
        f"{local or 'none'} of them with registers spilled.\n"
    )


def _by_kernel(stored: Record) -> dict[tuple[str, str], list[Record]]:
    found: dict[tuple[str, str], list[Record]] = {}
    for kernel in stored["kernels"]:
        key = kernel["source"].removesuffix("_cuda"), kernel["kernel"].split("<")[0]
        found.setdefault(key, []).append(kernel)
    return found


def _architectures(stored: Record) -> list[str]:
    return sorted({name for kernel in stored["kernels"] for name in kernel["on"]}, key=int)


def _range(numbers: Any) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
