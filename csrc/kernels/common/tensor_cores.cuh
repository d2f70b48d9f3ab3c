// Products of fragments on tensor cores, and copies into shared memory that nobody waits for until told to.
//
// Fragments (PTX ISA, m16n8k16 of bfloat16, m16n8k32 of int8, m16n8k256 of bits): lane 4 g + t of a warp holds 32-bit
// words with 2 bfloat16, 4 int8 or 32 bits of consecutive k. a[0] and a[2] are of row g of A, a[1] and a[3] of row g +
// 8; a[2], a[3] and b[1] begin in the middle of k; b is of column g of B, word t of each half. c[0] and c[1] are row g,
// columns 2 t and 2 t + 1 of C; c[2] and c[3] those of row g + 8. All need sm_80: a launcher asks HasTensorCores first.
#pragma once

#include "kernels/common/cuda.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define TERSETORCH_TENSOR_CORES 1
#else
#define TERSETORCH_TENSOR_CORES 0
#endif
// Products of bits are instructions of their own until sm_90; later ones take many for each.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
#define TERSETORCH_BINARY_TENSOR_CORES 1
#else
#define TERSETORCH_BINARY_TENSOR_CORES 0
#endif

namespace tersetorch {
namespace {

// The current device's, or 0.
inline int ComputeCapabilityMajor() {
  int device = 0, major = 0;
  const bool found = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess;
  return found ? major : 0;
}
// Whether the current device runs the kernels that were compiled with TERSETORCH_TENSOR_CORES.
inline bool HasTensorCores() { return ComputeCapabilityMajor() >= 8; }
inline bool HasBinaryTensorCores() { return ComputeCapabilityMajor() == 8 || ComputeCapabilityMajor() == 9; }

#ifdef __CUDACC__

// Two numbers rounded to bfloat16, the first in the lower half; which NaN a NaN becomes is the device's choice.
__device__ inline std::uint32_t RoundedPair(float low, float high) {
  std::uint32_t pair = 0;
#if TERSETORCH_TENSOR_CORES
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

// c += a * b, products and sums in float32.
__device__ inline void MultiplyFragments(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1) {
#if TERSETORCH_TENSOR_CORES
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
// The same of integers, modulo 2^32.
__device__ inline void MultiplyFragments(int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
#if TERSETORCH_TENSOR_CORES
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// c += the ones that a and b have in common.
__device__ inline void CountCommonOnes(int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
#if TERSETORCH_BINARY_TENSOR_CORES
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Copies 8 bytes; both addresses are multiples of 8.
__device__ inline void CopyAsync8(void* to, const void* from) {
#if TERSETORCH_TENSOR_CORES
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(from) : "memory");
#endif
}
// Copies 16 bytes; both addresses are multiples of 16.
__device__ inline void CopyAsync16(void* to, const void* from) {
#if TERSETORCH_TENSOR_CORES
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#endif
}
// Ends a group of copies.
__device__ inline void CommitCopies() {
#if TERSETORCH_TENSOR_CORES
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until this thread has at most kGroups unfinished groups; others see the copies after a barrier.
template <int kGroups>
__device__ void WaitForCopies() {
#if TERSETORCH_TENSOR_CORES
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

#else

inline std::uint32_t RoundedPair(float low, float high) {
  return FromFloat<BFloat16>(low).bits | std::uint32_t{FromFloat<BFloat16>(high).bits} << 16;
}

// The lanes' fragments come together, and each lane takes the rows and columns of its part of C.
template <typename Number, typename ProductOfWords>
void MultiplyOnHost(Number (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                    const ProductOfWords& product) {
  struct Fragment {
    std::uint32_t a[4], b[2];
  };
  const Fragment own{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  Fragment of[kWarpSize];
  cuda_emulator::Gather(kWholeWarp, &own, sizeof own, of, cuda_emulator::Site::current());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      for (int word = 0; word < 4; ++word) {
        c[i] += product(of[4 * g + word].a[i / 2 + 2 * half], of[4 * (2 * t + i % 2) + word].b[half]);
      }
    }
  }
}
inline void MultiplyFragments(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  MultiplyOnHost(c, a, b0, b1, [](std::uint32_t x, std::uint32_t y) {
    return __uint_as_float(x << 16) * __uint_as_float(y << 16) +
           __uint_as_float(x & 0xffff0000u) * __uint_as_float(y & 0xffff0000u);
  });
}
inline void MultiplyFragments(int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  MultiplyOnHost(c, a, b0, b1,
                 [](std::uint32_t x, std::uint32_t y) { return __dp4a(static_cast<int>(x), static_cast<int>(y), 0); });
}

inline void CountCommonOnes(int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  MultiplyOnHost(c, a, b0, b1, [](std::uint32_t x, std::uint32_t y) { return __popc(x & y); });
}

__forceinline__ void CopyAsync8(void* to, const void* from) { cuda_emulator::CopyAsync(to, from, 8); }
__forceinline__ void CopyAsync16(void* to, const void* from) { cuda_emulator::CopyAsync(to, from, 16); }
inline void CommitCopies() { cuda_emulator::CommitCopies(); }
template <int kGroups>
void WaitForCopies() {
  cuda_emulator::WaitForCopies(kGroups);
}

#endif

}  // namespace
}  // namespace tersetorch
