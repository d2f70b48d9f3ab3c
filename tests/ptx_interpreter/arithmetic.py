"""Instructions that compute one number from others, a thread at a time: name to a maker of numpy functions.

A maker is given the modifiers and returns the type of the result, those of the operands, and the function of their
arrays. What it does not know it refuses by name. PTX ISA, chapter "Instruction Set"; floats are IEEE 754, rounded to
nearest even.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_interpreter.parse import PtxError

# float types of numpy, and bfloat16 and packed pairs as the bits that they are
KINDS = {"s": "i", "u": "u", "b": "u", "f": "f"}
TYPES = {kind + str(8 * size): np.dtype(f"{KINDS[kind]}{size}") for kind in "sub" for size in (1, 2, 4, 8)}
TYPES |= {f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)} | {"pred": np.dtype(bool)}
TYPES |= {"bf16": np.dtype("u2"), "bf16x2": np.dtype("u4"), "f16x2": np.dtype("u4")}

Function = Callable[..., Any]
Rule = tuple[str, list[str], Function]
MAKERS: dict[str, Callable[[list[str]], Rule]] = {}
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def maker(*names: str) -> Callable[[Callable[..., Rule]], Callable[..., Rule]]:
    """Enters a maker under these names; it is given the name first."""

    def enter(make: Callable[..., Rule]) -> Callable[..., Rule]:
        for name in names:
            MAKERS[name] = lambda modifiers, name=name: make(name, list(modifiers))
        return make

    return enter


def take(modifiers: list[str], *known: str) -> str | None:
    """Removes the one of these that is there."""
    for modifier in known:
        if modifier in modifiers:
            modifiers.remove(modifier)
            return modifier
    return None


def only(modifiers: list[str], *known: str) -> str:
    """The one modifier that is left, which must be one of these."""
    if len(modifiers) != 1 or modifiers[0] not in known:
        raise PtxError(f"unknown modifiers {'.'.join(modifiers)}")
    return modifiers[0]


INTEGERS = [kind + str(bits) for bits in (16, 32, 64) for kind in "su"]
FLOATS = ["f16", "f32", "f64"]
BITS = ["b16", "b32", "b64"]


def u(x: Any) -> Any:
    """The same bits, unsigned."""
    return x.view(f"u{x.dtype.itemsize}")


def extreme(name: str) -> Function:
    """fmin or fmax: the number where the other is NaN, and -0 below +0."""
    of, ties = (np.fmin, np.bitwise_or) if name == "min" else (np.fmax, np.bitwise_and)

    def run(a: Any, b: Any) -> Any:
        result = of(a, b)
        zero = (a == 0) & (b == 0)
        return np.where(zero, ties(u(a), u(b)).view(a.dtype), result) if zero.any() else result

    return run


def truncated_quotient(a: Any, b: Any) -> Any:
    """As C divides; a quotient by zero has all bits set."""
    if a.dtype.kind == "u":
        return np.where(b == 0, np.array(-1).astype(a.dtype), a // np.where(b == 0, 1, b).astype(b.dtype))
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    quotient = a // safe
    quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, np.array(-1, a.dtype), quotient)


@maker("add", "sub", "mul", "div", "min", "max", "rem")
def of_two(name: str, modifiers: list[str]) -> Rule:
    """Of integers modulo 2^bits, of floats rounded to nearest even."""
    if name == "mul" and (part := take(modifiers, "lo", "hi", "wide")):
        return product(part, only(modifiers, *INTEGERS), sums=False)
    approximate = take(modifiers, "approx", "full") if name == "div" else None
    if modifiers[-1] in FLOATS:
        take(modifiers, "rn")
        propagates = take(modifiers, "NaN") if name in ("min", "max") else None
        of = only(modifiers, *FLOATS)
        run = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}.get(name)
        if name in ("min", "max"):
            run = getattr(np, f"{name}imum") if propagates else extreme(name)
        if run is None or (approximate and of != "f32"):
            raise PtxError(f"unknown for {of}")
        return of, [of, of], run
    of = only(modifiers, *INTEGERS)
    run = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "div": truncated_quotient}.get(name)
    if name == "rem":
        return of, [of, of], lambda a, b: a - truncated_quotient(a, b) * b
    if run is None:
        raise PtxError("a product of integers must be lo, hi or wide")
    return of, [of, of], run


def high_half(a: Any, b: Any) -> Any:
    """The upper half of the product of integers."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(a.dtype)
    a, b = np.broadcast_arrays(a, b)
    products = [int(x) * int(y) >> 64 & (1 << 64) - 1 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return np.array(products, np.uint64).view(a.dtype)


def product(part: str, of: str, sums: bool) -> Rule:
    """mul and mad of integers."""
    wide = of[0] + str(2 * int(of[1:])) if part == "wide" else of

    def multiply(a: Any, b: Any) -> Any:
        if part == "hi":
            return high_half(a, b)
        return a.astype(TYPES[wide]) * b.astype(TYPES[wide]) if part == "wide" else a * b

    return (wide, [of, of, wide], lambda a, b, c: multiply(a, b) + c) if sums else (wide, [of, of], multiply)


@maker("mad")
def multiply_add(name: str, modifiers: list[str]) -> Rule:
    """Of integers."""
    part = take(modifiers, "lo", "hi", "wide")
    if part is None:
        raise PtxError("mad of floats is fma today")
    return product(part, only(modifiers, *INTEGERS), sums=True)


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32, rounded once."""
    products, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)  # exact
    sums = np.atleast_1d(products + c)
    result = sums.astype(np.float32)
    # Of a sum that float64 rounded to the middle between two float32, what was rounded away decides.
    middle = (sums.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if middle.any():
        part = sums - products
        lost = (products - (sums - part)) + (c - part)
        result = np.where(middle, np.nextafter(sums, np.sign(lost) * np.inf), sums).astype(np.float32)
        result = np.where(middle & (lost == 0), sums.astype(np.float32), result)
    return result


@maker("fma")
def multiply_add_floats(name: str, modifiers: list[str]) -> Rule:
    """Rounded once."""
    take(modifiers, "rn")
    of = only(modifiers, "f32")
    return of, [of] * 3, fused


def unfused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c as two instructions of float32."""
    return a * b + c


@maker("neg", "abs")
def of_one(name: str, modifiers: list[str]) -> Rule:
    """Of integers modulo 2^bits; of floats the sign bit."""
    of = only(modifiers, *FLOATS, "s16", "s32", "s64")
    if of in FLOATS:
        sign = TYPES["u" + of[1:]].type(1 << int(of[1:]) - 1)
        bits = (lambda x: u(x) ^ sign) if name == "neg" else (lambda x: u(x) & ~sign)
        return of, [of], lambda x: bits(x).view(x.dtype)
    return of, [of], np.negative if name == "neg" else np.abs


@maker("sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def function(name: str, modifiers: list[str]) -> Rule:
    """In float64, then rounded: exact for sqrt and rcp, and the middle of what devices give where they approximate."""
    approximate = take(modifiers, "approx", "rn")
    take(modifiers, "ftz") if approximate == "approx" else None
    of = only(modifiers, "f32", "f64")
    wide = {
        "sqrt": np.sqrt,
        "rcp": np.reciprocal,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "ex2": np.exp2,
        "lg2": np.log2,
        "sin": np.sin,
        "cos": np.cos,
        "tanh": np.tanh,
    }[name]
    return of, [of], lambda x: wide(x.astype(np.float64)).astype(TYPES[of])


@maker("and", "or", "xor", "not", "cnot")
def of_bits(name: str, modifiers: list[str]) -> Rule:
    """Bit by bit."""
    of = only(modifiers, "pred", *BITS)
    if name == "cnot":
        return of, [of], lambda x: (x == 0).astype(x.dtype)
    if name == "not":
        return of, [of], np.invert
    return of, [of, of], {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]


@maker("shl", "shr")
def shift(name: str, modifiers: list[str]) -> Rule:
    """By more than all bits gives 0, or the sign."""
    of = only(modifiers, *BITS, *INTEGERS)
    bits = int(of[1:])

    def run(x: Any, by: Any) -> Any:
        most = bits - 1
        within = np.minimum(by, most).astype(x.dtype)
        if of[0] == "s":
            return x >> within
        return np.where(by > most, x.dtype.type(0), x << within if name == "shl" else x >> within)

    return of, [of, "u32"], run


@maker("shf")
def funnel_shift(name: str, modifiers: list[str]) -> Rule:
    """The upper (l) or lower (r) half of the pair b:a, shifted."""
    side, mode = take(modifiers, "l", "r"), take(modifiers, "wrap", "clamp")
    of = only(modifiers, "b32")

    def run(a: Any, b: Any, by: Any) -> Any:
        pair = b.astype(np.uint64) << np.uint64(32) | a
        by = (np.minimum(by, 32) if mode == "clamp" else by & np.uint32(31)).astype(np.uint64)
        shifted = pair << by >> np.uint64(32) if side == "l" else pair >> by
        return shifted.astype(np.uint32)

    return of, [of, of, "u32"], run


@maker("bfe")
def extract_field(name: str, modifiers: list[str]) -> Rule:
    """``length`` bits from ``start`` on; signed ones repeat their highest bit."""
    of = only(modifiers, "u32", "s32", "u64", "s64")
    bits = int(of[1:])

    def run(x: Any, start: Any, length: Any) -> Any:
        x, start, length = np.broadcast_arrays(x, start & 255, length & 255)
        mask = (1 << bits) - 1
        out = []
        for value, s, n in zip((u(x)).tolist(), start.tolist(), length.tolist(), strict=True):
            field = value >> s & (1 << n) - 1
            sign = value >> min(s + n - 1, bits - 1) & 1 if of[0] == "s" and n else 0
            valid = min(max(bits - s, 0), n)
            out.append((field | (mask << valid if sign else 0)) & mask)
        return np.array(out, f"u{bits // 8}").view(TYPES[of])

    return of, [of, "u32", "u32"], run


@maker("bfi")
def insert_field(name: str, modifiers: list[str]) -> Rule:
    """The low ``length`` bits of a at ``start`` in b."""
    of = only(modifiers, "b32", "b64")
    bits = int(of[1:])

    def run(a: Any, b: Any, start: Any, length: Any) -> Any:
        start, length = start & 255, np.minimum(length & 255, bits)
        ones = np.array(-1).astype(a.dtype)
        some = np.where(length == 0, a.dtype.type(0), ones >> np.minimum(bits - length, bits - 1).astype(a.dtype))
        by = np.minimum(start, bits - 1).astype(a.dtype)
        mask = np.where(start >= bits, a.dtype.type(0), some << by)
        return b & ~mask | a << by & mask

    return of, [of, of, "u32", "u32"], run


@maker("popc", "clz", "brev")
def count(name: str, modifiers: list[str]) -> Rule:
    """Ones, leading zeros, or the bits in reverse order."""
    of = only(modifiers, "b32", "b64")
    bits = int(of[1:])
    if name == "popc":
        return "u32", [of], lambda x: np.bitwise_count(x).astype(np.uint32)
    if name == "clz":
        return "u32", [of], lambda x: np.array([bits - int(v).bit_length() for v in x.tolist()], np.uint32)
    reverse = f"0{bits}b"
    return of, [of], lambda x: np.array([int(format(v, reverse)[::-1], 2) for v in x.tolist()], TYPES[of])


@maker("bfind")
def find_highest(name: str, modifiers: list[str]) -> Rule:
    """The highest bit that is not the sign, or what shifts it to the top; all ones where there is none."""
    shifts = take(modifiers, "shiftamt")
    of = only(modifiers, "u32", "s32", "u64", "s64")
    bits = int(of[1:])

    def one(x: int) -> int:
        place = (~x if x < 0 else x).bit_length() - 1
        return 0xFFFFFFFF if place < 0 else bits - 1 - place if shifts else place

    return "u32", [of], lambda x: np.array([one(v) for v in x.tolist()], np.uint32)


@maker("prmt")
def permute(name: str, modifiers: list[str]) -> Rule:
    """Byte i is the byte of b:a that nibble i of the selector names; its top bit repeats that byte's sign."""
    of = only(modifiers, "b32")

    def run(a: Any, b: Any, selector: Any) -> Any:
        pair = b.astype(np.uint64) << np.uint64(32) | a
        result = np.zeros(np.broadcast(pair, selector).shape, np.uint32)
        for i in range(4):
            nibble = selector >> np.uint32(4 * i) & np.uint32(15)
            byte = (pair >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(
                255
            )
            repeated = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result |= np.where(nibble & np.uint32(8), repeated, byte) << np.uint32(8 * i)
        return result

    return of, [of, of, of], run


@maker("lop3")
def logic_of_three(name: str, modifiers: list[str]) -> Rule:
    """Bit 4 a + 2 b + c of the table is the result for bits a, b and c."""
    of = only(modifiers, "b32")

    def run(a: Any, b: Any, c: Any, table: Any) -> Any:
        result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
        for i in range(8):
            if int(table[0]) >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return of, [of, of, of, "u32"], run


@maker("dp4a")
def dot_of_bytes(name: str, modifiers: list[str]) -> Rule:
    """c plus the four products of bytes."""
    if len(modifiers) != 2 or not set(modifiers) <= {"s32", "u32"}:
        raise PtxError(f"unknown modifiers {'.'.join(modifiers)}")
    result = "s32" if "s32" in modifiers else "u32"

    def run(a: Any, b: Any, c: Any) -> Any:
        total = c.astype(np.int64)
        for i in range(4):
            parts = []
            for x, of in zip((a, b), modifiers, strict=True):
                byte = (u(x) >> np.uint32(8 * i)).astype(np.uint8)
                parts.append(byte.view(np.int8 if of == "s32" else np.uint8).astype(np.int64))
            total = total + parts[0] * parts[1]
        return total.astype(TYPES[result])

    return result, [*modifiers, result], run


@maker("sad")
def sum_of_differences(name: str, modifiers: list[str]) -> Rule:
    """c + |a - b|."""
    of = only(modifiers, "u32", "s32")
    return of, [of] * 3, lambda a, b, c: c + (np.maximum(a, b) - np.minimum(a, b))


@maker("selp")
def select(name: str, modifiers: list[str]) -> Rule:
    """A where the predicate holds, else b."""
    of = only(modifiers, *BITS, *INTEGERS, *FLOATS)
    return of, [of, of, "pred"], lambda a, b, p: np.where(p, a, b)


@maker("mov")
def move(name: str, modifiers: list[str]) -> Rule:
    """The bits."""
    of = only(modifiers, "pred", *BITS, *INTEGERS, *FLOATS)
    return of, [of], lambda x: x


# ---- comparisons

COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARISONS |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def comparison(how: str, of: str) -> Function:
    """Of two arrays; a float's is false if one is NaN, but for those that end in u."""
    if of not in FLOATS:
        return COMPARISONS[how]
    if how in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (how == "nan")
    if how.endswith("u"):
        ordered = COMPARISONS[how[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    ordered = COMPARISONS[how]
    return (lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)) if how == "ne" else ordered


# ---- conversions


def to_bfloat16(x: Any) -> Any:
    """Bits of float32 rounded to nearest even; NaN becomes 0x7fff."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_half(x: Any) -> Any:
    """Bits of float32 rounded to float16; NaN becomes 0x7fff."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def to_integer(x: Any, of: str) -> Any:
    """Of a whole float: the nearest that there is; of NaN 0, or 2^63 for 64 bits."""
    bits = int(of[1:])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if of[0] == "s" else (0, 2**bits - 1)
    wide = x.astype(np.float64)
    result = np.clip(wide, low, float(high) if bits < 64 else np.nextafter(float(high), 0))
    result = np.where(np.isnan(wide), 0, result).astype(TYPES[of])
    if bits == 64:
        result = np.where(wide >= float(high), np.array(high, TYPES[of]), result)
        return np.where(np.isnan(wide), np.array(1 << 63, np.uint64).view(TYPES[of]), result)
    return np.where(
        np.isnan(wide) & (x.dtype == np.float64), np.array(1 << bits - 1, f"u{bits // 8}").view(TYPES[of]), result
    )


@maker("cvt")
def convert(name: str, modifiers: list[str]) -> Rule:
    """Between integers, floats, and pairs of halves."""
    *how, to, of = modifiers
    rounding = how.pop(0) if how and how[0] in ("rn", *WHOLE) else None
    saturates = take(how, "sat")
    if how:
        raise PtxError(f"unknown modifiers {'.'.join(how)}")
    if to in ("bf16x2", "f16x2") and of == "f32" and rounding == "rn" and not saturates:
        half = to_bfloat16 if to == "bf16x2" else to_half
        return to, [of, of], lambda a, b: half(a).astype(np.uint32) << np.uint32(16) | half(b)
    if to == "bf16" and of == "f32" and rounding == "rn" and not saturates:
        return to, [of], to_bfloat16
    if of == "bf16" and to == "f32" and rounding is None and not saturates:
        return to, [of], lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if to == "f16" and of == "f32" and rounding == "rn" and not saturates:
        return to, [of], lambda x: to_half(x).view(np.float16)
    integers = [kind + str(bits) for kind in "su" for bits in (8, 16, 32, 64)]
    if to in integers and of in integers and rounding is None:
        if not saturates:
            return to, [of], lambda x: x.astype(TYPES[to])
        limits = np.iinfo(TYPES[to])
        return to, [of], lambda x: np.array([min(max(v, limits.min), limits.max) for v in x.tolist()], TYPES[to])
    if to in integers and of in FLOATS and rounding in WHOLE:
        return to, [of], lambda x: to_integer(WHOLE[rounding](x), to)
    if to in FLOATS and of in FLOATS and not saturates:
        if rounding in WHOLE and to == of:
            return to, [of], WHOLE[rounding]
        widens = TYPES[to].itemsize > TYPES[of].itemsize
        if rounding == (None if widens else "rn"):
            return to, [of], lambda x: x.astype(TYPES[to])
    if to in ("f32", "f64") and of in integers and rounding == "rn" and not saturates:
        return to, [of], lambda x: x.astype(TYPES[to])
    raise PtxError(f"unknown conversion cvt.{'.'.join(modifiers)}")
