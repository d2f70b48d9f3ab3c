"""A pytest plugin: tests of CUDA ops run on a pretend device, their kernels under the emulator.

`pytest -p cuda_emulator.pretend_device` with tests/ on the path, and in TERSETORCH_PRETEND_CUDA the folder of what the
CMake target pretend_cuda builds. The package is the installed one but for its ops library, which another stands in for.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ["TERSETORCH_PRETEND_CUDA"])
EMULATED = FOLDER / "libemulated_ops.so"
# Orders of running as in emulator.h: order, seed, blocks that take turns, one preemption in so many accesses.
SCHEDULES = {"forward": (0, 1, 1, 0), "reversed": (1, 1, 2, 0), "random": (2, 5, 4, 23)}

assert "torch" not in sys.modules, "the pretend device must come before torch"
ctypes.CDLL(str(FOLDER / "libpretend_accelerator.so"), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402

_load_library = torch.ops.load_library


def _load(path):
    _load_library(EMULATED if Path(path).name == "libtersetorch_ops.so" else path)


torch.ops.load_library = _load
# PyTorch asks NVIDIA's driver before the first CUDA tensor; the pretend device needs none.
torch.cuda._initialized = True


class Emulator:
    """The library's C functions."""

    def __init__(self):
        self._library = ctypes.CDLL(str(EMULATED))
        self._library.cuda_emulator_report.restype = ctypes.c_char_p
        self._library.cuda_emulator_launches.restype = ctypes.c_uint64
        self._library.cuda_emulator_stream.restype = ctypes.c_uint64
        self._library.cuda_emulator_allocations.restype = ctypes.c_uint64

    def schedule(self, order, seed, resident_blocks, preempt_one_in):
        self._library.cuda_emulator_schedule(order, ctypes.c_uint64(seed), resident_blocks, preempt_one_in)

    def report(self):
        return self._library.cuda_emulator_report().decode()

    def fail_launches(self, error):
        self._library.cuda_emulator_fail_launches(error)

    def launches(self):
        return self._library.cuda_emulator_launches()

    def stream(self):
        return self._library.cuda_emulator_stream()

    def allocations(self):
        """How many arrays of at least one byte PyTorch has made on the device."""
        return self._library.cuda_emulator_allocations()

    def device(self):
        """The device that was current when the last kernel was launched."""
        return self._library.cuda_emulator_device()

    @contextlib.contextmanager
    def forbid_waiting(self):
        """What no CUDA graph can record raises meanwhile: waiting, and memory that is not PyTorch's."""
        self._library.cuda_emulator_forbid_waiting(1)
        try:
            yield
        finally:
            self._library.cuda_emulator_forbid_waiting(0)

    def clear_report(self):
        self._library.cuda_emulator_clear_report()

    @staticmethod
    def unaligned(tensor):
        """The same numbers one byte behind an aligned address."""
        return torch.ops.pretend_cuda.unaligned(tensor)

    def use_stream(self, device, stream):
        self._library.cuda_emulator_use_stream(device, ctypes.c_int64(stream))


@pytest.fixture(params=SCHEDULES)
def device(request):
    """A device whose kernels run under each schedule; the test fails where the emulator reports."""
    import tersetorch  # noqa: F401  its ops library brings the device

    emulator = Emulator()
    emulator.clear_report()
    emulator.schedule(*SCHEDULES[request.param])
    yield "cuda"
    assert emulator.report() == ""


@pytest.fixture
def emulator(device):
    return Emulator()
