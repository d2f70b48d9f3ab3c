"""Bugs made by rule in the real CUDA kernels: which of them do the kernels' emulated tests not notice?

    python tests/cuda_emulator/kernel_mutants.py csr_matmul [--files common/philox.h] [--seconds 300] [--out FILE]

Turns < into <= and back, + into -, drops factors, remainders, masks and shifts, either side of && and ||, guards,
barriers, assignments and atomics, takes one argument of min, swaps the axes of the grid, adds 1 to numbers and takes it
away. All are compiled into one program and tried in turn. Prints those that survive: each is the same program, or
something that the test should try.
"""

import argparse
import pathlib
import random
import re
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from kernel_bugs import KERNELS, ROOT, KernelTest, Span, insert

INFIX = {
    "<": "Less", "<=": "AtMost", ">": "More", ">=": "AtLeast", "==": "Equal", "!=": "Unequal",
    "+": "Plus", "-": "Minus", "*": "Times", "/": "Over", "%": "Modulo",
    "&": "And", "|": "Or", "^": "Xor", "<<": "ShiftLeft", ">>": "ShiftRight",
}  # fmt: skip

# Where an operand of && or ||, or a condition before ?, begins and ends.
ENDS = r"[;,?]|(?<!:):(?!:)|(?<![=!<>])=(?!=)|(?:<<|>>)=|\breturn\b"
BOTH, EITHER, CHOICE = re.compile(rf"{ENDS}|&&|\|\|"), re.compile(rf"{ENDS}|\|\|"), re.compile(ENDS)
# Constants, and what only other processors compile.
SKIPPED = re.compile(r"\bconstexpr\b|_mm\d|__m\d|alignas|static_assert|^\s*template|__launch_bounds__|^\s*using |asm")


class Mutants:
    def __init__(self, path: pathlib.Path, first: int) -> None:
        self.path, self.source, self.next = path, path.read_text(), first
        self.found: list[tuple[int, int, str, Span]] = []  # number, line, what, span
        code = self.code()
        self.brackets = self.match(code)
        self.scan(code)

    def code(self) -> str:
        """The source with comments, texts, directives and what only nvcc compiles as blanks."""
        hidden = re.compile(r"//[^\n]*|\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)'")
        code = hidden.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), self.source)
        lines, nvcc = [], []
        for line in code.split("\n"):
            stripped = line.strip()
            if stripped.startswith("#if"):
                nvcc.append(bool(re.search(r"(ifdef|\bdefined\(?) ?__CUDA(CC|_ARCH)__|#if TERSETORCH_", stripped)))
            elif stripped.startswith("#else") and nvcc:
                nvcc[-1] = not nvcc[-1] and "#ifndef" in stripped
            elif stripped.startswith("#endif") and nvcc:
                nvcc.pop()
            dead = stripped.startswith("#") or any(nvcc) or SKIPPED.search(line)
            lines.append(" " * len(line) if dead else line)
        return "\n".join(lines)

    @staticmethod
    def match(code: str) -> dict[int, int]:
        pairs, stack = {}, []
        for at, c in enumerate(code):
            if c in "([{":
                stack.append(at)
            elif c in ")]}" and stack:
                begin = stack.pop()
                pairs[begin], pairs[at] = at, begin
        return pairs

    def operand_end(self, code: str, at: int, stops: "re.Pattern[str]") -> int:
        while at < len(code):
            if code[at] in "([{" and at in self.brackets:
                at = self.brackets[at] + 1
            elif code[at] in ")]};" or stops.match(code, at):
                return at
            else:
                at += 1
        return at

    def operand_begin(self, code: str, at: int, stops: "re.Pattern[str]") -> int:
        """Where the operand that ends at `at` begins."""
        bound = at
        while at > 0:
            c = code[at - 1]
            if c in ")]}" and at - 1 in self.brackets:
                at = self.brackets[at - 1]
            elif c in "([{;":
                break
            else:
                at -= 1
            found = stops.match(code, at)
            if found and found.end() <= bound:
                at = found.end()
                break
        while code[at].isspace():
            at += 1
        return at

    def add(self, what: str, line_at: int, start: int, end: int, before: str, after: str = "") -> None:
        """The mutants of a span, in whose text @ and @@ stand for their numbers."""
        count = 2 if "@@" in before else 1
        numbered = before.replace("@@", str(self.next + 1)).replace("@", str(self.next))
        span = Span(start, end, numbered, after)
        line = self.source.count("\n", 0, line_at) + 1
        for i in range(count):
            self.found.append((self.next + i, line, f"{what} {'ab'[i]}" if count > 1 else what, span))
        self.next += count

    def scan(self, code: str) -> None:
        bug = "kernel_bugs::"
        for m in re.finditer(r" (<=|>=|==|!=|<<|>>|[<>+\-*/%&|^]) (?=\S)", code):
            if code[: m.start()].rstrip()[-1:] not in "(,=;{":
                self.add(m[1], m.start(), m.end(), m.end(), f"{bug}{INFIX[m[1]]}(@) {m[1]} ")
        for m in re.finditer(r"(&&|\|\|)(?=\s)", code):
            stops, wrong = (BOTH, f"({bug}Bug(@) || (") if m[1] == "&&" else (EITHER, f"(!{bug}Bug(@) && (")
            end = self.operand_end(code, m.end(), stops)
            begin = self.operand_begin(code, m.start(), stops)
            self.add(f"no right side of {m[1]}", m.start(), m.end() + 1, end, wrong, "))")
            self.add(f"no left side of {m[1]}", m.start(), begin, m.start(), wrong, "))")
        condition = f"{bug}Bug(@) || (!{bug}Bug(@@) && ("
        for m in re.finditer(r"\bif \(", code):
            end = self.brackets.get(m.end() - 1, 0)
            if end and ";" not in code[m.end() : end]:
                self.add("if", m.start(), m.end(), end, condition, "))")
        for m in re.finditer(r" \?(?=\s)", code):
            self.add("?:", m.start(), self.operand_begin(code, m.start(), CHOICE), m.start(), condition, "))")
        for m in re.finditer(r"(?<![\w)\]])!(?=[\w(])", code):
            self.add("!", m.start(), m.start(), m.start(), f"{bug}Bug(@) != ")
        for m in re.finditer(r"(?<![\w:.])(min|max)\(", code):
            self.add(m[1], m.start(), m.start(), m.start(), f"{bug}OneOf(@, @@).")
        for m in re.finditer(r"(?<![\w:.])atomicAdd\(", code):
            self.add("atomicAdd", m.start(), m.start(), m.start(), f"{bug}NotAtomic(@).")
        for m in re.finditer(r"\b(blockIdx|gridDim)(?=\.[xy]\b)", code):
            self.add(m[1] + " axis", m.start(), m.start(), m.end(), f"{bug}Axes(@, ", ")")
        for m in re.finditer(r"(?<![\w.\[<])(0x[0-9a-f]+u?|\d+u?)\b(?![\w.>'\]])", code):
            line = code[code.rfind("\n", 0, m.start()) + 1 : m.start()]
            if not re.search(r"\bcase\b|<\s*$", line):
                self.add(f"number {m[1]}", m.start(), m.start(), m.end(), f"{bug}Number(@, @@, ", ")")
        assigned = r"\*?[\w.]+(?:->|\.|\w|\[[^;=]*\])* [+\-*|&^]?(?:<<|>>)?= "
        called = r"(?!if|for|while|return|switch|static_assert|else)[A-Za-z_][\w:.]*(?:<[\w:, ]*>)?\([^;{]*\);"
        jumps = r"(?:continue|return|break);"
        for m in re.finditer(rf"(?:^ +|(?<=\) )|(?<=else ))(?=(?:{assigned}|{called}|{jumps}))", code, re.M):
            at = m.end()
            text = code[at : code.find(";", at)]
            if not re.match(r"\w+ \w+ =", text):
                self.add(f"no statement {text[:40]!r}", at, at, at, f"if (!{bug}Bug(@)) ")

    def changed(self) -> str:
        return insert(self.source, list({id(f[3]): f[3] for f in self.found}.values()))


def drop_refused(complaint: str, mutants: list[Mutants], wide: bool) -> int:
    """Takes away the mutants next to what the compiler complains of."""
    dropped = 0
    for m in mutants:
        name = str(m.path.relative_to(ROOT / "csrc"))
        text = m.changed().split("\n")
        where = {(int(a), int(b)) for a, b in re.findall(rf"{re.escape(name)}:(\d+):(\d+)", complaint)}
        bad = set()
        for line, column in where:
            switches = [(s.start(), int(s[1])) for s in re.finditer(r"kernel_bugs::\w+\((\d+)", text[line - 1])]
            if not switches:
                continue
            if wide:
                bad |= {n for _, n in switches}
            else:
                bad.add(min(switches, key=lambda s: abs(s[0] - column))[1])
        spans = {id(f[3]) for f in m.found if f[0] in bad}
        kept = [f for f in m.found if id(f[3]) not in spans]
        dropped += len(m.found) - len(kept)
        m.found = kept
    return dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel")
    parser.add_argument("--files", default="", help="only these, below csrc/kernels, separated by commas")
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build" / sys.implementation.cache_tag)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--only", default="", help="numbers, separated by commas")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    test = KernelTest(args.kernel, args.build)
    paths = [KERNELS / name for name in args.files.split(",") if name] or [test.source]
    first, mutants = 1, []
    for path in paths:
        mutants.append(Mutants(path, first))
        first = mutants[-1].next
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for attempt in range(30):
            changed = {m.path: m.changed() for m in mutants}
            complaint = test.make(folder, changed, check_only=True)
            if not complaint:
                break
            if not drop_refused(complaint, mutants, attempt > 4):
                sys.exit(complaint[:3000])
        started = time.monotonic()
        complaint = test.make(folder, changed)
        if complaint:
            sys.exit(complaint[:3000])
        built = time.monotonic() - started
        failure, base = test.run(folder, 0, 600)
        if failure:
            sys.exit(f"{args.kernel}: fails with no mutant: {failure}")
        todo = [(f, m) for m in mutants for f in m.found]
        total = len(todo)
        if args.only:
            todo = [t for t in todo if str(t[0][0]) in args.only.split(",")]
        random.Random(1).shuffle(todo)
        log = [f"{args.kernel}: {total} mutants, built in {built:.0f} s, unchanged {base:.1f} s"]
        print(log[0], flush=True)
        caught, survivors, tried = {}, [], 0
        started = time.monotonic()
        for (number, line, what, _), m in todo:
            if time.monotonic() - started > args.seconds:
                break
            tried += 1
            failure, _ = test.run(folder, number, 4 * base + 10)
            caught[failure] = caught.get(failure, 0) + 1
            if not failure:
                survivors.append((str(m.path.relative_to(KERNELS)), line, number, what))
                text = f"{survivors[-1][0]}:{line} [{number}] {what} | {m.source.split(chr(10))[line - 1].strip()}"
                print(text, flush=True)
                log.append(text)
        log.append(f"{args.kernel}: tried {tried} of {total}, survive {len(survivors)}, {dict(sorted(caught.items()))}")
        print(log[-1])
        if args.out:
            args.out.write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    main()
