"""Accesses to memory: their values, their bounds, atomics and asynchronous copies."""

import numpy as np
import pytest

from ptx_interpreter.parse import PtxError

VARIABLES = ".shared .align 16 .b8 tile[1024];\n.const .align 4 .b8 table[8] = {1, 0, 0, 0, 254, 255, 255, 255};\n"
ADDRESS = "mul.wide.u32 %rd9, %r0, 4; add.s64 %rd10, %rd0, %rd9; add.s64 %rd11, %rd1, %rd9;\n"
NUMBERS = np.arange(100, 164, dtype=np.uint32)


def test_narrow_and_wide_accesses(run):
    body = """
      ld.global.s8 %r1, [%rd0]; ld.global.u8 %r2, [%rd0]; ld.global.s16 %rs1, [%rd0+2]; cvt.s32.s16 %r3, %rs1;
      ld.global.v2.u32 {%r4, %r5}, [%rd0+8]; ld.const.u32 %r6, [table+4];
      st.global.u32 [%rd1], %r1; st.global.u32 [%rd1+4], %r2; st.global.u32 [%rd1+8], %r3; st.global.u32 [%rd1+12], %r6;
      st.global.v2.u32 [%rd1+16], {%r5, %r4}; st.global.u8 [%rd1+24], %r5;
    """
    source = np.array([0xFFFE00F0, 0, 7, 0x1234], np.uint32)
    got = run(body, source, np.zeros(7, np.uint32), threads=1, variables=VARIABLES)
    assert got.tolist() == [0xFFFFFFF0, 0xF0, 0xFFFFFFFE, 0xFFFFFFFE, 0x1234, 7, 0x34]


def test_generic_addresses(run):
    body = (
        ADDRESS
        + """
      mov.u32 %r1, tile; cvt.u64.u32 %rd12, %r1; cvta.shared.u64 %rd12, %rd12; add.s64 %rd12, %rd12, %rd9;
      ld.u32 %r2, [%rd10]; st.u32 [%rd12], %r2; cvta.to.shared.u64 %rd13, %rd12; cvt.u32.u64 %r3, %rd13;
      ld.shared.u32 %r4, [%r3]; st.u32 [%rd11], %r4;
    """
    )
    assert (run(body, NUMBERS, np.zeros(64, np.uint32), threads=64, variables=VARIABLES) == NUMBERS).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r1, [%rd10+4];", "out of bounds, 'array 0' of 256 bytes at byte 256"),
        ("ld.global.u32 %r1, [%rd10+-4];", "out of bounds, 'array 0' of 256 bytes at byte -4"),
        ("st.global.u32 [%rd10], %r0;", "writes to 'array 0'"),
        ("ld.global.u32 %r1, [%rd0+2];", "not a multiple of 4"),
        ("ld.global.v2.u32 {%r1, %r2}, [%rd10];", "not a multiple of 8"),
        (
            "shl.b32 %r1, %r0, 5; mov.u32 %r2, tile; st.shared.u32 [%r1], %r2;",
            "out of bounds, shared memory of 1024 bytes at byte 1024",
        ),
        ("mov.u64 %rd12, 4096; ld.global.u32 %r1, [%rd12];", "out of bounds"),
        ("ld.global.what.u32 %r1, [%rd10];", "unknown modifier what"),
        ("atom.global.nand.b32 %r1, [%rd11], 1;", "unknown atomic nand"),
    ],
)
def test_mistakes(body, message, run):
    with pytest.raises(PtxError, match=message):
        run(ADDRESS + body, NUMBERS, np.zeros(64, np.uint32), threads=64, variables=VARIABLES)


def test_atomics(run):
    body = """
      and.b32 %r1, %r0, 1; mul.wide.u32 %rd9, %r1, 4; add.s64 %rd9, %rd0, %rd9;
      atom.global.add.u32 %r2, [%rd9], %r0; red.global.max.u32 [%rd0+8], %r0; atom.global.or.b32 %r3, [%rd0+12], %r0;
      atom.global.cas.b32 %r4, [%rd0+16], 5, 6; atom.global.exch.b32 %r5, [%rd0+20], %r0;
      red.global.add.f32 [%rd0+24], 0f3F000000;
    """
    start = np.array([0, 0, 9, 0, 5, 0, 0], np.uint32)
    got = run(body, start, threads=64)
    assert got[:6].tolist() == [sum(range(0, 64, 2)), sum(range(1, 64, 2)), 63, 63, 6, 63]
    assert got[6:].view(np.float32)[0] == 32


def test_an_atomic_gives_each_thread_what_the_one_before_left(run):
    body = "atom.global.add.u32 %r1, [%rd0], 1; mul.wide.u32 %rd9, %r1, 4; add.s64 %rd9, %rd0, %rd9;\n"
    body += "st.global.u32 [%rd9+4], %r0;"
    assert run(body, np.zeros(65, np.uint32), threads=64).tolist() == [64, *range(64)]


def pipeline(waits):
    """Two groups of copies of 4 bytes; what the first brought is read after ``waits``."""
    return (
        ADDRESS
        + f"""
      mov.u32 %r1, tile; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2;
      cp.async.ca.shared.global [%r3], [%rd10], 4; cp.async.commit_group;
      cp.async.ca.shared.global [%r3+512], [%rd10], 4; cp.async.commit_group;
      {waits}
      bar.sync 0; xor.b32 %r4, %r2, 4; add.s32 %r4, %r1, %r4; ld.shared.u32 %r5, [%r4]; ld.shared.u32 %r6, [%r4+512];
      xor.b32 %r6, %r6, 0xCBCBCBCB; min.u32 %r6, %r6, 1; mad.lo.s32 %r5, %r6, 1000, %r5; st.global.u32 [%rd11], %r5;
    """
    )


def test_copies_arrive_at_the_wait_for_their_group(run):
    swapped = NUMBERS.reshape(-1, 2)[:, ::-1].reshape(-1)

    def results(waits):
        return run(pipeline(waits), NUMBERS, np.zeros(64, np.uint32), threads=64, variables=VARIABLES)

    assert (results("cp.async.wait_group 1;") == swapped).all()  # the second group has not come
    assert (results("cp.async.wait_group 0;") == swapped + 1000).all()
    assert (results("cp.async.wait_all;") == swapped + 1000).all()
    assert (results("cp.async.wait_group 2;") == 0xCBCBCBCB).all()
    assert (results("") == 0xCBCBCBCB).all()


def test_a_copy_of_less_than_its_size_fills_with_zeros(run):
    body = """
      mov.u32 %r1, tile; cp.async.cg.shared.global [%r1], [%rd0], 16, 8; cp.async.wait_all;
      ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%r1]; st.global.v4.u32 [%rd1], {%r2, %r3, %r4, %r5};
    """
    got = run(body, NUMBERS, np.ones(4, np.uint32), threads=1, variables=VARIABLES)
    assert got.tolist() == [100, 101, 0, 0]


def test_local_memory_is_of_a_thread(run):
    body = (
        ADDRESS
        + """
      .local .align 4 .b8 depot[16];
      mov.u64 %rd12, depot; cvta.local.u64 %rd13, %rd12;
      st.local.u32 [%rd12+8], %r0; bar.sync 0; ld.u32 %r1, [%rd13+8]; st.global.u32 [%rd11], %r1;
    """
    )
    got = run(body, NUMBERS, np.zeros(64, np.uint32), threads=64)
    assert got.tolist() == list(range(64))


def test_every_block_has_its_shared_memory(run):
    body = """
      mov.u32 %r1, %ctaid.x; mov.u32 %r3, dynamic; shl.b32 %r2, %r0, 2; add.s32 %r2, %r3, %r2; st.shared.u32 [%r2], %r1;
      bar.sync 0; ld.shared.u32 %r4, [%r3]; mad.lo.s32 %r5, %r1, 2, %r0;
      mul.wide.u32 %rd9, %r5, 4; add.s64 %rd9, %rd0, %rd9; st.global.u32 [%rd9], %r4;
    """
    assert run(body, np.zeros(8, np.uint32), threads=2, blocks=4, dynamic_bytes=8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(PtxError, match="shared memory of 4 bytes at byte 4"):
        run(body, np.zeros(8, np.uint32), threads=2, blocks=4, dynamic_bytes=4)


def test_a_block_larger_than_the_kernel_takes(run):
    with pytest.raises(PtxError, match="at most 256 threads"):
        run("", np.zeros(1, np.uint32), threads=288)
