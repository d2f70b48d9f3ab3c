// What the CUDA kernels share: numbers, memory, sums over a warp and the launch.
//
// A kernel's .cu file holds, in this order: tile traits (a struct of constexpr sizes, named after what one block or
// warp computes, with kThreads), the kernel as a template over them, and the launcher that its contract declares. A
// launcher enqueues on the stream that it is given; it neither waits nor allocates, and returns the cudaError_t of the
// launch. Rows lie on the grid's x axis: y and z stop at 65,535 blocks. Pointers are aligned to their element.
//
// Tests compile the same files as host C++ (tests/cuda_emulator), so they keep to what both compilers know: shared
// memory comes from SharedMemory, launches go through Launch, and inline PTX stands in functions with a branch for the
// host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tersetorch {
namespace {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

__host__ __device__ constexpr std::int64_t CeilDiv(std::int64_t size, std::int64_t part) {
  return (size + part - 1) / part;
}

// ---- numbers

struct BFloat16 {
  std::uint16_t bits;
};

__device__ inline float ToFloat(float value) { return value; }
__device__ inline float ToFloat(BFloat16 value) { return __uint_as_float(std::uint32_t{value.bits} << 16); }

template <typename T>
__device__ T FromFloat(float value);
template <>
__device__ inline float FromFloat<float>(float value) {
  return value;
}
// Nearest, ties to even; NaN stays NaN: the bits of ToBFloat16 in scalars.h.
template <>
__device__ inline BFloat16 FromFloat<BFloat16>(float value) {
  const std::uint32_t bits = __float_as_uint(value);
  if (value != value) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// What stands in a result for which the weight names no value. Kernels cannot raise, and asking them would make every
// call wait for the device.
__device__ inline float DamagedWeight() { return __uint_as_float(0x7fc00000u); }

// ---- memory

#ifdef __CUDACC__
// The block's variable of this type; T is a struct that holds all the shared memory of a kernel.
template <typename T>
__device__ T& SharedMemory() {
  __shared__ T memory;
  return memory;
}
#else
using cuda_emulator::SharedMemory;
#endif

// ---- warps

// The sum over the lanes, in every lane; all of them call it.
__device__ inline float WarpSum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

// ---- launch

template <typename... Parameters, typename... Arguments>
int Launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace
}  // namespace tersetorch
