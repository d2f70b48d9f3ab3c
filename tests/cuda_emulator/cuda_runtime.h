// Stands in for CUDA's header of this name when a .cu file is compiled as host C++, so that tests execute its kernels
// on the CPU. Only what kernels, launchers and their tests use is here, with CUDA's spelling and meaning; README.md
// says what is not modelled.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <vector>

#define TERSETORCH_CUDA_EMULATOR 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// ---- built-in types and variables

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline constexpr int warpSize = 32;
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- the runtime

using cudaStream_t = struct CUstream_st*;

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaMemcpyKind : int { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaFuncAttribute : int { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

cudaError_t cudaMalloc(void** memory, std::size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemset(void* memory, int value, std::size_t bytes);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
enum cudaDeviceAttr : int { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : 9;
  return cudaSuccess;
}
inline constexpr int kCudaDevices = 2;
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = kCudaDevices;
  return cudaSuccess;
}

// One kernel after the other here, whatever is allowed.
enum cudaLaunchAttributeID : int { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_emulator {

using Site = std::source_location;

std::int64_t MostBlocksOnY();  // of the schedule
void WaitForPrevious();

struct Kernel {
  const void* address;
  void (*call)(const void* parameters);
  const void* parameters;
  std::size_t parameter_bytes;
  std::vector<char> packed;  // the parameters as CUDA passes them
};
// One behind the other, each at its alignment.
template <typename... Parameters>
std::vector<char> Packed(const Parameters&... parameters) {
  std::vector<char> bytes;
  const auto add = [&bytes](const auto& parameter) {
    constexpr std::size_t kAlignment = alignof(std::remove_cvref_t<decltype(parameter)>);
    bytes.resize((bytes.size() + kAlignment - 1) / kAlignment * kAlignment);
    const char* begin = reinterpret_cast<const char*>(&parameter);
    bytes.insert(bytes.end(), begin, begin + sizeof parameter);
  };
  (add(parameters), ...);
  return bytes;
}
cudaError_t Launch(const cudaLaunchConfig_t& config, const Kernel& kernel);
cudaError_t AllowDynamicSharedMemory(const void* kernel, int bytes);

// This block's variable of a type; each has its own memory between guards.
void* StaticSharedMemory(const void* key, std::size_t bytes, std::size_t alignment, Site site);
void* DynamicSharedMemoryBase();
template <typename T>
inline constexpr char kSharedMemoryKey = 0;

template <typename T>
T& SharedMemory(Site site = Site::current()) {
  return *static_cast<T*>(StaticSharedMemory(&kSharedMemoryKey<T>, sizeof(T), alignof(T), site));
}
template <typename T>
T* DynamicSharedMemory() {
  return static_cast<T*>(DynamicSharedMemoryBase());
}

enum class Barrier : int { kPlain, kCount, kAnd, kOr };
int BlockBarrier(Barrier kind, int predicate, Site site);
void WarpBarrier(unsigned mask, Site site);
// Each lane of the mask gives its value and the lane that it reads.
std::uint64_t Shuffle(unsigned mask, std::uint64_t value, int source_lane, Site site);
unsigned Ballot(unsigned mask, bool predicate, Site site);
// Each lane of the mask gives `bytes` bytes and gets those of all 32 lanes, of which the mask's are set.
void Gather(unsigned mask, const void* own, std::size_t bytes, void* all, Site site);
int Lane();

// ---- copies into shared memory that go on while the thread does
void CopyAsync(void* to, const void* from, std::size_t bytes);
void CommitCopies();
void WaitForCopies(int most_groups);

template <typename T>
T ShuffleValue(unsigned mask, T value, int source_lane, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic_v<T>, "a shuffle moves one number");
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = Shuffle(mask, bits, source_lane, site);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, std::tuple<Parameters...>(static_cast<Arguments&&>(arguments)...)};
  const auto run = [](const void* parameters) {
    const Call& call = *static_cast<const Call*>(parameters);
    std::apply(call.kernel, call.parameters);
  };
  return cuda_emulator::Launch(*config, {reinterpret_cast<const void*>(kernel), run, &call, sizeof call,
                                         std::apply(cuda_emulator::Packed<Parameters...>, call.parameters)});
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  return cuda_emulator::AllowDynamicSharedMemory(reinterpret_cast<const void*>(kernel), bytes);
}

// ---- barriers

inline void __syncthreads(cuda_emulator::Site site = cuda_emulator::Site::current()) {
  cuda_emulator::BlockBarrier(cuda_emulator::Barrier::kPlain, 0, site);
}
inline int __syncthreads_count(int predicate, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::BlockBarrier(cuda_emulator::Barrier::kCount, predicate, site);
}
inline int __syncthreads_and(int predicate, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::BlockBarrier(cuda_emulator::Barrier::kAnd, predicate, site);
}
inline int __syncthreads_or(int predicate, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::BlockBarrier(cuda_emulator::Barrier::kOr, predicate, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  cuda_emulator::WarpBarrier(mask, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- warps; a lane whose source lies outside its segment of `width` lanes gets its own value

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::ShuffleValue(mask, value, (cuda_emulator::Lane() & -width) | (source & (width - 1)), site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  cuda_emulator::Site site = cuda_emulator::Site::current()) {
  const int lane = cuda_emulator::Lane(), source = lane ^ lane_mask;
  return cuda_emulator::ShuffleValue(mask, value, (source & -width) > (lane & -width) ? lane : source, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   cuda_emulator::Site site = cuda_emulator::Site::current()) {
  const int lane = cuda_emulator::Lane();
  const bool inside = (lane & (width - 1)) + static_cast<int>(delta) < width;
  return cuda_emulator::ShuffleValue(mask, value, inside ? lane + static_cast<int>(delta) : lane, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 cuda_emulator::Site site = cuda_emulator::Site::current()) {
  const int lane = cuda_emulator::Lane();
  const bool inside = (lane & (width - 1)) >= static_cast<int>(delta);
  return cuda_emulator::ShuffleValue(mask, value, inside ? lane - static_cast<int>(delta) : lane, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::Ballot(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::Ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_emulator::Site site = cuda_emulator::Site::current()) {
  return cuda_emulator::Ballot(mask, predicate == 0, site) == 0;
}

// ---- atomics; each returns the old value

int atomicAdd(int* p, int value);
unsigned atomicAdd(unsigned* p, unsigned value);
unsigned long long atomicAdd(unsigned long long* p, unsigned long long value);
float atomicAdd(float* p, float value);
double atomicAdd(double* p, double value);
int atomicMax(int* p, int value);
unsigned atomicMax(unsigned* p, unsigned value);
int atomicMin(int* p, int value);
unsigned atomicOr(unsigned* p, unsigned value);
int atomicExch(int* p, int value);
unsigned atomicExch(unsigned* p, unsigned value);
int atomicCAS(int* p, int expected, int value);
unsigned atomicCAS(unsigned* p, unsigned expected, unsigned value);

// ---- numbers

template <typename T>
constexpr T max(T a, T b) {
  return std::max(a, b);
}
template <typename T>
constexpr T min(T a, T b) {
  return std::min(a, b);
}

template <typename T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
// Byte i of the result is the byte of y:x that nibble i of the selector names; its top bit would repeat a sign.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long both = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<std::int8_t>(a >> i) * static_cast<std::int8_t>(b >> i);
  return sum;
}
