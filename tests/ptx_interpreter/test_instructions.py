"""Single instructions against results worked out by hand."""

import numpy as np
import pytest

from ptx_interpreter.parse import PtxError


def u32(*numbers):
    return np.array(numbers, np.uint32)


def s32(*numbers):
    return np.array(numbers, np.int32)


def u64(*numbers):
    return np.array(numbers, np.uint64)


def f32(*numbers):
    return np.array(numbers, np.float32)


def bits(*numbers):
    return np.array(numbers, np.uint32).view(np.float32)


CASES = [
    ("add.s32 {}, {}, {};", s32(2147483647, -5), s32(1, 3), s32(-2147483648, -2)),
    ("sub.s64 {}, {}, -1;", np.array([5], np.int64), np.array([6], np.int64)),
    ("mul.lo.s32 {}, {}, {};", s32(65536, -3), s32(65537, 7), s32(65536, -21)),
    ("mul.hi.s32 {}, {}, {};", s32(-2, 1 << 30), s32(3, 8), s32(-1, 2)),
    ("mul.hi.u64 {}, {}, {};", u64(1 << 63), u64(6), u64(3)),
    ("mul.wide.s32 {}, {}, {};", s32(-2, 1 << 30), s32(3, 8), np.array([-6, 1 << 33], np.int64)),
    ("mad.wide.u32 {}, {}, {}, {};", u32(1 << 31), u32(4), u64(7), u64((1 << 33) + 7)),
    ("mad.lo.s32 {}, {}, {}, {};", s32(3), s32(-4), s32(5), s32(-7)),
    ("div.s32 {}, {}, {};", s32(-7, 7, -8, 9), s32(2, -2, 4, -9), s32(-3, -3, -2, -1)),
    ("rem.s32 {}, {}, {};", s32(-7, 7, -8, 9), s32(2, -2, 4, -9), s32(-1, 1, 0, 0)),
    ("div.u64 {}, {}, {};", u64(2**64 - 1), u64(10), u64(1844674407370955161)),
    ("min.s32 {}, {}, {};", s32(-1, 5), s32(1, 4), s32(-1, 4)),
    ("max.u32 {}, {}, {};", u32(0xFFFFFFFF, 5), u32(1, 6), u32(0xFFFFFFFF, 6)),
    ("neg.s32 {}, {};", s32(5, -2147483648), s32(-5, -2147483648)),
    ("abs.s32 {}, {};", s32(-5, 6), s32(5, 6)),
    ("and.b32 {}, {}, 0xff00ff;", u32(0x12345678), u32(0x340078)),
    ("not.b64 {}, {};", u64(1), u64(2**64 - 2)),
    ("shl.b32 {}, {}, {};", u32(3, 3, 3, 3), u32(0, 31, 32, 255), u32(3, 0x80000000, 0, 0)),
    ("shr.u32 {}, {}, {};", u32(0xF0000000, 1, 8), u32(28, 32, 3), u32(15, 0, 1)),
    ("shr.s32 {}, {}, {};", s32(-16, -1, 8), u32(2, 40, 3), s32(-4, -1, 1)),
    ("shr.u64 {}, {}, 63;", u64(1 << 63), u64(1)),
    ("shf.l.wrap.b32 {}, {}, {}, {};", u32(0x89ABCDEF), u32(0x01234567), u32(8, 40), u32(0x23456789, 0x23456789)),
    ("shf.r.wrap.b32 {}, {}, {}, {};", u32(0x89ABCDEF), u32(0x01234567), u32(4, 0), u32(0x789ABCDE, 0x89ABCDEF)),
    ("shf.l.clamp.b32 {}, {}, {}, {};", u32(0x89ABCDEF), u32(0x01234567), u32(32, 99), u32(0x89ABCDEF, 0x89ABCDEF)),
    ("bfe.u32 {}, {}, {}, {};", u32(0x12345678), u32(8, 28, 0, 4), u32(8, 8, 0, 4), u32(0x56, 1, 0, 7)),
    ("bfe.s32 {}, {}, {}, {};", s32(0x0000F680, -1), u32(8, 30), u32(8, 8), s32(-10, -1)),
    ("bfi.b32 {}, {}, {}, 8, 12;", u32(0xABCDE), u32(0xFFFFFFFF), u32(0xFFFCDEFF)),
    ("bfind.u32 {}, {};", u32(0, 1, 0x8000), u32(0xFFFFFFFF, 0, 15)),
    ("bfind.shiftamt.u32 {}, {};", u32(0, 1, 0x8000), u32(0xFFFFFFFF, 31, 16)),
    ("brev.b32 {}, {};", u32(1, 0x80000003), u32(0x80000000, 0xC0000001)),
    ("clz.b32 {}, {};", u32(0, 1, 0x80000000), u32(32, 31, 0)),
    ("clz.b64 {}, {};", u64(0, 1), u32(64, 63)),
    ("popc.b32 {}, {};", u32(0, 0xF0F01), u32(0, 9)),
    ("popc.b64 {}, {};", u64(2**64 - 1, 5), u32(64, 2)),
    ("prmt.b32 {}, {}, {}, 0x5410;", u32(0x33221100), u32(0x77665544), u32(0x55441100)),
    ("prmt.b32 {}, {}, {}, {};", u32(0x33A21100), u32(0x77665584), u32(0xF8AC, 0x0123), u32(0x0000FFFF, 0x0011A233)),
    ("lop3.b32 {}, {}, {}, {}, 0x96;", u32(0b1100), u32(0b1010), u32(0b0110), u32(0b0000)),
    ("lop3.b32 {}, {}, {}, {}, 0xe8;", u32(0b1100), u32(0b1010), u32(0b0110), u32(0b1110)),
    ("lop3.b32 {}, {}, {}, {}, 0x02;", u32(0), u32(0), u32(5), u32(5)),
    ("dp4a.s32.s32 {}, {}, {}, {};", u32(0x01FF7F80), u32(0x02030480), s32(100), s32(100 + 2 - 3 + 508 + 16384)),
    ("dp4a.u32.u32 {}, {}, {}, {};", u32(0xFF000002), u32(0xFF000003), u32(1), u32(65025 + 6 + 1)),
    ("selp.b32 {}, {}, {}, {};", u32(1, 1), u32(2, 2), np.array([True, False]), u32(1, 2)),
    ("setp.lt.s32 {}, {}, {};", s32(-1, 1), s32(1, 1), np.array([True, False])),
    ("setp.lt.u32 {}, {}, {};", u32(0xFFFFFFFF, 0), u32(1, 1), np.array([False, True])),
    ("setp.lt.f32 {}, {}, {};", f32(1, np.nan), f32(2, 2), np.array([True, False])),
    ("setp.ltu.f32 {}, {}, {};", f32(3, np.nan), f32(2, 2), np.array([False, True])),
    ("setp.ne.f32 {}, {}, {};", f32(3, np.nan), f32(2, 2), np.array([True, False])),
    ("setp.neu.f32 {}, {}, {};", f32(2, np.nan), f32(2, 2), np.array([False, True])),
    ("setp.nan.f32 {}, {}, {};", f32(2, np.nan), f32(2, 2), np.array([False, True])),
    ("setp.eq.and.s32 {}, {}, {}, {};", s32(1, 1), s32(1, 1), np.array([True, False]), np.array([True, False])),
    ("setp.eq.or.s32 {}, {}, {}, !{};", s32(1, 2), s32(1, 1), np.array([True, True]), np.array([True, False])),
    ("add.f32 {}, {}, {};", f32(1), f32(2**-24), f32(1)),
    ("fma.rn.f32 {}, {}, {}, {};", bits(0x3F800002), bits(0x3F800002), f32(-1), bits(0x35000001)),
    ("min.f32 {}, {}, {};", f32(np.nan, -0.0), f32(3, 0.0), f32(3, -0.0)),
    ("max.f32 {}, {}, {};", f32(np.nan, -0.0), f32(3, 0.0), f32(3, 0.0)),
    ("max.NaN.f32 {}, {}, {};", f32(np.nan, 1), f32(3, 2), f32(np.nan, 2)),
    ("neg.f32 {}, {};", f32(0, 1), f32(-0.0, -1)),
    ("abs.f32 {}, {};", f32(-0.0, -1), f32(0, 1)),
    ("div.rn.f32 {}, {}, {};", f32(1, 1, 0), f32(3, 0, 0), f32(1 / 3, np.inf, np.nan)),
    ("sqrt.rn.f32 {}, {};", f32(2), f32(2**0.5)),
    ("cvt.rni.f32.f32 {}, {};", f32(0.5, 1.5, -2.5), f32(0, 2, -2)),
    ("cvt.rmi.f32.f32 {}, {};", f32(-0.5, 1.5), f32(-1, 1)),
    ("cvt.rzi.s32.f32 {}, {};", f32(-1.9, 3e9, np.nan, -np.inf), s32(-1, 2147483647, 0, -2147483648)),
    ("cvt.rni.s32.f32 {}, {};", f32(2.5, 3.5), s32(2, 4)),
    ("cvt.rzi.u32.f32 {}, {};", f32(-1, 4e9), u32(0, 4000000000)),
    ("cvt.rn.f32.s32 {}, {};", s32(16777217, -3), f32(16777216, -3)),
    ("cvt.rn.f32.u32 {}, {};", u32(0xFFFFFFFF), f32(4294967296)),
    ("cvt.s64.s32 {}, {};", s32(-2), np.array([-2], np.int64)),
    ("cvt.u64.u32 {}, {};", u32(0xFFFFFFFE), u64(0xFFFFFFFE)),
    ("cvt.u32.u64 {}, {};", u64(0x123456789), u32(0x23456789)),
    ("cvt.s32.s8 {}, {};", u32(0x180, 0x17F), s32(-128, 127)),
    ("cvt.u16.u32 {}, {};", u32(0x12345), np.array([0x2345], np.uint16)),
    ("cvt.rn.bf16x2.f32 {}, {}, {};", f32(1, 0), bits(0x3F808000, 0x3F818000), u32(0x3F803F80, 0x3F82)),
    ("cvt.rn.bf16x2.f32 {}, {}, {};", bits(0x7F7FFFFF), bits(0x7FC12345), u32(0x7F807FFF)),
    ("cvt.rn.f16x2.f32 {}, {}, {};", f32(1, 65520), f32(2, 2**-25), u32(0x3C004000, 0x7C000000)),
    ("cvt.f64.f32 {}, {};", f32(0.1), np.array([np.float32(0.1)], np.float64)),
    ("cvt.sat.s8.s32 {}, {};", s32(300, -300, 5), s32(127, -128, 5)),
    ("mov.b32 {}, {};", f32(1), u32(0x3F800000)),
    ("mov.b32 {{%rs1, %rs2}}, {1}; cvt.u32.u16 {0}, %rs2;", u32(0x12345678), u32(0x1234)),
    ("mov.b64 {}, {{{}, {}}};", u32(1), u32(2), u64(0x200000001)),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{i}: {case[0]}" for i, case in enumerate(CASES)])
def test_computes(case, compute):
    instruction, *operands, expected = case
    got = compute(instruction, expected.dtype, *operands)
    np.testing.assert_array_equal(got, expected)
    if expected.dtype.kind == "f":
        np.testing.assert_array_equal(np.signbit(got)[got == got], np.signbit(expected)[got == got])


def test_fma_rounds_once_or_on_request_twice(compute):
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal(4096).astype(np.float32) for _ in range(3))
    once = compute("fma.rn.f32 {}, {}, {}, {};", np.float32, a[:256], b[:256], c[:256])
    exact = (a[:256].astype(np.longdouble) * b[:256] + c[:256]).astype(np.float32)
    np.testing.assert_array_equal(once, exact)
    twice = compute("fma.rn.f32 {}, {}, {}, {};", np.float32, a[:256], b[:256], c[:256], fuses=False)
    np.testing.assert_array_equal(twice, a[:256] * b[:256] + c[:256])
    assert (once != twice).any()


def test_fma_of_a_sum_in_the_middle_of_two_floats(compute):
    # 1 + 2^-23 + 2^-24 - 2^-64 lies below the middle, which is what float64 makes of it.
    a, b = f32(2**-12 * (1 + 2**-20)), f32(2**-12 * (1 - 2**-20))
    got = compute("fma.rn.f32 {}, {}, {}, {};", np.float32, a, b, bits(0x3F800001))
    assert got.view(np.uint32)[0] == 0x3F800001
    got = compute("fma.rn.f32 {}, {}, {}, {};", np.float32, -a, b, bits(0x3F800001))
    assert got.view(np.uint32)[0] == 0x3F800001
    assert compute("fma.rn.f32 {}, {}, {}, {};", np.float32, f32(2**-24), f32(1), f32(1))[0] == 1  # a tie


@pytest.mark.parametrize(
    "instruction", ["tex.1d {}, {};", "add.sat.s32 {}, {}, {};", "cvt.rp.f32.s32 {}, {};", "mul.s32 {}, {}, {};"]
)
def test_unknown_instructions_are_refused_by_name(instruction, compute):
    with pytest.raises(PtxError, match=f"not modelled: {instruction.split()[0]}"):
        compute(instruction, np.int32, s32(1), s32(1))


def test_a_predicate_says_which_threads_execute(run):
    body = """
      and.b32 %r1, %r0, 1; setp.eq.s32 %p1, %r1, 0; mov.u32 %r2, 7;
      @%p1 mov.u32 %r2, 8;
      @!%p1 add.s32 %r2, %r2, %r0;
      mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd0, %rd9; st.global.u32 [%rd9], %r2;
    """
    assert run(body, u32(*[0] * 32)).tolist() == [8 if t % 2 == 0 else 7 + t for t in range(32)]


def test_registers_of_a_block_in_braces_hide_others(run):
    body = """
      setp.eq.s32 %p1, %r0, 0;
      { .reg .pred %p1; setp.ne.s32 %p1, %r0, 0; selp.u32 %r1, 1, 0, %p1; }
      selp.u32 %r2, 10, 0, %p1; add.s32 %r1, %r1, %r2;
      mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd0, %rd9; st.global.u32 [%rd9], %r1;
    """
    assert run(body, u32(*[0] * 32)).tolist() == [10] + [1] * 31


def test_loops_whose_lengths_differ(run):
    body = """
      mov.u32 %r1, 0; mov.u32 %r2, 0;
      $again: add.s32 %r2, %r2, %r1; add.s32 %r1, %r1, 1; setp.le.u32 %p1, %r1, %r0; @%p1 bra $again;
      mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd0, %rd9; st.global.u32 [%rd9], %r2;
    """
    assert run(body, u32(*[0] * 50), threads=50).tolist() == [t * (t + 1) // 2 for t in range(50)]


def test_a_branch_by_index(run):
    body = """
      and.b32 %r1, %r0, 3; $ts: .branchtargets $zero, $one, $two, $zero;
      brx.idx %r1, $ts;
      $zero: mov.u32 %r2, 100; bra.uni $end;
      $one: mov.u32 %r2, 101; bra.uni $end;
      $two: mov.u32 %r2, 102;
      $end: mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd0, %rd9; st.global.u32 [%rd9], %r2;
    """
    assert run(body, u32(*[0] * 8), threads=8).tolist() == [100, 101, 102, 100] * 2
