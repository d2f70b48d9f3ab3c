"""Shuffles, votes, barriers and products of fragments, against the PTX ISA's text and figures."""

import numpy as np
import pytest

from ptx_interpreter.parse import PtxError

STORE = "mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd0, %rd9; st.global.u32 [%rd9], %r9;\n"


def shuffled(run, mode, by, clamp):
    body = f"mul.lo.s32 %r1, %r0, 10; shfl.sync.{mode}.b32 %r2|%p1, %r1, {by}, {clamp}, -1;\n"
    body += "selp.u32 %r3, 1000, 0, %p1; add.s32 %r9, %r2, %r3;\n" + STORE
    return run(body, np.zeros(32, np.uint32)).tolist()


def test_shuffles(run):
    # A result of 1000 more says that the source lay inside the segment.
    assert shuffled(run, "bfly", 1, 31) == [1000 + 10 * (lane ^ 1) for lane in range(32)]
    assert shuffled(run, "idx", 5, 31) == [1050] * 32
    assert shuffled(run, "up", 3, 0) == [10 * lane for lane in range(3)] + [1000 + 10 * (n - 3) for n in range(3, 32)]
    assert shuffled(run, "down", 30, 31) == [1300, 1310] + [10 * lane for lane in range(2, 32)]
    # Segments of 8 lanes: 0x18 in bits 8 to 12.
    assert shuffled(run, "idx", 2, 0x181F) == [1000 + 10 * (lane // 8 * 8 + 2) for lane in range(32)]
    assert shuffled(run, "down", 1, 0x181F) == [10 * n if n % 8 == 7 else 1010 + 10 * n for n in range(32)]
    assert shuffled(run, "up", 1, 0x1800) == [10 * n if n % 8 == 0 else 990 + 10 * n for n in range(32)]


def test_votes(run):
    body = """
      setp.lt.u32 %p1, %r0, 5; setp.ge.u32 %p3, %r0, 0;
      vote.sync.ballot.b32 %r9, %p1, -1; vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p4, %p1, -1;
      vote.sync.all.pred %p5, %p3, -1; vote.sync.any.pred %p6, !%p3, -1;
      selp.u32 %r2, 100, 0, %p2; add.s32 %r9, %r9, %r2; selp.u32 %r2, 200, 0, %p4; add.s32 %r9, %r9, %r2;
      selp.u32 %r2, 400, 0, %p5; add.s32 %r9, %r9, %r2; selp.u32 %r2, 800, 0, %p6; add.s32 %r9, %r9, %r2;
    """
    assert run(body + STORE, np.zeros(32, np.uint32)).tolist() == [31 + 100 + 400] * 32


def test_reductions(run):
    body = "setp.lt.u32 %p1, %r0, 8; @%p1 bra $few;\nredux.sync.max.u32 %r9, %r0, 0xffffff00; bra.uni $end;\n"
    body += "$few: redux.sync.add.s32 %r9, %r0, 0xff;\n$end:\n" + STORE
    assert run(body, np.zeros(32, np.uint32)).tolist() == [28] * 8 + [31] * 24


def test_lanes_that_come_by_different_paths_meet_in_a_warp_operation(run):
    body = """
      setp.lt.u32 %p1, %r0, 7; @!%p1 bra $late;
      $both: shfl.sync.bfly.b32 %r9|%p2, %r0, 16, 31, -1; bra.uni $end;
      $late: add.s32 %r2, %r0, 0; bra.uni $both;
      $end:
    """
    assert run(body + STORE, np.zeros(32, np.uint32)).tolist() == [lane ^ 16 for lane in range(32)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("shfl.sync.bfly.b32 %r9|%p1, %r0, 1, 31, 65535;", "not in its own mask"),
        ("setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r9|%p2, %r0, 1, 31, -1;", "never come"),
        ("setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r9|%p2, %r0, 16, 31, 0xffff;", "reads a lane"),
        ("setp.lt.u32 %p1, %r0, 16; @%p1 ret; bar.warp.sync -1;", "have exited"),
        ("setp.lt.u32 %p1, %r0, 16; @%p1 ret; bar.sync 0;", "16 threads of the block have exited"),
        (
            "setp.lt.u32 %p1, %r0, 16; @%p1 bra $a; bar.sync 0; bra.uni $e; $a: bar.red.or.pred %p2, 0, %p1; $e:",
            "wait at",
        ),
        ("trap;", "not modelled: trap"),
    ],
)
def test_mistakes(body, message, run):
    with pytest.raises(PtxError, match=message):
        run(body, np.zeros(1, np.uint32))


def test_a_barrier_makes_a_block_wait_and_counts(run):
    variables = ".shared .align 4 .b8 tile[512];\n"
    body = """
      shl.b32 %r1, %r0, 2; mov.u32 %r2, tile; add.s32 %r3, %r2, %r1;
      setp.lt.u32 %p1, %r0, 40; @%p1 bra $store; add.s32 %r4, %r0, 0; add.s32 %r4, %r4, 0;
      $store: st.shared.u32 [%r3], %r0;
      bar.sync 0;
      sub.s32 %r5, 79, %r0; shl.b32 %r5, %r5, 2; add.s32 %r5, %r2, %r5; ld.shared.u32 %r9, [%r5];
      setp.lt.u32 %p2, %r0, 3; barrier.sync.aligned 0; bar.red.popc.u32 %r6, 0, %p2; mad.lo.s32 %r9, %r6, 1000, %r9;
      mov.u32 %r7, %ctaid.x; mad.lo.s32 %r7, %r7, 80, %r0;
      mul.wide.u32 %rd9, %r7, 4; add.s64 %rd9, %rd0, %rd9; st.global.u32 [%rd9], %r9;
    """
    got = run(body, np.zeros(240, np.uint32), threads=80, blocks=3, variables=variables)
    assert got.tolist() == [3079 - t for t in range(80)] * 3


# ---- fragments, as in the ISA's text on each shape: lane = 4 g + t; element i of a lane's fragment

HALVES = {
    "a": lambda g, t, i: (g if i < 2 or 4 <= i < 6 else g + 8, 2 * t + i % 2 + (0 if i < 4 else 8)),
    "b": lambda g, t, i: (2 * t + i % 2 + (0 if i < 2 else 8), g),
}
BYTES = {
    "a": lambda g, t, i: (g if i < 4 or 8 <= i < 12 else g + 8, 4 * t + i % 4 + (0 if i < 8 else 16)),
    "b": lambda g, t, i: (4 * t + i % 4 + (0 if i < 4 else 16), g),
}
BITS = {
    "a": lambda g, t, i: (g if i < 32 or 64 <= i < 96 else g + 8, 32 * t + i % 32 + (0 if i < 64 else 128)),
    "b": lambda g, t, i: (32 * t + i % 32 + (0 if i < 32 else 128), g),
}


def registers(matrix, place, bits, count):
    """Of all lanes, [32, count], from a matrix of unsigned elements."""
    words = np.zeros((32, count), np.uint32)
    per_word = 32 // bits
    for lane in range(32):
        for i in range(count * per_word):
            row, column = place(lane // 4, lane % 4, i)
            words[lane, i // per_word] |= np.uint32(int(matrix[row, column]) << bits * (i % per_word))
    return words


def multiply(run, opcode, a, b, c, places, bits):
    """D [16, 8] in bits."""
    sums = np.zeros((32, 4), np.uint32)
    for lane in range(32):
        for i in range(4):
            sums[lane, i] = c[lane // 4 + (8 if i >= 2 else 0), 2 * (lane % 4) + i % 2]
    words = [registers(a, places["a"], bits, 4), registers(b, places["b"], bits, 2), sums, np.zeros((32, 4), np.uint32)]
    body = "".join(
        f"mul.wide.u32 %rd9, %r0, {4 * w.shape[1]}; add.s64 %rd{20 + i}, %rd{i}, %rd9;\n" for i, w in enumerate(words)
    )
    body += f"""
      ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%rd20]; ld.global.v2.u32 {{%r14, %r15}}, [%rd21];
      ld.global.v4.u32 {{%r16, %r17, %r18, %r19}}, [%rd22];
      mma.sync.aligned.{opcode}
        {{%r20,%r21,%r22,%r23}}, {{%r10,%r11,%r12,%r13}}, {{%r14,%r15}}, {{%r16,%r17,%r18,%r19}};
      st.global.v4.u32 [%rd23], {{%r20, %r21, %r22, %r23}};
    """
    d = run(body, *words)
    result = np.zeros((16, 8), np.uint32)
    for lane in range(32):
        for i in range(4):
            result[lane // 4 + (8 if i >= 2 else 0), 2 * (lane % 4) + i % 2] = d[lane, i]
    return result


@pytest.mark.parametrize("of", ["bf16", "f16"])
def test_products_of_halves(of, run):
    rng = np.random.default_rng(2)
    a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))

    def halves(x):
        return x.astype(np.float16).view(np.uint16) if of == "f16" else (x.view(np.uint32) >> 16).astype(np.uint16)

    opcode = f"m16n8k16.row.col.f32.{of}.{of}.f32"
    got = multiply(run, opcode, halves(a), halves(b), c.view(np.uint32), HALVES, 16)
    np.testing.assert_array_equal(got.view(np.float32), a @ b + c)


@pytest.mark.parametrize("types", ["s8.s8", "u8.s8", "s8.u8"])
def test_products_of_bytes(types, run):
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 256, (16, 32)), rng.integers(0, 256, (32, 8))
    c = rng.integers(-1000, 1000, (16, 8))
    signed = [x - 256 * (x > 127) if of == "s8" else x for x, of in zip((a, b), types.split("."), strict=True)]
    got = multiply(run, f"m16n8k32.row.col.s32.{types}.s32", a, b, c.astype(np.int32).view(np.uint32), BYTES, 8)
    np.testing.assert_array_equal(got.view(np.int32), signed[0] @ signed[1] + c)


@pytest.mark.parametrize("how", ["and", "xor"])
def test_products_of_bits(how, run):
    rng = np.random.default_rng(4)
    a, b, c = rng.integers(0, 2, (16, 256)), rng.integers(0, 2, (256, 8)), rng.integers(0, 99, (16, 8))
    got = multiply(run, f"m16n8k256.row.col.s32.b1.b1.s32.{how}.popc", a, b, c.astype(np.uint32), BITS, 1)
    pairs = a[:, :, None] & b[None] if how == "and" else a[:, :, None] ^ b[None]
    np.testing.assert_array_equal(got, pairs.sum(1) + c)


def test_a_part_of_a_warp_cannot_multiply(run):
    body = "setp.lt.u32 %p1, %r0, 31; @%p1 mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
    body += "{%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r1,%r2,%r3,%r4};"
    with pytest.raises(PtxError, match="never come"):
        run(body, np.zeros(1, np.uint32))


@pytest.mark.parametrize("transposes", [False, True])
def test_matrices_from_shared_memory(transposes, run):
    variables = ".shared .align 16 .b8 tile[512];\n"
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    suffix = ".trans" if transposes else ""
    body = f"""
      mov.u32 %r1, tile; shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2;
      mul.wide.u32 %rd9, %r0, 16; add.s64 %rd10, %rd0, %rd9; add.s64 %rd11, %rd1, %rd9;
      ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%rd10]; st.shared.v4.u32 [%r3], {{%r4, %r5, %r6, %r7}};
      bar.sync 0;
      ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r3];
      st.global.v4.u32 [%rd11], {{%r10, %r11, %r12, %r13}};
    """
    got = run(body, matrices, np.zeros((32, 4), np.uint32), variables=variables).view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        for m in range(4):
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                assert got[lane, m, half] == (matrices[m, column, row] if transposes else matrices[m, row, column])
