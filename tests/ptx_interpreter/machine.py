"""Executes a kernel: some blocks at a time, every thread of them a lane of numpy's arrays.

The lanes at the lowest instruction run first, so that paths that parted meet again. An instruction becomes a function of
lanes when it is first executed.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ptx_interpreter import arithmetic, fragments
from ptx_interpreter.arithmetic import TYPES
from ptx_interpreter.memory import (
    CONSTANT_WINDOW,
    LOCAL_WINDOW,
    SHARED_WINDOW,
    UNSIGNED,
    BlockMemory,
    GlobalMemory,
    Range,
)
from ptx_interpreter.parse import BYTES, Instruction, Kernel, Module, PtxError, up_to

WARP = 32
MOST_LANES = 4096
Lanes = Any  # sorted numbers of lanes
Run = Callable[[Lanes], None]

SPACES = ("global", "shared", "local", "param", "const")
# How caches and the order of memory are used: nothing that one thread after the other could see.
HINTS = re.compile(
    r"nc|volatile|relaxed|acquire|release|acq_rel|weak|cta|gpu|sys|ca|cg|cs|lu|cv|wb|wt|L[12](::.*)?|evict_\w+|no_allocate"
)
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
            return "warp", self.warp_instruction(i)
        if i.name in ("ld", "st", "atom", "red"):
            return "lanes", self.memory_instruction(i)
        if i.name == "cp" and i.modifiers[:1] == ["async"]:
            return "lanes", self.copy(i)
        if i.name == "setp":
            return "plain", self.comparison(i)
        if i.name == "cvta":
            return "plain", self.generic(i)
        if i.name == "mov" and any(operand.startswith("{") for operand in i.operands):
            return "plain", self.pack(i)
        if i.name in arithmetic.MAKERS:
            return "plain", self.computation(i)
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

    # ---- warps

    def warp_instruction(self, i: Instruction) -> Any:
        """Runs where all lanes of the mask have come; else these wait for the others."""
        holds = self.guard(i)
        make, mask = self.warp_operation(i)

        def run(pc: int, lanes: Lanes) -> None:
            on = holds(lanes)
            self.enter(pc + 1, lanes[~on])
            lanes = lanes[on]
            if pc in self.parked:
                lanes = np.union1d(lanes, self.parked.pop(pc))
            if not len(lanes):
                return
            warp, lane = lanes // WARP, lanes % WARP
            masks = mask(lanes)
            bit = np.uint32(1) << lane.astype(np.uint32)
            if not (masks & bit).all():
                raise PtxError(f"{i.text}: a lane is not in its own mask")
            # The lanes that are here with each one's mask.
            here = np.zeros(self.count * self.pitch // WARP, np.uint32)
            np.bitwise_or.at(here, warp, bit)
            missing = masks & ~here[warp]
            if not missing.any():
                first = np.zeros(len(here), np.uint32)
                first[warp] = masks
                if (first[warp] != masks).any() and self.disagree(warp, masks):
                    raise PtxError(f"{i.text}: lanes of a warp give different masks")
                make(lanes)
                self.enter(pc + 1, lanes)
                return
            alive = np.zeros(len(here), np.uint32)
            living = np.flatnonzero(self.alive)
            np.bitwise_or.at(alive, living // WARP, np.uint32(1) << (living % WARP).astype(np.uint32))
            if (masks & ~alive[warp]).any():
                raise PtxError(f"{i.text}: the mask names lanes that have exited or do not exist")
            incomplete = np.unique(warp[missing != 0])
            waits = np.isin(warp, incomplete)
            self.parked[pc] = lanes[waits]
            if not waits.all():
                make(lanes[~waits])
                self.enter(pc + 1, lanes[~waits])

        return run

    @staticmethod
    def disagree(warp: Any, masks: Any) -> bool:
        """Whether two masks of a warp overlap without being equal."""
        for w in np.unique(warp):
            different = np.unique(masks[warp == w])
            if any(a & b for k, a in enumerate(different) for b in different[k + 1 :]):
                return True
        return False

    def complain_of_parked(self) -> None:
        """Nothing runs any more, but lanes wait for others of their warp."""
        pc, lanes = next(iter(self.parked.items()))
        raise PtxError(
            f"{self.kernel.code[pc].text}: lanes of the mask never come; here are {sorted(set(lanes % WARP))}"
        )

    def warp_operation(self, i: Instruction) -> tuple[Run, Callable[[Lanes], Any]]:
        """What it does to lanes whose masks are complete, and the masks."""

        def whole(lanes: Lanes) -> Any:
            return np.full(len(lanes), 0xFFFFFFFF, np.uint32)

        if i.name == "bar":
            if i.modifiers != ["warp", "sync"]:
                raise PtxError("unknown barrier")
            return lambda lanes: None, self.read(i.operands[0], "u32")
        if i.name == "shfl":
            return self.shuffle(i)
        if i.name == "vote":
            return self.vote(i)
        if i.name == "redux":
            return self.reduction(i)
        if i.name == "mma":
            return self.multiply(i), whole
        return self.load_matrix(i), whole

    def shuffle(self, i: Instruction) -> tuple[Run, Callable[[Lanes], Any]]:
        """Lane values change places; one whose source lies outside its segment keeps its own."""
        if i.modifiers[0] != "sync" or i.modifiers[2:] != ["b32"]:
            raise PtxError("unknown shuffle")
        mode = i.modifiers[1]
        to, _, valid = i.operands[0].partition("|")
        put, put_valid = self.write(to, "b32"), self.write(valid, "pred") if valid else None
        value, by, clamp, mask = (self.read(operand, "u32") for operand in i.operands[1:])

        def run(lanes: Lanes) -> None:
            lane, b, c = lanes % WARP, by(lanes).astype(np.int64) & 31, clamp(lanes).astype(np.int64)
            limit, segment = c & 31, c >> 8 & 31
            last, first = lane & segment | limit & ~segment, lane & segment
            if mode == "up":
                source, inside = lane - b, lane - b >= last
            elif mode == "down":
                source, inside = lane + b, lane + b <= last
            elif mode == "bfly":
                source, inside = lane ^ b, (lane ^ b) <= last
            elif mode == "idx":
                source = first | b & ~segment
                inside = source <= last
            else:
                raise PtxError(f"unknown: {i.text}")
            source = np.where(inside, source, lane)
            if not (mask(lanes) >> source.astype(np.uint32) & np.uint32(1)).all():
                raise PtxError(f"{i.text}: reads a lane that is not in the mask")
            everyone = np.zeros(self.count * self.pitch, np.uint32)
            everyone[lanes] = value(lanes)
            put(lanes, everyone[lanes - lane + source])
            if put_valid is not None:
                put_valid(lanes, inside)

        return run, mask

    def vote(self, i: Instruction) -> tuple[Run, Callable[[Lanes], Any]]:
        """Of a predicate of the lanes of the mask."""
        if i.modifiers[0] != "sync" or i.modifiers[1:] not in (
            ["ballot", "b32"],
            ["any", "pred"],
            ["all", "pred"],
            ["uni", "pred"],
        ):
            raise PtxError("unknown vote")
        put, mask = self.write(i.operands[0], i.modifiers[2]), self.read(i.operands[2], "u32")
        negated, predicate = i.operands[1].startswith("!"), self.read(i.operands[1].lstrip("!"), "pred")

        def run(lanes: Lanes) -> None:
            votes = np.zeros(self.count * self.pitch // WARP, np.uint32)
            holds = predicate(lanes) ^ negated
            np.bitwise_or.at(votes, lanes // WARP, holds.astype(np.uint32) << (lanes % WARP).astype(np.uint32))
            masks = mask(lanes)
            ballot = votes[lanes // WARP] & masks
            put(
                lanes,
                {
                    "ballot": ballot,
                    "any": ballot != 0,
                    "all": ballot == masks,
                    "uni": (ballot == 0) | (ballot == masks),
                }[i.modifiers[1]],
            )

        return run, mask

    def reduction(self, i: Instruction) -> tuple[Run, Callable[[Lanes], Any]]:
        """One number of the integers of all lanes of the mask."""
        of = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }
        if i.modifiers[0] != "sync" or i.modifiers[1] not in of or i.modifiers[2] not in ("s32", "u32", "b32"):
            raise PtxError("unknown reduction")
        put, value, mask = (
            self.write(i.operands[0], i.modifiers[2]),
            self.read(i.operands[1], i.modifiers[2]),
            self.read(i.operands[2], "u32"),
        )

        def run(lanes: Lanes) -> None:
            values, keys = value(lanes), (lanes // WARP).astype(np.uint64) << np.uint64(32) | mask(lanes)
            result = values.copy()
            for key in np.unique(keys):
                result[keys == key] = of[i.modifiers[1]].reduce(values[keys == key])
            put(lanes, result)

        return run, mask

    def multiply(self, i: Instruction) -> Run:
        """Mma of whole warps."""
        multiply = fragments.product(i.modifiers)
        to, *operands = ([name.strip() for name in operand.strip("{}").split(",")] for operand in i.operands)
        puts = [self.write(name, "b32") for name in to]
        gets = [[self.read(name, "u32") for name in names] for names in operands]

        def run(lanes: Lanes) -> None:
            zeros = np.zeros(len(lanes), np.uint32)
            a, b, c = (np.stack([get(lanes) + zeros for get in of], 1).reshape(-1, WARP, len(of)) for of in gets)
            result = multiply(a, b, c)
            for number, put in enumerate(puts):
                put(lanes, result[..., number].reshape(-1))

        return run

    def load_matrix(self, i: Instruction) -> Run:
        """Lane 8 m + r names row r of 8x8 matrix m; lane 4 g + t gets elements 2 t and 2 t + 1 of row g of each."""
        modifiers = [m for m in i.modifiers if not m.startswith("shared")]
        transposes = "trans" in modifiers
        modifiers = [m for m in modifiers if m != "trans"]
        if (
            modifiers[:3] != ["sync", "aligned", "m8n8"]
            or modifiers[3] not in ("x1", "x2", "x4")
            or modifiers[4:] != ["b16"]
        ):
            raise PtxError("unknown ldmatrix")
        number = int(modifiers[3][1:])
        puts = [self.write(name.strip(), "b32") for name in i.operands[0].strip("{}").split(",")]
        address = self.address(i.operands[1])

        def run(lanes: Lanes) -> None:
            at = address(lanes).reshape(-1, WARP)
            group, thread = np.arange(WARP) >> 2, np.arange(WARP) & 3
            for matrix, put in enumerate(puts[:number]):
                result = np.zeros((len(at), WARP), np.uint32)
                for half in range(2):
                    row, column = (2 * thread + half, group) if transposes else (group, 2 * thread + half)
                    places = at[:, 8 * matrix + row] + (2 * column).astype(np.uint64)
                    if (at[:, 8 * matrix : 8 * matrix + 8] % np.uint64(16)).any():
                        raise PtxError(f"{i.text}: a row must begin at a multiple of 16")
                    read = self.load("shared", places.reshape(-1), 2, lanes, i.text).astype(np.uint32)
                    result |= read.reshape(-1, WARP) << np.uint32(16 * half)
                put(lanes, result.reshape(-1))

        return run

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

    # ---- numbers

    def computation(self, i: Instruction) -> Run:
        """Of a rule of ``arithmetic``."""
        to, types, function = arithmetic.MAKERS[i.name](i.modifiers)
        if i.name == "fma" and not self.launch.fuses:
            function = arithmetic.unfused
        if len(i.operands) != 1 + len(types):
            raise PtxError(f"expected {1 + len(types)} operands")
        put = self.write(i.operands[0], to)
        reads = [self.read(operand, of) for operand, of in zip(i.operands[1:], types, strict=True)]
        if len(reads) == 1:
            (one,) = reads
            return lambda where: put(where, function(one(where)))
        if len(reads) == 2:
            first, second = reads
            return lambda where: put(where, function(first(where), second(where)))
        return lambda where: put(where, function(*[read(where) for read in reads]))

    def comparison(self, i: Instruction) -> Run:
        """setp, perhaps combined with a predicate; p|q sets q to the opposite."""
        how, *combines, of = i.modifiers
        if len(combines) > 1 or not set(combines) <= {"and", "or", "xor"}:
            raise PtxError("unknown comparison")
        kind = "u" + of[1:] if of[0] == "b" else of
        try:
            compare = arithmetic.comparison(how, kind)
        except KeyError:
            raise PtxError(f"unknown comparison {how}") from None
        a, b = self.read(i.operands[1], kind), self.read(i.operands[2], kind)
        to, _, opposite = i.operands[0].partition("|")
        put, put_opposite = self.write(to, "pred"), self.write(opposite, "pred") if opposite else None
        if not combines and put_opposite is None:
            return lambda where: put(where, compare(a(where), b(where)))
        join = getattr(np, f"logical_{combines[0]}") if combines else lambda x, _: x
        negated = combines != [] and i.operands[3].startswith("!")
        other = self.read(i.operands[3].lstrip("!"), "pred") if combines else lambda where: False

        def run(where: Any) -> None:
            holds, with_this = compare(a(where), b(where)), other(where) ^ negated
            put(where, join(holds, with_this))
            if put_opposite is not None:
                put_opposite(where, join(~holds, with_this))

        return run

    def pack(self, i: Instruction) -> Run:
        """Mov between one register and the parts of it, the lowest first."""
        bits = int(i.modifiers[0][1:])
        to, of = i.operands
        inside = (to if to.startswith("{") else of).strip("{}").split(",")
        parts = [name.strip() for name in inside]
        small = f"u{bits // len(parts)}"
        if to.startswith("{"):
            value, puts = self.read(of, f"u{bits}"), [self.write(name, small) for name in parts]

            def unpack(where: Any) -> None:
                whole = value(where)
                shift = bits // len(parts)
                pieces = [(whole >> whole.dtype.type(shift * k)).astype(TYPES[small]) for k in range(len(parts))]
                for put, piece in zip(puts, pieces, strict=True):
                    put(where, piece)

            return unpack
        put, reads = self.write(to, f"u{bits}"), [self.read(name, small) for name in parts]
        wide = TYPES[f"u{bits}"]

        def join(where: Any) -> None:
            whole = wide.type(0)
            for k, read in enumerate(reads):
                whole = whole | read(where).astype(wide) << wide.type(bits // len(parts) * k)
            put(where, whole)

        return join

    def generic(self, i: Instruction) -> Run:
        """Between addresses in a space and generic ones."""
        space = next(m for m in i.modifiers if m in SPACES)
        put, value = self.write(i.operands[0], "u64"), self.read(i.operands[1], "u64")
        if space == "param":
            raise PtxError("generic addresses of parameters")
        window = np.uint64(SHARED_WINDOW if space == "shared" else 0)
        if "to" in i.modifiers:
            return lambda where: put(where, value(where) - window)
        return lambda where: put(where, value(where) + window)

    # ---- memory

    def address(self, operand: str) -> Callable[[Lanes], Any]:
        """Of every lane: [%rd1+8], [variable+4]."""
        match = re.match(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
        if match is None:
            raise PtxError(f"unknown address {operand}")
        offset = np.uint64(int(match[2] or "0", 0) & (1 << 64) - 1)
        if match[1].startswith("%") and self.register(match[1]).dtype.itemsize == 4:
            narrow = self.read(match[1], "u32")
            return lambda lanes: narrow(lanes).astype(np.uint64) + offset & np.uint64(0xFFFFFFFF)
        base = self.read(match[1], "u64")
        return lambda lanes: base(lanes) + offset + np.zeros(len(lanes), np.uint64)

    def places(
        self, space: str, at: Any, size: int, lanes: Lanes, write: bool, what: str
    ) -> list[tuple[Range, Any, Any]]:
        """Where numbers of this size lie: range, indices in its view, and which of the lanes."""
        if space == "global":
            return self.launch.memory.place(at, size, write, what)
        if space == "shared":
            return self.shared.place(self.block_of[lanes], at, size, what)
        if space == "local":
            return self.local.place(lanes, at - np.uint64(LOCAL_WINDOW), size, what)
        windows = at >> np.uint64(56)
        found = []
        for window in np.unique(windows).tolist():
            of = np.flatnonzero(windows == window)
            inner = {1: "shared", 2: "local"}.get(window, "global")
            moved = at[of] - np.uint64(SHARED_WINDOW) if inner == "shared" else at[of]
            for memory, indices, some in self.places(inner, moved, size, lanes[of], write, what):
                found.append((memory, indices, of[some]))
        return found

    def load(self, space: str, at: Any, size: int, lanes: Lanes, what: str) -> Any:
        """Numbers of 1 to 8 bytes."""
        places = self.places(space, at, size, lanes, False, what)
        if len(places) == 1:
            return places[0][0].views[size][places[0][1]]
        result = np.empty(len(lanes), UNSIGNED[size])
        for memory, indices, of in places:
            result[of] = memory.views[size][indices]
        return result

    def store(self, space: str, at: Any, values: Any, lanes: Lanes, what: str) -> None:
        """Numbers of 1 to 8 bytes, the later lane's where two agree in the place."""
        size = values.dtype.itemsize
        values = np.broadcast_to(values, at.shape)
        for memory, indices, of in self.places(space, at, size, lanes, True, what):
            memory.views[size][indices] = values[of]

    def space(self, i: Instruction) -> tuple[str, int, str]:
        """Space, numbers in a vector, and type of an access; nothing else may be in its modifiers but hints."""
        *modifiers, of = i.modifiers
        space, vector = "generic", 1
        for modifier in modifiers:
            if modifier.split("::")[0] in SPACES:
                space = modifier.split("::")[0]
            elif modifier in ("v2", "v4", "v8"):
                vector = int(modifier[1:])
            elif not HINTS.fullmatch(modifier):
                raise PtxError(f"unknown modifier {modifier}")
        if of not in BYTES:
            raise PtxError(f"unknown type {of}")
        return "global" if space == "const" else space, vector, of

    def memory_instruction(self, i: Instruction) -> Run:
        """Loads, stores and atomics."""
        if i.name in ("atom", "red"):
            return self.atomic(i)
        space, vector, of = self.space(i)
        size = BYTES[of]
        place, numbers = (i.operands[1], i.operands[0]) if i.name == "ld" else i.operands
        names = [name.strip() for name in numbers.strip("{}").split(",")]
        if len(names) != vector:
            raise PtxError(f"expected {vector} registers")
        address = self.address(place)
        text, alignment = i.text, np.uint64(size * vector - 1)
        if i.name == "st":
            reads = [self.read(name, "u" + of[1:]) for name in names]

            def store(lanes: Lanes) -> None:
                at = address(lanes)
                if vector > 1 and (at & alignment).any():
                    raise PtxError(f"{text}: not a multiple of {size * vector}")
                for k, read in enumerate(reads):
                    self.store(space, at + np.uint64(k * size), read(lanes), lanes, text)

            return store
        kind = of if of[0] == "s" else "u" + of[1:]
        puts = [self.write(name, kind) for name in names]
        if space == "param":
            parameters = self.launch.parameters

            def load_parameter(lanes: Lanes) -> None:
                at = address(lanes).astype(np.int64)
                for k, put in enumerate(puts):
                    offsets = at + k * size
                    if (offsets < 0).any() or (offsets + size > parameters.size).any() or (offsets % size).any():
                        raise PtxError(f"{text}: outside the parameters")
                    put(lanes, parameters.views[size][offsets // size].view(TYPES[kind]))

            return load_parameter

        def load(lanes: Lanes) -> None:
            at = address(lanes)
            if vector > 1 and (at & alignment).any():
                raise PtxError(f"{text}: not a multiple of {size * vector}")
            for k, put in enumerate(puts):
                put(lanes, self.load(space, at + np.uint64(k * size), size, lanes, text).view(TYPES[kind]))

        return load

    def atomic(self, i: Instruction) -> Run:
        """Lane after lane."""
        *modifiers, name, of = [m for m in i.modifiers if m != "noftz"]
        space, _, of = self.space(Instruction(None, i.name, [*modifiers, of], [], i.text))
        steps: dict[str, Callable[..., Any]] = {
            "add": lambda old, x: old + x,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "exch": lambda old, x: x,
            "cas": lambda old, x, y: np.where(old == x, y, old),
            "inc": lambda old, x: np.where(old >= x, 0, old + 1).astype(old.dtype),
            "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - 1).astype(old.dtype),
        }
        if name not in steps:
            raise PtxError(f"unknown atomic {name}")
        step, size = steps[name], BYTES[of]
        *to, place = i.operands[:2] if i.name == "atom" else i.operands[:1]
        put = self.write(to[0], of) if to else None
        address, reads = self.address(place), [self.read(operand, of) for operand in i.operands[len(to) + 1 :]]

        def run(lanes: Lanes) -> None:
            at = address(lanes)
            values = [np.broadcast_to(read(lanes), at.shape) for read in reads]
            old = np.empty(len(lanes), TYPES[of])
            for memory, indices, some in self.places(space, at, size, lanes, True, i.text):
                numbers = memory.views[size].view(TYPES[of])
                inputs, result = [value[some] for value in values], np.empty(len(indices), TYPES[of])
                if len(np.unique(indices)) == len(indices):
                    result[:] = numbers[indices]
                    numbers[indices] = step(result, *inputs)
                else:
                    for k, index in enumerate(indices):
                        result[k] = numbers[index]
                        numbers[index] = step(numbers[index], *[value[k] for value in inputs])
                old[some] = result
            if put is not None:
                put(lanes, old)

        return run

    # ---- asynchronous copies

    def copy(self, i: Instruction) -> Run:
        """Shared memory holds nothing of use between a copy's begin and the wait for it."""
        rest = [m for m in i.modifiers[1:] if not HINTS.fullmatch(m)]
        if rest == ["commit_group"]:
            return lambda lanes: self.group.__setitem__(lanes, self.group[lanes] + 1)
        if rest == ["wait_group"]:
            unfinished = int(i.operands[0])
            return lambda lanes: self.finish_copies(lanes, self.group[lanes] - unfinished)
        if rest == ["wait_all"]:
            return lambda lanes: self.finish_copies(lanes, self.group[lanes] + 1)
        if len(rest) != 2 or not rest[0].startswith("shared") or rest[1] != "global":
            raise PtxError("unknown copy")
        to, of = self.address(i.operands[0]), self.address(i.operands[1])
        size = int(i.operands[2])
        some = self.read(i.operands[3], "u32") if len(i.operands) > 3 else None
        if size not in (4, 8, 16) or "cg" in i.modifiers and size != 16:
            raise PtxError("a copy must be of 4, 8 or 16 bytes")

        def run(lanes: Lanes) -> None:
            target, source = to(lanes), of(lanes)
            if (target % np.uint64(size)).any() or (source % np.uint64(size)).any():
                raise PtxError(f"{i.text}: not a multiple of {size}")
            data = np.zeros((len(lanes), size // 4), np.uint32)
            length = (
                np.full(len(lanes), size) if some is None else np.broadcast_to(some(lanes), lanes.shape).astype(int)
            )
            for k in range(size // 4):
                reads = length > 4 * k
                if reads.any():
                    data[reads, k] = self.load("global", source[reads] + np.uint64(4 * k), 4, lanes[reads], i.text)
                self.store("shared", target + np.uint64(4 * k), np.array([0xCBCBCBCB], np.uint32), lanes, i.text)
            self.copies.append((lanes, self.group[lanes], target, data, size))

        return run

    def finish_copies(self, lanes: Lanes, before: Any) -> None:
        """Of these lanes, those of earlier groups than the given ones."""
        limit = np.full(self.count * self.pitch, -1)
        limit[lanes] = before
        left = []
        for owners, groups, target, data, size in self.copies:
            done = groups < limit[owners]
            for k in range(size // 4):
                if done.any():
                    self.store("shared", target[done] + np.uint64(4 * k), data[done, k], owners[done], "cp.async")
            if not done.all():
                left.append((owners[~done], groups[~done], target[~done], data[~done], size))
        self.copies = left
