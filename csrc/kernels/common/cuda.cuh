// What the CUDA kernels share: numbers, stored values, memory, sums over a warp, tiles and the launch.
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

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/common/float_dtype.h"
#ifndef __CUDACC__
#include "kernels/common/float16.h"
#endif

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
struct Float16 {
  std::uint16_t bits;
};

__device__ inline float ToFloat(float value) { return value; }
__device__ inline float ToFloat(BFloat16 value) { return __uint_as_float(std::uint32_t{value.bits} << 16); }
__device__ inline float ToFloat(Float16 value) {
#ifdef __CUDACC__
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(value.bits));
  return number;
#else
  return FromFloat16(value.bits);
#endif
}

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
// Nearest, ties to even, from 65,520 on infinite; which NaN a NaN becomes is the device's choice.
template <>
__device__ inline Float16 FromFloat<Float16>(float value) {
#ifdef __CUDACC__
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#else
  return {ToFloat16(value)};
#endif
}

// Calls run with a number of the type in which floats are stored. The branch is the same for all threads: where a type
// for a kernel is not worth one more of it.
template <typename Run>
__device__ void WithFloatOnDevice(FloatDtype stored_as, const Run& run) {
  if (stored_as == FloatDtype::kFloat32) {
    run(float{});
  } else if (stored_as == FloatDtype::kBFloat16) {
    run(BFloat16{});
  } else {
    run(Float16{});
  }
}
// Element i of floats, in the same way.
__device__ inline float FloatAt(const void* floats, FloatDtype stored_as, std::int64_t i) {
  float number = 0;
  WithFloatOnDevice(stored_as, [&](auto type) { number = ToFloat(static_cast<const decltype(type)*>(floats)[i]); });
  return number;
}
__device__ inline void PutFloat(void* floats, FloatDtype stored_as, std::int64_t i, float number) {
  WithFloatOnDevice(stored_as, [&](auto type) {
    using Float = decltype(type);
    static_cast<Float*>(floats)[i] = FromFloat<Float>(number);
  });
}

// What stands in a result for which the weight names no value. Kernels cannot raise, and asking them would make every
// call wait for the device.
__device__ inline float DamagedWeight() { return __uint_as_float(0x7fc00000u); }

// How the stored numbers of a weight w, any struct with values, codebook and entries, are read; a code without an entry
// is damaged.
struct Float32Values {
  template <typename Weight>
  __device__ static bool Damaged(const Weight&, std::int64_t) {
    return false;
  }
  template <typename Weight>
  __device__ static float At(const Weight& w, std::int64_t k) {
    return static_cast<const float*>(w.values)[k];
  }
};
struct BFloat16Values {
  template <typename Weight>
  __device__ static bool Damaged(const Weight&, std::int64_t) {
    return false;
  }
  template <typename Weight>
  __device__ static float At(const Weight& w, std::int64_t k) {
    return ToFloat(static_cast<const BFloat16*>(w.values)[k]);
  }
};
struct Int8Values {
  template <typename Weight>
  __device__ static bool Damaged(const Weight&, std::int64_t) {
    return false;
  }
  template <typename Weight>
  __device__ static int At(const Weight& w, std::int64_t k) {
    return static_cast<const std::int8_t*>(w.values)[k];
  }
};
struct CodeValues {
  template <typename Weight>
  __device__ static bool Damaged(const Weight& w, std::int64_t k) {
    return static_cast<const std::uint8_t*>(w.values)[k] >= w.entries;
  }
  template <typename Weight>
  __device__ static float At(const Weight& w, std::int64_t k) {
    return w.codebook[static_cast<const std::uint8_t*>(w.values)[k]];
  }
};

// ---- memory

#ifdef __CUDACC__
// The block's variable of this type; T is a struct that holds all the shared memory of a kernel.
template <typename T>
__device__ T& SharedMemory() {
  __shared__ T memory;
  return memory;
}
// The same for a launch with LaunchWithMemory, which takes more than 48 KiB.
template <typename T>
__device__ T* DynamicSharedMemory() {
  extern __shared__ uint4 dynamic_memory[];
  return reinterpret_cast<T*>(dynamic_memory);
}
#else
using cuda_emulator::DynamicSharedMemory;
using cuda_emulator::SharedMemory;
#endif

// ---- warps

// The sum over the lanes, in every lane; all of them call it.
template <typename T>
__device__ T WarpSum(T value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

// ---- tiles

// A warp multiplies one row of the weight with some samples: a lane decodes a non-zero once for all of them.
struct RowTile {
  static constexpr int kWarps = 4;
  static constexpr int kSamples = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static_assert(kSamples <= kWarpSize, "lane s stores sample s");

  __device__ static std::int64_t RowOfWarp() { return std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize; }
};

// A block reads one sample.
struct SampleTile {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;

  struct Memory {
    std::uint32_t largest[kWarps];
  };
};

// Samples side by side: whoever needs a column reads all of them in one go.
constexpr int kPanelSamples = 8;

template <typename X>
struct alignas(kPanelSamples * sizeof(X) < 16 ? kPanelSamples * sizeof(X) : 16) PanelColumn {
  X of_sample[kPanelSamples];
};

struct PanelPackTile {
  static constexpr int kThreads = 256;
};

// Panels [CeilDiv(samples, 8), columns] of x [samples, columns]; 0 for samples past the last.
template <typename Tile, typename X>
__global__ void __launch_bounds__(Tile::kThreads)
    PackPanels(const X* x, PanelColumn<X>* panels, std::int64_t samples, std::int64_t columns) {
  const std::int64_t c = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  if (c >= columns) return;
  for (std::int64_t panel = blockIdx.y; panel * kPanelSamples < samples; panel += gridDim.y) {
    PanelColumn<X> numbers;
#pragma unroll
    for (int s = 0; s < kPanelSamples; ++s) {
      const std::int64_t n = panel * kPanelSamples + s;
      numbers.of_sample[s] = n < samples ? x[n * columns + c] : X{};
    }
    panels[panel * columns + c] = numbers;
  }
}

// The bits of the largest |x| of a sample, in every thread of the block; all of them call it, once. Compared as
// integers: infinities are above all numbers, and NaN above them.
template <typename Tile, typename Float>
__device__ std::uint32_t LargestBits(const Float* x, std::int64_t features) {
  auto& memory = SharedMemory<typename Tile::Memory>();
  const int thread = static_cast<int>(threadIdx.x);
  std::uint32_t largest = 0;
  for (std::int64_t c = thread; c < features; c += Tile::kThreads) {
    largest = max(largest, __float_as_uint(ToFloat(x[c])) & 0x7fffffffu);
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, distance));
  }
  if (thread % kWarpSize == 0) memory.largest[thread / kWarpSize] = largest;
  __syncthreads();
  for (int warp = 0; warp < Tile::kWarps; ++warp) largest = max(largest, memory.largest[warp]);
  return largest;
}

// ---- launch

// A kernel that was launched with LaunchEarly may begin while the one ahead of it on the stream runs, if that one calls
// LetNextBegin: what that one writes it reads after WaitForPrevious. Elsewhere both are nothing.
__device__ inline void LetNextBegin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void WaitForPrevious() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif !defined(__CUDACC__)
  cuda_emulator::WaitForPrevious();
#endif
}

// Blocks on the x axis; none, which CUDA refuses, where that takes fewer than there are.
inline unsigned BlocksOnX(std::int64_t size, std::int64_t part = 1) {
  constexpr std::int64_t kMost = 0x7fffffff;
  const std::int64_t blocks = CeilDiv(size, part);
  return blocks <= kMost ? static_cast<unsigned>(blocks) : 0;
}

// Blocks on the y axis, which walks the parts of `size`, several times where there are more than fill any GPU.
inline unsigned BlocksOnY(std::int64_t size, std::int64_t part) {
#ifdef __CUDACC__
  constexpr std::int64_t most = 8192;  // of the 65,535 that CUDA takes
#else
  const std::int64_t most = cuda_emulator::MostBlocksOnY();
#endif
  return static_cast<unsigned>(std::min(CeilDiv(size, part), most));
}

inline dim3 RowGrid(std::int64_t rows, std::int64_t samples) {
  return {BlocksOnX(rows, RowTile::kWarps), BlocksOnY(samples, RowTile::kSamples), 1};
}

// Calls run with a number of the type in which floats are stored.
template <typename Run>
int WithFloat(FloatDtype stored_as, const Run& run) {
  if (stored_as == FloatDtype::kFloat32) return run(float{});
  return stored_as == FloatDtype::kBFloat16 ? run(BFloat16{}) : run(Float16{});
}

template <typename... Parameters, typename... Arguments>
int LaunchConfigured(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, std::size_t bytes, bool early,
                     void* stream, const Arguments&... arguments) {
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (bytes > kWithoutAsking) {
    const int error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  int device = 0, major = 0;
  cudaLaunchAttribute attribute{};
  if (early && cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// With so many bytes of dynamic shared memory; sm_75 has 65,536 for a block.
template <typename... Parameters, typename... Arguments>
int LaunchWithMemory(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, std::size_t bytes, void* stream,
                     const Arguments&... arguments) {
  return LaunchConfigured(kernel, blocks, threads, bytes, false, stream, arguments...);
}
// The same, early if it may be.
template <typename... Parameters, typename... Arguments>
int LaunchEarly(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, std::size_t bytes, void* stream,
                const Arguments&... arguments) {
  return LaunchConfigured(kernel, blocks, threads, bytes, true, stream, arguments...);
}

template <typename... Parameters, typename... Arguments>
int Launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void* stream, const Arguments&... arguments) {
  return LaunchWithMemory(kernel, blocks, threads, 0, stream, arguments...);
}

template <typename X>
int LaunchPackPanels(const void* x, void* panels, std::int64_t samples, std::int64_t columns, void* stream) {
  if (columns == 0) return cudaSuccess;
  const dim3 grid(BlocksOnX(columns, PanelPackTile::kThreads), BlocksOnY(samples, kPanelSamples));
  return Launch(PackPanels<PanelPackTile, X>, grid, PanelPackTile::kThreads, stream, static_cast<const X*>(x),
                static_cast<PanelColumn<X>*>(panels), samples, columns);
}

}  // namespace
}  // namespace tersetorch
