"""Launches that the emulator wrote down (tests/cuda_emulator/launch_recorder.cpp), and what kernels they were of."""

import bisect
import functools
import json
import re
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ptx_interpreter.parse import PtxError


@dataclass
class Memory:
    """An array before and after the launch."""

    name: str
    begin: int
    read_only: bool
    before: bytes
    after: bytes


@dataclass
class Recording:
    """A launch: kernels are named by source file and mangled name without what differs between compilers."""

    kernel: tuple[str, str]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_bytes: int
    parameters: bytes
    memory: list[Memory]


def without_hashes(mangled: str) -> str:
    """A mangled name with one name for anonymous namespaces; nvcc's and g++'s differ there."""
    result, at = "", 0
    for match in re.finditer(r"(\d+)(_GLOBAL__N_|_INTERNAL_)", mangled):
        if match.start() < at:
            continue
        # The digits of the length may follow other digits: the longest that fits is not known, the name is.
        length = next(
            (int(match[1][k:]) for k in range(len(match[1])) if match.end(1) + int(match[1][k:]) <= len(mangled)), 0
        )
        result += mangled[at : match.start()] + "12_GLOBAL__N_1"
        at = match.end(1) + length
    return result + mangled[at:]


def read(path: Path) -> Iterator[Recording]:
    """All launches of a file."""
    with path.open("rb") as file:
        while line := file.readline():
            head = json.loads(line)
            parameters = file.read(head["parameter_bytes"])
            before = [file.read(memory["bytes"]) for memory in head["memory"]]
            after = [file.read(memory["bytes"]) for memory in head["memory"]]
            if after and len(after[-1]) != head["memory"][-1]["bytes"]:
                raise PtxError(f"{path} is cut off")
            yield Recording(
                kernel_at(head["program"], head["address"]),
                tuple(head["grid"]),
                tuple(head["block"]),
                head["dynamic_bytes"],
                parameters,
                [
                    Memory(memory["name"], memory["begin"], memory["read_only"], *data)
                    for memory, *data in zip(head["memory"], before, after, strict=True)
                ],
            )


def kernel_at(program: str, address: int) -> tuple[str, str]:
    """The source file and the name of a function."""
    addresses, names = functions(program)
    index = bisect.bisect_left(addresses, address)
    if index == len(addresses) or addresses[index] != address:
        raise PtxError(f"{program} has no function at {address:#x}: it was built anew after its launches were recorded")
    return names[index]


@functools.cache
def functions(program: str) -> tuple[list[int], list[tuple[str, str]]]:
    """The functions of an ELF64 file by address; a local symbol follows that of its source file."""
    data = Path(program).read_bytes()
    (sections,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, sections + size * i) for i in range(count)]
    found = []
    for header in headers:
        if header[1] != 2:  # symbols
            continue
        texts = headers[header[6]][4]
        source = ""
        for at in range(header[4], header[4] + header[5], 24):
            name, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", data, at)
            begin = texts + name
            text = data[begin : data.index(b"\0", begin)].decode()
            if info & 15 == 4:
                source = Path(text).stem
            elif info & 15 == 2 and value:
                found.append((value, (source, without_hashes(text))))
    found.sort()
    return [address for address, _ in found], [name for _, name in found]


def readable(names: list[str]) -> list[str]:
    """Of mangled names, without namespaces and parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = []
    for name in text.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|tersetorch::|^void ", "", name)
        plain.append(name[: name.index("(")] if "(" in name else name)
    return plain
