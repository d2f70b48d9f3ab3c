"""Small kernels in PTX, run by the interpreter."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # the package that this folder is

from ptx_interpreter.machine import Launch
from ptx_interpreter.memory import GlobalMemory, Range
from ptx_interpreter.parse import parse

BASE = 1 << 40
REGISTER = {"u2": "%rs", "i2": "%rs", "u4": "%r", "i4": "%r", "u8": "%rd", "i8": "%rd", "f4": "%f", "f8": "%fd"}


def module(body, variables=""):
    return f""".version 9.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
{variables}
.entry kernel(.param .u64 kernel_param_0)
.maxntid 256, 1, 1
{{
  .reg .pred %p<20>;
  .reg .b16 %rs<20>;
  .reg .b32 %r<80>;
  .reg .f32 %f<20>;
  .reg .b64 %rd<40>;
  .reg .f64 %fd<20>;
{body}
  ret;
}}
"""


@pytest.fixture
def run():
    """Runs a kernel's body on arrays, whose addresses are in %rd0, %rd1, ...; returns what the last of them holds."""

    def run(body, *arrays, threads=32, blocks=1, dynamic_bytes=0, variables="", **launch):
        arrays = [np.array(array) for array in arrays]
        ranges = [Range(f"array {i}", BASE + (i << 30), a.tobytes(), i + 1 < len(arrays)) for i, a in enumerate(arrays)]
        head = "".join(f"  mov.u64 %rd{i}, {r.begin};\n" for i, r in enumerate(ranges)) + "  mov.u32 %r0, %tid.x;\n"
        text = module(head + body, variables)
        parsed = parse(text)
        kernel = parsed.kernels["kernel"]
        grid, block = (blocks, 1, 1), (threads, 1, 1)
        Launch(parsed, kernel, grid, block, bytes(8), GlobalMemory(ranges), dynamic_bytes, **launch).run()
        return ranges[-1].data.view(arrays[-1].dtype).reshape(arrays[-1].shape)

    return run


@pytest.fixture
def compute(run):
    """Runs ``instruction`` ("add.s32 {}, {}, {};": result and operands) on numbers of some types, one a thread."""

    def compute(instruction, to, *operands, **launch):
        operands = [np.atleast_1d(np.array(operand)) for operand in operands]
        threads = max(len(operand) for operand in operands)
        operands = [np.resize(operand, threads) for operand in operands]
        result = np.zeros(threads, to)
        body, names = "", []
        for i, array in enumerate([*operands, result]):
            size, of = array.dtype.itemsize, array.dtype.str[1:]
            name = f"{REGISTER[of]}{10 + i}" if of != "b1" else f"%p{10 + i}"
            names.append(name)
            body += f"  mul.wide.u32 %rd30, %r0, {size}; add.s64 %rd{20 + i}, %rd{i}, %rd30;\n"
            if of == "b1" and i < len(operands):
                body += f"  ld.global.u8 %rs9, [%rd{20 + i}]; setp.ne.s16 {name}, %rs9, 0;\n"
            elif i < len(operands):
                body += f"  ld.global.b{8 * size} {name}, [%rd{20 + i}];\n"
        body += "  " + instruction.format(names[-1], *names[:-1]) + "\n"
        if result.dtype == bool:
            body += f"  selp.u16 %rs9, 1, 0, {names[-1]}; st.global.u8 [%rd{20 + len(operands)}], %rs9;\n"
        else:
            body += f"  st.global.b{8 * result.dtype.itemsize} [%rd{20 + len(operands)}], {names[-1]};\n"
        return run(body, *operands, result, threads=threads, **launch)

    return compute
