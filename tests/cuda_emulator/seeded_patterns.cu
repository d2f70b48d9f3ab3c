#include "emulator.h"
#include "kernels/common/cuda.cuh"
#include "seeded_bugs.h"

namespace {

using namespace tersetorch;

// A warp writes rows of a tile and reads its columns.
template <int kPitch>
__global__ void TransposesATile(const float* in, float* out) {
  struct Tile {
    float values[kWarpSize][kPitch];
  };
  Tile& tile = SharedMemory<Tile>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < kWarpSize; ++i) {
    const float value = in[i * kWarpSize + lane];
    tile.values[i][lane] = value;
  }
  __syncwarp();
  for (int i = 0; i < kWarpSize; ++i) {
    const float value = tile.values[lane][i];
    out[i * kWarpSize + lane] = value;
  }
}

template <typename T, int kStride>
__global__ void ReadsWithAStride(const T* in, T* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const T value = in[lane * kStride];
  out[lane] = value;
}

// Lanes that all read word 0, words in turn, or words of one bank, after as many turns as they have numbers.
template <typename T, int kStride>
__global__ void ReadsShared(const int* in, T* out) {
  struct Memory {
    T values[kWarpSize * (kStride == 0 ? 1 : kStride)];
  };
  Memory& memory = SharedMemory<Memory>();
  const int lane = static_cast<int>(threadIdx.x);
  for (T& value : memory.values) {
    if (lane == 0) value = T{};
  }
  __syncwarp();
  T last{};
  const int turns = in[lane];
  for (int turn = 0; turn <= turns; ++turn) last = memory.values[lane * kStride];
  out[lane] = last;
}

__global__ void AddsToOneWord(const int*, int* out) {
  struct Memory {
    int sum;
  };
  Memory& memory = SharedMemory<Memory>();
  if (threadIdx.x == 0) memory.sum = 0;
  __syncwarp();
  atomicAdd(&memory.sum, 1);
  __syncwarp();
  out[threadIdx.x] = memory.sum;
}

// What the line with the most cycles for a request took, or that with the most sectors; the last of equals.
template <typename In, typename Out>
cuda_emulator::AccessCount Worst(void (*kernel)(const In*, Out*), bool shared) {
  constexpr int kCount = kWarpSize * kWarpSize;
  In* in;
  Out* out;
  cudaMalloc(reinterpret_cast<void**>(&in), kCount * sizeof(In));
  cudaMalloc(reinterpret_cast<void**>(&out), kCount * sizeof(Out));
  std::vector<int> turns(kCount * sizeof(In) / sizeof(int));
  for (int i = 0; i < kCount; ++i) turns[i] = i % 3;
  cudaMemcpy(in, turns.data(), kCount * sizeof(In), cudaMemcpyHostToDevice);
  cuda_emulator::CountAccesses(true);
  Launch(kernel, 1, kWarpSize, nullptr, static_cast<const In*>(in), out);
  cuda_emulator::AccessCount worst;
  const auto of_request = [shared](const cuda_emulator::AccessCount& count) {
    const std::uint64_t requests = shared ? count.shared_requests : count.global_requests;
    return requests == 0 ? 0 : static_cast<double>(shared ? count.bank_cycles : count.sectors) / requests;
  };
  for (const auto& [line, count] : cuda_emulator::AccessCounts()) {
    if (of_request(count) >= of_request(worst)) worst = count;
  }
  cuda_emulator::CountAccesses(false);
  cudaFree(in);
  cudaFree(out);
  return worst;
}

}  // namespace

std::vector<SeededPattern> SeededPatterns() {
  return {
      {"columns of a tile of pitch 32", Worst(TransposesATile<32>, true), 32, 32 * 32, 32},
      {"columns of a tile of pitch 33", Worst(TransposesATile<33>, true), 32, 32, 32},
      {"neighbouring floats", Worst(ReadsWithAStride<float, 1>, false), 1, 4, 4},
      {"floats a sector apart", Worst(ReadsWithAStride<float, 8>, false), 1, 32, 4},
      {"every other float", Worst(ReadsWithAStride<float, 2>, false), 1, 8, 4},
      {"neighbouring vectors", Worst(ReadsWithAStride<float4, 1>, false), 1, 16, 16},
      {"one word", Worst(ReadsShared<float, 0>, true), 3, 3, 3},
      {"neighbouring words in loops of different length", Worst(ReadsShared<float, 1>, true), 3, 3, 3},
      {"words of one bank in loops of different length", Worst(ReadsShared<float, 32>, true), 3, 32 + 21 + 10, 3},
      {"neighbouring pairs", Worst(ReadsShared<float2, 1>, true), 3, 6, 6},
      {"pairs 128 bytes apart", Worst(ReadsShared<float2, 16>, true), 3, 32 + 21 + 10, 6},
      {"neighbouring vectors in shared memory", Worst(ReadsShared<float4, 1>, true), 3, 12, 12},
      {"vectors 32 bytes apart", Worst(ReadsShared<float4, 2>, true), 3, 8 + 8 + 4, 12},
      {"additions to one word", Worst(AddsToOneWord, true), 1, 32, 1},
  };
}
