// What every op needs on a CUDA device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "torch/samples.h"

namespace tersetorch {

#ifdef TERSETORCH_CUDA

// The device of an op's first tensor, which the others must share, made current while this lives.
class CudaCall {
 public:
  CudaCall(const char* op, const Tensor& t, const char* name) : op_(op), place_(Device(op, t, name)), guard_(place_) {}

  Place place() const { return place_; }
  // The current stream, as launchers take it.
  void* Stream() const { return torch::stable::accelerator::getCurrentStream(place_).nativeHandle(); }

  // Raises where a launcher returned an error.
  void Check(int error) const {
    constexpr int kBadGrid = 9, kOldDriver = 35, kNoDevice = 100, kOtherDevice = 209;  // of cudaError_t
    if (error == 0) return;
    STD_TORCH_CHECK(error != kOldDriver && error != kNoDevice, op_,
                    ": a CUDA tensor needs NVIDIA's driver, as new as the nvcc of the build, got an older one or none; "
                    "update the driver, or build with an older nvcc");
    STD_TORCH_CHECK(error != kOtherDevice, op_,
                    ": the build must have kernels for this device's architecture, got others; 'tersetorch doctor' "
                    "lists them, build with CUDAARCHS");
    STD_TORCH_CHECK(error != kBadGrid, op_,
                    ": a call must need fewer than 2^31 blocks of threads, got more; pass fewer samples at once");
    STD_TORCH_CHECK(false, op_, ": CUDA must accept the launch, got cudaError_t ", error,
                    "; an earlier kernel may have failed");
  }

 private:
  static Place Device(const char* op, const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cuda(), op, ": ", name,
                    " must be on the CUDA device of the other tensors, got another; move it");
    return t.get_device_index();
  }

  const char* op_;
  Place place_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Bytes of the panels that a sparse product makes of its samples, by eights.
inline std::int64_t PanelBytes(std::int64_t samples, std::int64_t features, std::int64_t item_bytes) {
  return samples == 1 ? 0 : (samples + 7) / 8 * 8 * features * item_bytes;
}

#else

// Stands in for every op on CUDA tensors where the build has no CUDA kernels.
inline void NotBuiltForCuda(StableIValue*, std::uint64_t, std::uint64_t) {
  STD_TORCH_CHECK(
      false,
      "tersetorch: CUDA tensors need a build with CUDA kernels, got one without; install nvcc and build with "
      "TERSETORCH_CUDA=1, or move the tensors to the CPU");
}

#endif

}  // namespace tersetorch
