"""Executes a kernel: some blocks at a time, every thread of them a lane of numpy's arrays.

The lanes at the lowest instruction run first, so that paths that parted meet again. An instruction becomes a function
of lanes when it is first executed.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ptx_interpreter import accesses, arithmetic, computing, warps
from ptx_interpreter.arithmetic import TYPES
from ptx_interpreter.memory import CONSTANT_WINDOW, LOCAL_WINDOW, UNSIGNED, BlockMemory, GlobalMemory, Range
from ptx_interpreter.parse import BYTES, Instruction, Kernel, Module, PtxError, up_to
from ptx_interpreter.warps import WARP, Lanes

MOST_LANES = 4096

NOTHING = ("griddepcontrol", "membar", "fence", "nanosleep", "prefetch", "prefetchu")
SCHEDULING = ("bra", "brx", "ret", "exit", "bar", "barrier", "shfl", "vote", "redux", "mma", "ldmatrix")


class Launch:
    """A kernel with its grid, parameters and memory; ``run`` executes it."""

    def __init__(
        self,
        module: Module,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: bytes,
        memory: GlobalMemory,
        dynamic_bytes: int = 0,
        fuses: bool = True,
    ) -> None:
        """``fuses=False`` executes fma as a product and a sum, each rounded."""
        if len(parameters) != kernel.parameter_bytes:
            raise PtxError(f"parameters must be {kernel.parameter_bytes} bytes, got {len(parameters)}")
        if kernel.most_threads is not None and int(np.prod(block)) > kernel.most_threads:
            raise PtxError(f"a block must have at most {kernel.most_threads} threads, got {block}")
        self.module, self.kernel, self.grid, self.block = module, kernel, grid, block
        self.memory, self.dynamic_bytes, self.fuses = memory, dynamic_bytes, fuses
        self.parameters = Range("parameters", 0, parameters, read_only=True)
        self.constants: dict[str, int] = {}
        data, at = [], CONSTANT_WINDOW
        for name, value in module.constants.items():
            self.constants[name] = at
            data.append(Range(name, at, value))
            at += up_to(len(value), 256) + 256
        self.memory = GlobalMemory(memory.ranges + data) if data else memory
        self.executed: set[int] = set()  # instructions
        self.steps = 0  # instructions times threads

    def run(self) -> None:
        """All blocks."""
        x, y, z = self.grid
        blocks = [(i % x, i // x % y, i // x // y) for i in range(x * y * z)]
        together = max(1, MOST_LANES // up_to(int(np.prod(self.block)), WARP))
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), together):
                Blocks(self, np.array(blocks[first : first + together], np.uint32)).run()


class Blocks:
    """Blocks that are executed together."""

    def __init__(self, launch: Launch, indices: Any) -> None:
        self.launch, self.kernel, self.count = launch, launch.kernel, len(indices)
        x, y, z = launch.block
        self.threads = x * y * z
        self.pitch = up_to(self.threads, WARP)
        total = self.count * self.pitch
        self.number = np.arange(total) % self.pitch  # in its block
        self.block_of = np.arange(total) // self.pitch
        every = np.flatnonzero(self.number < self.threads)
        self.alive = self.number < self.threads
        self.groups: dict[int, Lanes] = {0: every}  # runnable, by instruction
        self.parked: dict[int, Lanes] = {}  # wait in a warp for lanes that are elsewhere
        self.waiting = np.full(total, -1)  # at the barrier that is this instruction
        self.votes = np.zeros(total, bool)  # of a barrier that counts them
        self.everyone = len(every)
        self.registers: dict[str, Any] = {}
        self.special = {
            **{f"%tid.{axis}": value for axis, value in zip("xyz", self.thread_indices(x, y), strict=True)},
            **{f"%ctaid.{axis}": indices[self.block_of, i] for i, axis in enumerate("xyz")},
            **{f"%ntid.{axis}": np.full(total, n, np.uint32) for axis, n in zip("xyz", launch.block, strict=True)},
            **{f"%nctaid.{axis}": np.full(total, n, np.uint32) for axis, n in zip("xyz", launch.grid, strict=True)},
            "%laneid": (self.number % WARP).astype(np.uint32),
            "%warpid": (self.number // WARP).astype(np.uint32),
        }
        shared_bytes = self.kernel.shared_bytes + launch.dynamic_bytes
        self.shared = BlockMemory("shared memory", shared_bytes, self.count)
        self.local = BlockMemory("local memory", self.kernel.local_bytes, total)
        self.copies: list[tuple[Lanes, Any, Any, Any, int]] = []  # lanes, groups, addresses, bytes [lanes, n], n
        self.group = np.zeros(total, np.int64)  # of copies that each thread is at
        self.code: list[tuple[str, Any] | None] = [None] * len(self.kernel.code)

    def thread_indices(self, x: int, y: int) -> Iterator[Any]:
        """Along each axis."""
        yield (self.number % x).astype(np.uint32)
        yield (self.number // x % y).astype(np.uint32)
        yield (self.number // (x * y)).astype(np.uint32)

    # ---- which lanes run

    def run(self) -> None:
        """Until all threads have exited."""
        while True:
            while self.groups:
                pc = min(self.groups)
                self.execute(pc, self.groups.pop(pc))
            if self.parked:
                self.complain_of_parked()
            if not self.alive.any():
                return
            self.release_barriers()

    def enter(self, pc: int, lanes: Lanes) -> None:
        """Makes lanes runnable."""
        if len(lanes):
            others = self.groups.get(pc)
            self.groups[pc] = lanes if others is None else np.union1d(others, lanes)

    def execute(self, pc: int, lanes: Lanes) -> None:
        """Runs lanes until they part, wait, or reach an instruction where others are."""
        stop = min(self.groups, default=len(self.code))
        where = self.selection(lanes)
        executed, count = self.launch.executed, 0
        while True:
            if pc >= stop:
                break
            decoded = self.code[pc]
            if decoded is None:
                decoded = self.code[pc] = self.decode(self.kernel.code[pc])
                executed.add(pc)
            kind, run = decoded
            count += len(lanes)
            if kind == "plain":
                run(where)
                pc += 1
            elif kind == "lanes":
                run(lanes)
                pc += 1
            else:
                self.launch.steps += count
                return run(pc, lanes)
        self.launch.steps += count
        self.enter(pc, lanes)
        return None

    def selection(self, lanes: Lanes) -> Any:
        """An index of the lanes' registers; of more where those are of nobody."""
        if len(lanes) == self.everyone:
            return slice(None)
        return slice(lanes[0], lanes[-1] + 1) if lanes[-1] - lanes[0] + 1 == len(lanes) else lanes

    def decode(self, i: Instruction) -> tuple[str, Any]:
        """How an instruction is executed."""
        try:
            kind, run = self.decode_unguarded(i)
        except PtxError as error:
            raise PtxError(f"instruction not modelled: {i.text}: {error}") from None
        if i.guard is None or i.name in SCHEDULING:
            return kind, run
        holds = self.guard(i)

        def guarded(lanes: Lanes) -> None:
            on = lanes[holds(lanes)]
            if len(on):
                run(on)

        return "lanes", guarded

    def guard(self, i: Instruction) -> Callable[[Lanes], Any]:
        """Which of the lanes execute it."""
        if i.guard is None:
            return lambda lanes: np.ones(len(lanes), bool)
        register, negated = self.register(i.guard[0]), i.guard[1]
        return (lambda lanes: ~register[lanes]) if negated else (lambda lanes: register[lanes])

    def decode_unguarded(self, i: Instruction) -> tuple[str, Any]:
        """Plain instructions take any index of registers, those of memory and warps the lanes."""
        if i.name in NOTHING:
            return "plain", lambda where: None
        if i.name in ("bra", "brx"):
            return "branch", self.branch(i)
        if i.name in ("ret", "exit"):
            return "exit", self.leave(i)
        if i.name in ("bar", "barrier") and "warp" not in i.modifiers:
            return "barrier", self.barrier(i)
        if i.name == "bar" or i.name in SCHEDULING:
            return "warp", warps.warp_instruction(self, i)
        if i.name in ("ld", "st", "atom", "red"):
            return "lanes", accesses.memory_instruction(self, i)
        if i.name == "cp" and i.modifiers[:1] == ["async"]:
            return "lanes", accesses.copy(self, i)
        if i.name == "setp":
            return "plain", computing.comparison(self, i)
        if i.name == "cvta":
            return "plain", computing.generic(self, i)
        if i.name == "mov" and any(operand.startswith("{") for operand in i.operands):
            return "plain", computing.pack(self, i)
        if i.name in arithmetic.MAKERS:
            return "plain", computing.computation(self, i)
        raise PtxError("unknown opcode")

    # ---- branches and barriers

    def branch(self, i: Instruction) -> Any:
        """Lanes part where a guard differs; brx.idx takes each lane's target from a list."""
        if i.name == "brx":
            index = self.read(i.operands[0], "u32")
            targets = [self.kernel.labels[label] for label in self.kernel.targets[i.operands[1]]]

            def jump(pc: int, lanes: Lanes) -> None:
                chosen = index(lanes)
                if (chosen >= len(targets)).any():
                    raise PtxError(f"{i.text}: there are {len(targets)} targets")
                for number in np.unique(chosen).tolist():
                    self.enter(targets[number], lanes[chosen == number])

            return jump
        target, holds = self.kernel.labels[i.operands[0]], self.guard(i)

        def run(pc: int, lanes: Lanes) -> None:
            taken = holds(lanes)
            self.enter(target, lanes[taken])
            self.enter(pc + 1, lanes[~taken])

        return run

    def leave(self, i: Instruction) -> Any:
        """Threads end."""
        holds = self.guard(i)

        def run(pc: int, lanes: Lanes) -> None:
            gone = holds(lanes)
            self.alive[lanes[gone]] = False
            self.enter(pc + 1, lanes[~gone])

        return run

    def barrier(self, i: Instruction) -> Any:
        """Lanes wait until the whole block is at this instruction."""
        modifiers = [m for m in i.modifiers if m not in ("cta", "aligned")]
        reduces = modifiers[0] == "red"
        operands = i.operands[1:] if reduces else i.operands
        if i.guard or operands[0] != "0" or len(operands) != (2 if reduces else 1):
            raise PtxError("only barrier 0 of the whole block is modelled")
        if modifiers not in (["sync"], ["red", "or", "pred"], ["red", "and", "pred"], ["red", "popc", "u32"]):
            raise PtxError("unknown barrier")
        negated = reduces and operands[1].startswith("!")
        vote = self.read(operands[1].lstrip("!"), "pred") if reduces else None

        def run(pc: int, lanes: Lanes) -> None:
            if vote is not None:
                self.votes[lanes] = vote(lanes) ^ negated
            self.waiting[lanes] = pc

        return run

    def release_barriers(self) -> None:
        """Of the blocks that wait as a whole; all that are not done do, for nothing runs."""
        for block in range(self.count):
            lanes = np.arange(block * self.pitch, block * self.pitch + self.threads)
            at, alive = self.waiting[lanes], self.alive[lanes]
            if not alive.any():
                continue
            pc = int(at.max())
            text = self.kernel.code[pc].text
            if not alive.all():
                raise PtxError(f"{text}: {(~alive).sum()} threads of the block have exited")
            if (at != pc).any():
                raise PtxError(f"{text}: other threads of the block wait at {self.kernel.code[int(at.min())].text}")
            i = self.kernel.code[pc]
            if "red" in i.modifiers:
                votes = self.votes[lanes]
                kind = next(m for m in i.modifiers if m in ("or", "and", "popc"))
                result = {"or": votes.any(), "and": votes.all(), "popc": votes.sum()}[kind]
                self.write(i.operands[0], "u32" if kind == "popc" else "pred")(lanes, result)
            self.waiting[lanes] = -1
            self.enter(pc + 1, lanes)

    def complain_of_parked(self) -> None:
        """Nothing runs any more, but lanes wait for others of their warp."""
        pc, lanes = next(iter(self.parked.items()))
        raise PtxError(
            f"{self.kernel.code[pc].text}: lanes of the mask never come; here are {sorted(set(lanes % WARP))}"
        )

    # ---- operands

    def register(self, name: str) -> Any:
        """The array of a register; made when it is first named."""
        array = self.registers.get(name)
        if array is None:
            of = self.kernel.registers.get(name) or self.kernel.registers.get(re.sub(r"\d+$", "", name))
            if of is None:
                raise PtxError(f"unknown register {name}")
            dtype = np.dtype(bool) if of == "pred" else UNSIGNED[BYTES[of]]
            array = self.registers[name] = np.zeros(self.count * self.pitch, dtype)
        return array

    def read(self, operand: str, of: str) -> Callable[[Any], Any]:
        """The function that gives an operand of some lanes as this type; constants are arrays of one."""
        dtype = TYPES[of]
        array = None
        if operand in self.special:
            array = self.special[operand]
        elif operand.startswith("%"):
            array = self.register(operand)
        if array is None:
            constant = self.constant(operand, of)
            return lambda where: constant
        if array.dtype.itemsize == dtype.itemsize:
            return array.view(dtype).__getitem__  # type: ignore[no-any-return]
        if array.dtype.itemsize < dtype.itemsize:
            raise PtxError(f"{operand} is narrower than {of}")
        narrow = UNSIGNED[dtype.itemsize]
        return lambda where: array[where].astype(narrow).view(dtype)

    def constant(self, operand: str, of: str) -> Any:
        """A number, or the place of a variable."""
        dtype = TYPES[of]
        if dtype.kind == "f" or operand[:2] in ("0f", "0d"):
            bits = np.array([int(operand[2:], 16)], np.uint64)
            value = bits.astype(np.uint32).view(np.float32) if operand.startswith("0f") else bits.view(np.float64)
            return value.astype(dtype) if dtype.kind == "f" else bits.astype(dtype)
        if dtype.kind == "b":
            return np.array([int(operand) != 0])
        if re.match(r"-?\d", operand):
            value = int(operand.rstrip("U"), 0)
        elif operand in self.kernel.parameters:
            value = self.kernel.parameters[operand]
        elif operand in self.kernel.shared:
            value = self.kernel.shared[operand]
        elif operand in self.kernel.local:
            value = LOCAL_WINDOW + self.kernel.local[operand]
        elif operand in self.launch.constants:
            value = self.launch.constants[operand]
        elif operand == "WARP_SZ":
            value = WARP
        else:
            raise PtxError(f"unknown operand {operand}")
        unsigned = np.array([value & (1 << 8 * dtype.itemsize) - 1], np.uint64)
        return unsigned.astype(UNSIGNED[dtype.itemsize]).view(dtype)

    def write(self, operand: str, of: str) -> Callable[[Any, Any], None]:
        """The function that sets a register of some lanes to values of this type; wider ones are extended."""
        if operand == "_":
            return lambda where, values: None
        array, dtype = self.register(operand), TYPES[of]
        if array.dtype.itemsize < dtype.itemsize:
            raise PtxError(f"{operand} is narrower than {of}")
        if array.dtype.itemsize > dtype.itemsize and dtype.kind == "f":
            raise PtxError(f"{operand} is wider than {of}")
        if array.dtype != bool:
            array = array.view(f"{dtype.kind}{array.dtype.itemsize}")
        return array.__setitem__  # type: ignore[no-any-return]
