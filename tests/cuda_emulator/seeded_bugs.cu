#include <initializer_list>
#include <utility>

#include "emulator.h"
#include "kernels/common/cuda.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "seeded_bugs.h"

namespace {

using namespace tersetorch;

constexpr int kThreads = 64, kCount = 150, kBlocks = 3;

// Device memory with the numbers 0, 1, 2, ... or, as an output, with nothing.
template <typename T>
class Array {
 public:
  explicit Array(int count, bool output = false) : count_(count) {
    cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T));
    std::vector<T> numbers(count);
    for (int i = 0; i < count; ++i) numbers[i] = static_cast<T>(i);
    if (!output) cudaMemcpy(data_, numbers.data(), count * sizeof(T), cudaMemcpyHostToDevice);
    if (!output) cuda_emulator::MakeReadOnly(data_);
  }
  ~Array() { cudaFree(data_); }
  T* data() { return data_; }
  std::vector<T> Values() {
    std::vector<T> values(count_);
    cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost);
    return values;
  }

 private:
  T* data_;
  int count_;
};

// Runs kernel(in, out, kCount) on kBlocks blocks; want(i) is the right out[i].
template <typename T, typename Want>
int Run(void (*kernel)(const T*, T*, int), const Want& want, int outputs = kCount, bool cleared = false) {
  Array<T> in(kCount), out(outputs, true);
  if (cleared) cudaMemset(out.data(), 0, outputs * sizeof(T));
  if (const int error = Launch(kernel, kBlocks, kThreads, nullptr, in.data(), out.data(), kCount)) return error;
  const std::vector<T> got = out.Values();
  for (int i = 0; i < outputs; ++i) {
    if (got[i] != static_cast<T>(want(i))) return -1;
  }
  return cudaSuccess;
}

struct Tile {
  float values[kThreads];
};

__device__ int Index() { return static_cast<int>(blockIdx.x * kThreads + threadIdx.x); }
// The mirror image of i in its block, as far as the array goes.
int Mirrored(int i) {
  const int mirror = i / kThreads * kThreads + kThreads - 1 - i % kThreads;
  return mirror < kCount ? mirror : 0;
}

template <bool kBug>
__global__ void NoBarrierAfterFilling(const float* in, float* out, int count) {
  Tile& tile = SharedMemory<Tile>();
  const int i = Index(), t = static_cast<int>(threadIdx.x);
  tile.values[t] = i < count ? in[i] : 0;
  if (!kBug) __syncthreads();
  if (i < count) out[i] = tile.values[kThreads - 1 - t];
}

template <bool kBug>
__global__ void NoBarrierBeforeRefilling(const float* in, float* out, int count) {
  Tile& tile = SharedMemory<Tile>();
  const int t = static_cast<int>(threadIdx.x);
  for (int first = 0; first < count; first += kThreads) {
    const int i = first + t;
    tile.values[t] = i < count ? in[i] : 0;
    __syncthreads();
    if (i < count && blockIdx.x == 0) out[i] = tile.values[kThreads - 1 - t];
    if (!kBug) __syncthreads();
  }
}

template <bool kBug>
__global__ void ReadsBehindTheEnd(const float* in, float* out, int count) {
  const int i = Index();
  if (i < count) out[i] = kBug || i + 1 < count ? in[i + 1] : 0;
}

template <bool kBug>
__global__ void ReadsBeforeTheBegin(const float* in, float* out, int count) {
  const int i = Index();
  if (i < count) out[i] = kBug || i > 0 ? in[i - 1] : 0;
}

template <bool kBug>
__global__ void WritesBehindTheEnd(const float* in, float* out, int count) {
  const int i = Index();
  if (kBug || i < count) out[i] = i < count ? in[i] : 0;
}

template <bool kBug>
__global__ void IndexesATileOneTooFar(const float* in, float* out, int count) {
  struct Two {
    float a[kThreads], b[kThreads];  // the mistake lands inside the struct
  };
  Two& tile = SharedMemory<Two>();
  const int i = Index(), t = static_cast<int>(threadIdx.x);
  tile.a[t] = tile.b[t] = i < count ? in[i] : 0;
  __syncthreads();
  if (i < count) out[i] = tile.a[kThreads - 1 - t + (kBug ? 1 : 0)];
}

template <bool kBug>
__global__ void ReadsAnUnwrittenTile(const float* in, float* out, int count) {
  Tile& tile = SharedMemory<Tile>();
  const int i = Index(), t = static_cast<int>(threadIdx.x);
  if (i < count) {
    tile.values[t] = in[i];
  } else if (!kBug) {
    tile.values[t] = 0;
  }
  __syncthreads();
  if (i < count) out[i] = tile.values[kThreads - 1 - t];
}

template <bool kBug>
__global__ void AddsWithoutAtomics(const float* in, float* out, int count) {
  const int i = Index();
  if (i >= count) return;
  if (kBug) {
    out[i % 4] += in[i];
  } else {
    atomicAdd(out + i % 4, in[i]);
  }
}

template <bool kBug>
__global__ void AddsToUnclearedMemory(const float* in, float* out, int count) {
  const int i = Index();
  if (i >= count) return;
  if (!kBug) out[i] = 0;
  atomicAdd(out + i, in[i]);
}

template <bool kBug>
__global__ void ReadsACounterThatOthersRaise(const unsigned*, unsigned* out, int) {
  atomicAdd(out, 1u);
  if (kBug && *out > 1000) out[1] = 1;
}

template <bool kBug>
__global__ void BarrierInABranch(const float* in, float* out, int count) {
  Tile& tile = SharedMemory<Tile>();
  const int i = Index(), t = static_cast<int>(threadIdx.x);
  tile.values[t] = i < count ? in[i] : 0;
  if (kBug && t < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (i < count) out[i] = tile.values[kThreads - 1 - t];
}

template <bool kBug>
__global__ void ExitsBeforeABarrier(const float* in, float* out, int count) {
  Tile& tile = SharedMemory<Tile>();
  const int i = Index(), t = static_cast<int>(threadIdx.x);
  if (kBug && i >= count) return;
  tile.values[t] = i < count ? in[i] : 0;
  __syncthreads();
  if (i < count) out[i] = i / kThreads == (count - 1) / kThreads ? in[i] : tile.values[kThreads - 1 - t];
}

template <bool kBug>
__global__ void ShuffleMaskLeavesOutTheCaller(const float* in, float* out, int count) {
  const int i = Index();
  const float value = __shfl_xor_sync(kBug ? 0x0000ffffu : kWholeWarp, i < count ? in[i] : 0, 1);
  if (i < count) out[i] = value;
}

template <bool kBug>
__global__ void ShuffleOfAWholeWarpInABranch(const float* in, float* out, int count) {
  const int i = Index();
  if (i >= count) return;
  float value = in[i];
  if (kBug && threadIdx.x % 32 < 4) value = __shfl_xor_sync(kWholeWarp, value, 1);
  out[i] = value;
}

template <bool kBug>
__global__ void ShuffleReadsALaneOutsideItsMask(const float* in, float* out, int count) {
  const int i = Index();
  float value = i < count ? in[i] : 0;
  if (threadIdx.x % 32 < 16) value = __shfl_sync(0x0000ffffu, value, kBug ? 20 : 0);
  if (i < count) out[i] = value;
}

template <bool kBug>
__global__ void NoBarrierInTheWarp(const float* in, float* out, int count) {
  Tile& tile = SharedMemory<Tile>();
  const int i = Index(), t = static_cast<int>(threadIdx.x);
  tile.values[t] = i < count ? in[i] : 0;
  if (!kBug) __syncwarp();
  if (i < count) out[i] = tile.values[t ^ 1];
}

template <bool kBug>
__global__ void HalfAWarpWaitsElsewhere(const float* in, float* out, int count) {
  const int i = Index();
  if (kBug && threadIdx.x % 32 < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  if (i < count) out[i] = in[i];
}

template <bool kBug>
__global__ void MisalignedVector(const float* in, float* out, int count) {
  const int i = 4 * Index() + (kBug ? 1 : 0);
  if (i + 4 > count) return;
  const float4 four = *reinterpret_cast<const float4*>(in + i);
  out[i] = four.x;
  out[i + 1] = four.y;
  out[i + 2] = four.z;
  out[i + 3] = four.w;
}

template <bool kBug>
__global__ void WritesToItsInput(const float* in, float* out, int count) {
  const int i = Index();
  if (i >= count) return;
  if (kBug) const_cast<float*>(in)[i] = 0;
  out[i] = in[i];
}

template <bool kBug>
__global__ void TwoThreadsWriteOneByte(const std::uint8_t* in, std::uint8_t* out, int count) {
  const int i = Index();
  if (i < count) out[kBug ? i / 2 : i] = in[i];  // neighbouring bytes of one word are nobody else's
}

template <bool kBug>
__global__ void OverflowsAnIndex(const int* in, int* out, int count) {
  const int i = Index();
  if (i < count) out[i] = in[i] * (kBug ? 1 << 28 : 2);
}

template <bool kBug>
__global__ void ReturnsAPointerToItsStack(const float* in, float* out, int count) {
  struct Pointers {
    const float* of[kThreads];
  };
  Pointers& pointers = SharedMemory<Pointers>();
  const int i = Index(), t = static_cast<int>(threadIdx.x);
  float own[2] = {i < count ? in[i] : 0, 0};
  pointers.of[t] = kBug ? own : in;
  __syncthreads();
  const float value = pointers.of[kThreads - 1 - t][0];
  __syncthreads();
  if (i < count) out[i] = value + own[1];
}

__global__ void FillsDynamicMemory(float* out) {
  float* tile = cuda_emulator::DynamicSharedMemory<float>();
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

template <bool kBug>
__global__ void ReadsWhatTheKernelBeforeWrites(const float* in, float* out, int count) {
  if (!kBug) WaitForPrevious();
  const int i = Index();
  if (i < count) out[i] = in[i];
}

__global__ void LetsTheNextBegin(float* out, int count) {
  LetNextBegin();
  const int i = Index();
  if (i < count) out[i] = static_cast<float>(i);
}

int LaunchTwo(bool bug) {
  Array<float> between(kCount, true), out(kCount, true);
  if (const int error = Launch(LetsTheNextBegin, kBlocks, kThreads, nullptr, between.data(), kCount)) return error;
  return LaunchEarly(bug ? ReadsWhatTheKernelBeforeWrites<true> : ReadsWhatTheKernelBeforeWrites<false>, kBlocks,
                     kThreads, 0, nullptr, static_cast<const float*>(between.data()), out.data(), kCount);
}

int LaunchWithDynamicMemory(std::size_t bytes, unsigned threads) {
  Array<float> out(kThreads, true);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  return cudaLaunchKernelEx(&config, FillsDynamicMemory, out.data());
}

// Two floats of each thread on their way to shared memory, where its neighbour reads them, and two more behind them.
enum class CopyBug {
  kNone,
  kNoWait,
  kNoCommit,
  kOneGroupTooFew,
  kNoBarrier,
  kWritesSource,
  kWritesTarget,
  kCopiesTwice,
  kRefillsTooEarly,
  kExits
};

template <CopyBug kBug>
__global__ void CopiesWhileItGoesOn(const float* in, float* out, int count) {
  struct Stages {
    alignas(16) float values[2][2 * kThreads];
  };
  Stages& memory = SharedMemory<Stages>();
  const int t = static_cast<int>(threadIdx.x), first = 2 * Index();
  const bool inside = first + 1 < count;
  const float* from = in + first;
  if (kBug == CopyBug::kWritesSource && inside) {
    from = out + first;
    out[first] = in[first];
    out[first + 1] = in[first + 1];
  }
  for (int stage = 0; stage < 2; ++stage) {
    float* to = memory.values[stage] + 2 * t;
    if (inside) {
      CopyAsync8(to, from);
    } else {
      to[0] = to[1] = 0;
    }
    if (kBug == CopyBug::kWritesTarget && inside) to[1] = 0;
    if (kBug == CopyBug::kCopiesTwice && inside) CopyAsync8(to, from);
    if (kBug != CopyBug::kNoCommit) CommitCopies();
  }
  if (kBug == CopyBug::kWritesSource && inside) out[first] = 0;
  if (kBug != CopyBug::kNoWait) WaitForCopies<kBug == CopyBug::kOneGroupTooFew ? 1 : 0>();
  if (kBug != CopyBug::kNoBarrier) __syncthreads();
  const float low = memory.values[1][2 * (t ^ 1)], high = memory.values[0][2 * (t ^ 1) + 1];
  if (kBug != CopyBug::kRefillsTooEarly) __syncthreads();
  if (inside) CopyAsync8(memory.values[0] + 2 * t, in + first);
  CommitCopies();
  if (kBug != CopyBug::kExits) WaitForCopies<0>();
  if (inside) {
    out[first] = low;
    out[first + 1] = high;
  }
}

template <CopyBug kBug>
int RunCopies(bool bug) {
  const auto want = [](int i) { return (i ^ 2) < kCount ? i ^ 2 : 0; };
  return bug ? Run(CopiesWhileItGoesOn<kBug>, want) : Run(CopiesWhileItGoesOn<CopyBug::kNone>, want);
}

template <bool kBug>
__global__ void CopiesOffItsAlignment(const float* in, float* out, int count) {
  struct Stage {
    alignas(16) float values[4 * kThreads];
  };
  Stage& memory = SharedMemory<Stage>();
  const int t = static_cast<int>(threadIdx.x), first = 4 * Index() + (kBug ? 1 : 0);
  if (first + 4 > count) return;
  CopyAsync16(memory.values + 4 * t, in + first);
  CommitCopies();
  WaitForCopies<0>();
  for (int i = 0; i < 4; ++i) out[first + i] = memory.values[4 * t + i];
}

int Same(int i) { return i; }
int SumOfResidue(int i) {
  int sum = 0;
  for (int j = i; j < kCount; j += 4) sum += j;
  return sum;
}

#define KERNEL(name, ...) [](bool bug) { return bug ? Run(name<true>, __VA_ARGS__) : Run(name<false>, __VA_ARGS__); }

}  // namespace

std::vector<SeededBug> SeededBugs() {
  return {
      {"no barrier after filling a tile", {"race", "uninitialised"}, KERNEL(NoBarrierAfterFilling, Mirrored)},
      {"no barrier before refilling a tile", {"race"}, KERNEL(NoBarrierBeforeRefilling, Mirrored)},
      {"reads behind the end", {"bounds"}, KERNEL(ReadsBehindTheEnd, [](int i) { return i + 1 < kCount ? i + 1 : 0; })},
      {"reads before the begin", {"bounds"}, KERNEL(ReadsBeforeTheBegin, [](int i) { return i == 0 ? 0 : i - 1; })},
      {"writes behind the end", {"bounds"}, KERNEL(WritesBehindTheEnd, Same)},
      {"indexes an array in shared memory one too far", {"bounds"}, KERNEL(IndexesATileOneTooFar, Mirrored)},
      {"reads unwritten shared memory", {"uninitialised"}, KERNEL(ReadsAnUnwrittenTile, Mirrored)},
      {"adds without atomics", {"race"}, KERNEL(AddsWithoutAtomics, SumOfResidue, 4, true)},
      {"adds to memory nobody cleared", {"uninitialised"}, KERNEL(AddsToUnclearedMemory, Same)},
      {"reads a counter while others raise it",
       {"race"},
       KERNEL(
           ReadsACounterThatOthersRaise, [](int) { return kThreads * kBlocks; }, 1, true)},
      {"barriers in both arms of a branch", {"barrier"}, KERNEL(BarrierInABranch, Mirrored)},
      {"exits before a barrier",
       {"barrier"},
       KERNEL(ExitsBeforeABarrier, [](int i) { return i / kThreads == kBlocks - 1 ? i : Mirrored(i); })},
      {"a shuffle's mask leaves out its caller",
       {"mask"},
       KERNEL(ShuffleMaskLeavesOutTheCaller, [](int i) { return i ^ 1; })},
      {"a shuffle of the whole warp in a branch", {"mask"}, KERNEL(ShuffleOfAWholeWarpInABranch, Same)},
      {"a shuffle reads a lane outside its mask",
       {"mask"},
       KERNEL(ShuffleReadsALaneOutsideItsMask, [](int i) { return i % 32 < 16 ? i / 32 * 32 : i; })},
      {"no barrier in the warp", {"race", "uninitialised"}, KERNEL(NoBarrierInTheWarp, [](int i) { return i ^ 1; })},
      {"half a warp waits elsewhere", {"deadlock"}, KERNEL(HalfAWarpWaitsElsewhere, Same)},
      {"a vector load off its alignment", {"misaligned"}, KERNEL(MisalignedVector, Same, kCount / 4 * 4)},
      {"writes to its input", {"read-only"}, KERNEL(WritesToItsInput, Same)},
      {"two threads write one byte", {"race"}, KERNEL(TwoThreadsWriteOneByte, Same)},
      {"an index overflows", {"arithmetic"}, KERNEL(OverflowsAnIndex, [](int i) { return 2 * i; })},
      {"hands out a pointer to its stack", {"bounds"}, KERNEL(ReturnsAPointerToItsStack, [](int) { return 0; })},
      {"reads what it has not waited for", {"asynchronous"}, RunCopies<CopyBug::kNoWait>},
      {"waits for copies that it has not committed", {"asynchronous"}, RunCopies<CopyBug::kNoCommit>},
      {"waits for one group too few", {"asynchronous"}, RunCopies<CopyBug::kOneGroupTooFew>},
      {"no barrier after waiting for copies",
       {"race", "asynchronous", "uninitialised"},
       RunCopies<CopyBug::kNoBarrier>},
      {"writes to what is being copied", {"asynchronous"}, RunCopies<CopyBug::kWritesSource>},
      {"writes to where a copy goes", {"asynchronous"}, RunCopies<CopyBug::kWritesTarget>},
      {"copies to where a copy goes", {"asynchronous"}, RunCopies<CopyBug::kCopiesTwice>},
      {"copies to what others still read", {"race", "asynchronous"}, RunCopies<CopyBug::kRefillsTooEarly>},
      {"exits with copies on their way", {"asynchronous"}, RunCopies<CopyBug::kExits>},
      {"a copy off its alignment", {"misaligned"}, KERNEL(CopiesOffItsAlignment, Same, kCount / 4 * 4)},
      {"reads what the kernel before may be writing", {"asynchronous"}, LaunchTwo},
      {"asks for too little dynamic shared memory",
       {"bounds"},
       [](bool bug) { return LaunchWithDynamicMemory((bug ? kThreads - 1 : kThreads) * sizeof(float), kThreads); }},
      {"asks for more dynamic shared memory than granted",
       {"launch"},
       [](bool bug) { return LaunchWithDynamicMemory(bug ? 50000 : 1000, kThreads); }},
      {"a block of too many threads",
       {"launch"},
       [](bool bug) { return LaunchWithDynamicMemory(1000, bug ? 2048 : kThreads); }},
      {"waits for the device while a graph records",
       {"waiting"},
       [](bool bug) {
         Array<float> out(kThreads, true);
         cuda_emulator::ForbidWaiting(true);
         int error = cudaMemsetAsync(out.data(), 0, kThreads * sizeof(float), nullptr);
         if (bug) error = cudaDeviceSynchronize();
         cuda_emulator::ForbidWaiting(false);
         return error;
       }},
  };
}
