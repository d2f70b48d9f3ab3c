"""What stands in a file of PTX: kernels, their parameters and variables, their instructions."""

import re
from dataclasses import dataclass, field, replace

BYTES = {"pred": 1, **{kind + str(bits): bits // 8 for kind in "bsuf" for bits in (8, 16, 32, 64)}}


class PtxError(RuntimeError):
    """What a kernel does wrong, or what the interpreter does not know."""


def up_to(size: int, alignment: int) -> int:
    """The next multiple."""
    return -(-size // alignment) * alignment


@dataclass
class Instruction:
    """``@!%p1 add.s32 %r1, %r2, 5`` is ("%p1", True), "add", ["s32"], ["%r1", "%r2", "5"]."""

    guard: tuple[str, bool] | None
    name: str
    modifiers: list[str]
    operands: list[str]
    text: str
    assembly: bool = False  # written as such in the source

    @property
    def opcode(self) -> str:
        """With its modifiers."""
        return ".".join([self.name, *self.modifiers])


@dataclass
class Kernel:
    """An entry: offsets of parameters, of shared and of local variables, and what it executes."""

    name: str
    parameters: dict[str, int] = field(default_factory=dict)
    parameter_bytes: int = 0
    most_threads: int | None = None
    registers: dict[str, str] = field(default_factory=dict)  # name, or what numbers follow, to type
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0  # of variables; the dynamic ones lie behind them
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)  # of brx.idx


@dataclass
class Module:
    """All of a file; ``constants`` are the initial bytes of variables outside kernels."""

    target: int
    kernels: dict[str, Kernel]
    constants: dict[str, bytes]


VARIABLE = re.compile(r"(?:\.align (\d+) )?\.(\w+)\s+([\w$%.]+)(?:\[(\d*)\])?\s*(?:=\s*(.*))?$", re.S)
LABEL = re.compile(r"([\w$%]+):")
GUARD = re.compile(r"@(!?)(%\w+)\s+")
SPACE = re.compile(r"\s*")
TARGETS = re.compile(r"\s*\.branchtargets([^;]*);")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def parse(text: str) -> Module:
    """The module; anything at module level that is no variable and no entry is left out."""
    target = re.search(r"\.target sm_(\d+)", text)
    if target is None:
        raise PtxError("a file of PTX must name its .target")
    dynamic, constants, outer_shared = [], {}, []
    head = re.sub(r"//[^\n]*", "", re.sub(r"(?m)^\{.*?^\}", "{}", text, flags=re.S))
    for space, declaration in re.findall(
        r"(?m)^(?:\.visible |\.weak )?\.(?:extern \.)?(shared|const|global) ([^;]*);", head
    ):
        alignment, of, name, count, value = VARIABLE.match(declaration.strip()).groups()
        if space == "shared" and count == "":
            dynamic.append(name)
        elif space == "shared":
            outer_shared.append((name, int(alignment or BYTES[of]), BYTES[of] * int(count or 1)))
        else:
            constants[name] = initial_bytes(of, int(count or 1), value)
    kernels = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)^\{(.*?)^\}", text, re.S | re.M):
        name, parameters, attributes, body = match.groups()
        kernel = Kernel(name)
        for declaration in filter(None, (line.strip() for line in parameters.split(","))):
            add_parameter(kernel, declaration)
        if threads := re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", attributes):
            x, y, z = (int(size or 1) for size in threads.groups())
            kernel.most_threads = x * y * z
        for variable in outer_shared:
            if variable[0] in body:
                add_shared(kernel, *variable)
        body = re.sub(r"// (begin|end) inline asm", r".pragma \1;", body)
        add_body(kernel, re.sub(r"//[^\n]*", "", body))
        kernel.shared_bytes = up_to(kernel.shared_bytes, 16)
        kernel.shared |= dict.fromkeys(dynamic, kernel.shared_bytes)
        kernels[name] = kernel
    return Module(int(target[1]), kernels, constants)


def initial_bytes(of: str, count: int, value: str | None) -> bytes:
    """Of a variable outside kernels: zeros unless a value is given."""
    numbers = re.findall(r"-?\w+", value or "")
    if of.startswith("f"):
        numbers = [number[2:].rjust(2 * BYTES[of], "0") for number in numbers]
        data = b"".join(bytes.fromhex(number)[::-1] for number in numbers)
    else:
        mask = (1 << 8 * BYTES[of]) - 1
        data = b"".join((int(number, 0) & mask).to_bytes(BYTES[of], "little") for number in numbers)
    return data.ljust(BYTES[of] * count, b"\0")


def add_parameter(kernel: Kernel, declaration: str) -> None:
    """Places a parameter behind those before it."""
    match = re.match(r"\.param\s+(?:\.align (\d+)\s+)?\.(\w+)\s+(?:\.ptr.*\s)?([\w$]+)(?:\[(\d+)\])?$", declaration)
    if match is None:
        raise PtxError(f"unknown parameter: {declaration}")
    alignment, of, name, count = match.groups()
    kernel.parameters[name] = offset = up_to(kernel.parameter_bytes, int(alignment or BYTES[of]))
    kernel.parameter_bytes = offset + BYTES[of] * int(count or 1)


def add_shared(kernel: Kernel, name: str, alignment: int, size: int) -> None:
    """Places a shared variable behind those before it."""
    kernel.shared[name] = offset = up_to(kernel.shared_bytes, alignment)
    kernel.shared_bytes = offset + size


def add_body(kernel: Kernel, body: str) -> None:
    """Statement by statement; a block in braces may have registers of its own."""
    scopes: list[dict[str, str]] = []
    assembly = False
    at, opened = 0, 0
    while True:
        at = SPACE.match(body, at).end()
        if at == len(body):
            return
        if body[at] in "{}":
            if body[at] == "{":
                opened += 1
                scopes.append({})
            else:
                scopes.pop()
            at += 1
            continue
        if label := LABEL.match(body, at):
            name, at = label[1], label.end()
            if targets := TARGETS.match(body, at):
                kernel.targets[name], at = re.findall(r"[\w$]+", targets[1]), targets.end()
            else:
                kernel.labels[name] = len(kernel.code)
            continue
        end = body.index(";", at)
        statement, at = body[at:end].strip(), end + 1
        if statement in (".pragma begin", ".pragma end"):
            assembly = statement == ".pragma begin"
            continue
        if statement.startswith("."):
            add_declaration(kernel, statement, scopes[-1] if scopes else None, opened)
            continue
        for scope in reversed(scopes):
            for old, new in scope.items():
                statement = re.sub(re.escape(old) + r"\b", new, statement)
        kernel.code.append(replace(instruction(statement), assembly=assembly))


def add_declaration(kernel: Kernel, statement: str, scope: dict[str, str] | None, number: int) -> None:
    """Registers and variables; what is no such thing says nothing about what a kernel computes."""
    space, _, rest = statement[1:].partition(" ")
    if space == "reg":
        of, names = re.match(r"\.(\w+)\s+(.*)", rest.strip(), re.S).groups()
        for name in re.split(r"[,\s]+", names.strip()):
            if ranged := re.match(r"(%\w+)<\d+>", name):
                kernel.registers[ranged[1]] = of
            elif scope is None:
                kernel.registers[name] = of
            else:
                scope[name] = f"{name}_{number}"
                kernel.registers[scope[name]] = of
    elif space in ("shared", "local"):
        alignment, of, name, count, _ = VARIABLE.match(rest.strip()).groups()
        size, alignment = BYTES[of] * int(count or 1), int(alignment or BYTES[of])
        if space == "shared":
            add_shared(kernel, name, alignment, size)
        else:
            kernel.local[name] = offset = up_to(kernel.local_bytes, alignment)
            kernel.local_bytes = offset + size
    elif space not in ("pragma", "loc", "file"):
        raise PtxError(f"unknown directive: {statement}")


def instruction(statement: str) -> Instruction:
    """One of them."""
    text, guard = statement, None
    if match := GUARD.match(statement):
        guard, statement = (match[2], match[1] == "!"), statement[match.end() :]
    opcode, *operands = statement.split(None, 1)
    name, *modifiers = opcode.split(".")
    return Instruction(guard, name, modifiers, OPERAND.findall("".join(operands)), " ".join(text.split()))
