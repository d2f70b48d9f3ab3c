// Table of contents of the native library: every op PyTorch can see, and nothing else.
#include <torch/csrc/stable/library.h>

#include "kernels/common/cpu_isa.h"

STABLE_TORCH_LIBRARY(tersetorch, m) {
  // A C++ program meets the level here first; Python has met it while importing tersetorch._native.
  const tersetorch::CpuIsaChoice& isa = tersetorch::ProcessCpuIsa();
  STD_TORCH_CHECK(isa.problem[0] == '\0', isa.problem);

  // The name of the level that the CPU kernels use.
  m.def("cpu_isa() -> str");
}
