"""Replaying recorded launches: files, names of kernels, and what counts as the same memory."""

import json

import numpy as np
import pytest

from ptx_interpreter import mistakes, recordings
from ptx_interpreter.parse import PtxError, parse
from ptx_interpreter.recordings import Memory, Recording
from ptx_interpreter.replay import TOLERANCE, Outcome, difference, replay, unknown_instructions

HASHED = "_GLOBAL__N__0123abcd_13_scale_cuda_cu_89abcdef"
SCALE = f""".version 9.0
.target sm_90
.address_size 64
.entry _ZN10tersetorch{len(HASHED)}{HASHED}5ScaleEPKfPfi(
  .param .u64 x, .param .u64 y, .param .u32 count)
.maxntid 64, 1, 1
{{
  .reg .pred %p<2>; .reg .f32 %f<3>; .reg .b32 %r<4>; .reg .b64 %rd<6>;
  ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [y]; ld.param.u32 %r1, [count];
  mov.u32 %r2, %tid.x;
  setp.ge.s32 %p1, %r2, %r1;
  @%p1 bra $end;
  mul.wide.s32 %rd3, %r2, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
  ld.global.f32 %f1, [%rd4];
  fma.rn.f32 %f2, %f1, 0f3DCCCCCD, 0f3F800000;
  st.global.f32 [%rd5], %f2;
$end:
  ret;
}}
"""
NAME = ("scale_cuda", "_ZN10tersetorch12_GLOBAL__N_15ScaleEPKfPfi")
X, Y = 1 << 40, 1 << 41


def recording(after=None):
    x = np.linspace(-3, 3, 50, dtype=np.float32)
    if after is None:
        after = x * np.float32(0.1) + np.float32(1)
    parameters = np.array([X, Y], np.uint64).tobytes() + np.array([50], np.int32).tobytes()
    before = np.full(50, 0xCBCBCBCB, np.uint32).tobytes()
    memory = [Memory("x", X, True, x.tobytes(), x.tobytes()), Memory("y", Y, False, before, after.tobytes())]
    return Recording(NAME, (1, 1, 1), (64, 1, 1), 0, parameters, memory)


def outcome_of(kernel_text, launch):
    module = parse(kernel_text)
    (kernel,) = module.kernels.values()
    outcome = Outcome()
    replay(module, kernel, launch, outcome, 0)
    return outcome


def test_bits_must_agree_with_products_fused_or_not():
    outcome = outcome_of(SCALE, recording())
    assert (outcome.how, outcome.worst, outcome.problems) == ({"unfused"}, 0, [])
    x = np.linspace(-3, 3, 50, dtype=np.float32).astype(np.float64)
    fused = (x * np.float64(np.float32(0.1)) + 1).astype(np.float32)
    assert outcome_of(SCALE, recording(fused)).how == {"fused"}
    assert outcome_of(SCALE, recording(fused)).executed == 64 * 6 + 50 * 6 + 64


def test_a_number_that_is_wrong_is_a_problem():
    wrong = np.frombuffer(recording().memory[1].after, np.float32).copy()
    wrong[49] *= np.float32(1.0001)
    assert "memory differs by" in outcome_of(SCALE, recording(wrong)).problems[0]


def test_a_missing_guard_is_a_problem():
    unguarded = SCALE.replace("@%p1 bra $end;", "")
    assert "out of bounds, 'x' of 200 bytes at byte 200" in outcome_of(unguarded, recording()).problems[0]


def test_an_unknown_instruction_is_named_though_no_thread_comes_by():
    module = parse(SCALE.replace("$end:\n", "bra $end;\n texture.2d %r1, %r2;\n$end:\n"))
    (kernel,) = module.kernels.values()
    assert unknown_instructions(module, kernel) == ["instruction not modelled: texture.2d %r1, %r2: unknown opcode"]


def test_mistakes_are_made_where_launches_come_by():
    module = parse(SCALE)
    (kernel,) = module.kernels.values()
    outcome = outcome_of(SCALE, recording())
    made = mistakes.make_all({NAME: (module, kernel)}, {NAME: outcome}, [recording()])
    assert [(what, how) for what, _, how in made] == [
        ("no guard of the rest of a kernel", "ld.global.f32 %f1, [%rd4]: out of bounds, 'x' of 200 bytes at byte 200")
    ]


def f32(*numbers):
    return np.array(numbers, np.float32).view(np.uint8)


def u32(*numbers):
    return np.array(numbers, np.uint32).view(np.uint8)


@pytest.mark.parametrize(
    ("got", "want", "expected"),
    [
        (f32(1, 2), f32(1, 2), 0),
        (u32(0x7FC00000), u32(0xFFC00001), 0),  # NaN
        (u32(0x7FC03F80), u32(0xFFC03F80), 0),  # NaN and 1 in bfloat16
        (u32(0x7E013C00), u32(0xFE003C00), 0),  # NaN and 1 in float16
        (f32(1 + 2**-23, 4), f32(1, 4), 2**-25),
        (u32(0x40803F80, 0x3F803F80), u32(0x40803F80, 0x3F813F80), TOLERANCE),  # the last bit of a bfloat16
        (u32(0x40800000, 0x3F800000), u32(0x40800000, 0x3F820000), 2**-6 / 4),
        (u32(3, 1000), u32(4, 1000), np.inf),  # integers that are no floats
        (u32(30000, 1000), u32(30001, 1000), np.inf),
        (f32(1, 4), f32(1.5, 4), 0.125),
        (f32(np.inf), f32(1), np.inf),
        (f32(np.nan), f32(1), np.inf),
        (np.array([1, 2], np.uint8), np.array([1, 4], np.uint8), np.inf),
    ],
)
def test_difference(got, want, expected):
    assert difference(got, want) == expected


def test_names_of_both_compilers_agree():
    from_nvcc = parse(SCALE).kernels.popitem()[0]
    assert recordings.without_hashes(from_nvcc) == recordings.without_hashes(NAME[1]) == NAME[1]
    template = f"_ZN10tersetorch{len(HASHED)}{HASHED}11RoundKernelINS0_11ElementTileEEEvPKfPNS0_8BFloat16El"
    names = [NAME[1], recordings.without_hashes(template)]
    assert recordings.readable(names) == ["Scale", "RoundKernel<ElementTile>"]


def test_a_file_of_launches_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "kernel_at", lambda program, address: (program, hex(address)))
    head = {
        "program": "a",
        "address": 16,
        "grid": [1, 2, 3],
        "block": [32, 1, 1],
        "dynamic_bytes": 0,
        "parameter_bytes": 3,
        "memory": [
            {"name": "x", "begin": 4096, "bytes": 2, "read_only": True},
            {"name": "y", "begin": 8192, "bytes": 1, "read_only": False},
        ],
    }
    launch = json.dumps(head).encode() + b"\nabc" + b"\n12" + b"\n13"[:3]
    file = tmp_path / "a.launches"
    file.write_bytes(launch * 2)
    first, second = recordings.read(file)
    assert first == second
    assert first.kernel == ("a", "0x10")
    assert first.parameters == b"abc"
    assert first.memory == [Memory("x", 4096, True, b"\n1", b"\n1"), Memory("y", 8192, False, b"2", b"3")]
    file.write_bytes(launch[:-1])
    with pytest.raises(PtxError, match="cut off"):
        list(recordings.read(file))
