"""The check of what nvcc made of the kernels fails where it should; .ci/check_cuda_kernels reads the built library."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / ".ci"))
from cuda_kernels.expected import EXPECTED, Expected, problems  # noqa: E402
from cuda_kernels.occupancy import occupancy  # noqa: E402
from cuda_kernels.reading import parse, readable  # noqa: E402

SUM = "_ZN10tersetorch49_GLOBAL__N__0123abcd_16_sum_rows_cuda_cu_89ef012310SumRowsOfXEv"
RESOURCES = """
.nv.info.{name}
	<0x1>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x80 0x2 0x1

Resource usage:
 Common:
  GLOBAL:0
 Function {name}:
  REG:40 STACK:{stack} SHARED:{shared} LOCAL:0 CONSTANT[0]:480 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
INSTRUCTIONS = """
.text.{name}:
        .type           {name},@function
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ;
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0030*/               @P1 LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0038*/                   LDS.64 R8, [R2] ;
        /*0040*/                   IMAD.WIDE R4, R4, R8, R4 ;
        /*0050*/              @UP0 BRA `(.L_x_1) ;
"""  # fmt: skip
LINES = (Expected("SumRows", "HMMA.16816.F32.BF16"), Expected("SumRows", "LDGSTS*"))


def kernel_on(architecture, *, stack=0, shared=1024, instructions=INSTRUCTIONS):
    filled = RESOURCES.format(name=SUM, stack=stack, shared=shared)
    (kernel,) = parse(architecture, filled, instructions.format(name=SUM))
    return kernel


def wrong(*kernels, expected=LINES, **options):
    options.setdefault("architectures", [kernel.architecture for kernel in kernels])
    return problems(kernels, {SUM: "SumRowsOfX"}, expected=expected, **options)


def test_what_a_kernel_takes_is_read():
    on_80, on_90 = kernel_on(80), kernel_on(90)
    assert (on_80.registers, on_80.threads, on_80.local) == (40, 256, 0)
    assert on_80.opcodes == {"HMMA.16816.F32.BF16": 2, "LDGSTS.E.BYPASS.128": 1}
    assert (on_80.shared, on_80.dynamic) == (1024, False)
    assert (on_90.shared, on_90.dynamic) == (0, True)  # 1,024 bytes are the system's there
    assert readable([SUM]) == {SUM: ("sum_rows_cuda", "SumRowsOfX")}


def test_kernels_as_expected_pass():
    assert wrong(kernel_on(80), kernel_on(90), in_sources={"SumRowsOfX"}) == []


def test_a_spill_fails_unless_explained():
    (sentence,) = wrong(kernel_on(80, stack=16))
    assert sentence.startswith("SumRowsOfX on sm_80 must not use local memory")
    assert "got 16 bytes a thread" in sentence
    assert wrong(kernel_on(80, stack=16), explained={("SumRowsOfX", 80): "for the test"}) == []


@pytest.mark.parametrize("becomes", ["IMAD.MOV.U32", "HMMA.1688.F32.BF16"])
def test_a_lost_instruction_fails(becomes):
    lost, *_ = wrong(kernel_on(80, instructions=INSTRUCTIONS.replace("HMMA.16816.F32.BF16", becomes)))
    assert lost.startswith("SumRowsOfX on sm_80 must hold HMMA.16816.F32.BF16, got {")


def test_an_instruction_that_nobody_declared_fails():
    assert wrong(kernel_on(80), expected=LINES[:1]) == [
        "SumRowsOfX on sm_80 holds LDGSTS.E.BYPASS.128, which no line of EXPECTED names; add one"
    ]
    until_89 = (replace(LINES[0], last=89), LINES[1])
    (sentence,) = wrong(kernel_on(89), kernel_on(90), expected=until_89)
    assert sentence.startswith("SumRowsOfX on sm_90 holds HMMA")


def test_a_kernel_missing_on_an_architecture_fails():
    (sentence,) = wrong(kernel_on(80), architectures=[80, 90])
    assert sentence == "SumRowsOfX must be compiled for [80, 90], got none for [90]"


def test_a_kernel_of_the_sources_missing_in_the_library_fails():
    (sentence,) = wrong(kernel_on(80), in_sources={"SumRowsOfX", "MultiplyRows"})
    assert sentence.startswith("MultiplyRows must be in the library")


def test_a_line_that_fits_no_kernel_fails():
    (sentence,) = wrong(kernel_on(80), expected=(*LINES, Expected("MultiplyRows<", "IMMA*")))
    assert "which fits none" in sentence
    assert len(wrong(kernel_on(75), expected=EXPECTED)) > len(EXPECTED)


def test_a_kernel_without_launch_bounds_fails():
    (sentence,) = wrong(replace(kernel_on(80), threads=0))
    assert sentence.endswith("must say __launch_bounds__, got none")


# From cuda_occupancy.h of the CUDA runtime 13.0.
@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks", "limit"),
    [
        (75, 128, 61, 0, 8, "warps"),
        (80, 128, 56, 0, 9, "registers"),
        (86, 256, 94, 16896, 2, "registers"),
        (90, 256, 40, 43008, 5, "shared memory"),
        (100, 32, 16, 0, 32, "blocks"),
        (89, 512, 128, 32960, 1, "registers"),
    ],
)
def test_occupancy(architecture, threads, registers, shared, blocks, limit):
    found = occupancy(architecture, threads, registers, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == blocks * threads / 32 / {75: 32, 86: 48, 89: 48}.get(architecture, 64)
