#include <cmath>

#include "kernels/common/cuda.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "kernels/sign_pack/sign_pack.h"
#include "kernels/xnor_matmul/xnor_matmul_cuda.h"

namespace tersetorch {
namespace {

constexpr int kFragmentSamples = 16, kFragmentRows = 8, kFragmentWords = 4;  // of 64 bits

__device__ float Scaled(const XnorMatmulArgs& a, std::int64_t r, int dot) {
  const float scale = a.scale == nullptr ? 1.0f : a.scale[r], bias = a.bias == nullptr ? 0.0f : a.bias[r];
  return fmaf(static_cast<float>(dot), scale, bias);
}

// Where the signs of a tile's rows go for sample n, a bit for each.
__device__ void StoreSigns(const XnorMatmulArgs& a, std::int64_t tile, std::int64_t n, std::uint32_t signs) {
  auto* y = reinterpret_cast<std::uint32_t*>(a.bits) + n * 2 * CeilDiv(a.rows, kSignBits);
  y[tile] = signs;
  // The second half of the last word, where no tile has it.
  if (tile % 2 == 0 && (tile + 1) * kXnorRows >= a.rows) y[tile + 1] = 0;
}

// A tile's row for sample n in each lane of a warp.
__device__ void StoreRow(const XnorMatmulArgs& a, std::int64_t tile, std::int64_t n, int lane, int dot) {
  const std::int64_t r = tile * kXnorRows + lane;
  const bool within = r < a.rows;
  if (a.bits != nullptr) {
    const unsigned signs = __ballot_sync(kWholeWarp, within && dot < a.thresholds[r]);
    if (lane == 0) StoreSigns(a, tile, n, signs);
  } else if (within && a.dots != nullptr) {
    a.dots[n * a.rows + r] = dot;
  } else if (within) {
    a.floats[n * a.rows + r] = Scaled(a, r, dot);
  }
}

// ---- one tile of rows; the warps of a block share the words

// For devices whose tensor cores take no bits: a lane has a row, and counts.
struct CountTile {
  static constexpr int kWarps = 8;
  static constexpr int kSamples = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
};

// On tensor cores, with some fragments of 16 samples.
template <int kFragments>
struct FragmentTile {
  static constexpr int kWarps = 8;
  static constexpr int kSamples = kFragments * kFragmentSamples;
  static constexpr int kThreads = kWarps * kWarpSize;
};

// What each warp counted for each sample and row. Half-warps write pairs of 8 rows for 4 samples, of which each begins
// 8 banks behind the one before.
template <typename Tile>
struct Counts {
  alignas(8) int of_warp[Tile::kWarps][Tile::kSamples][kWarpSize + 8];
};

// Words [begin, end) are this warp's, whole fragments but for the last.
template <typename Tile>
struct WordRange {
  __device__ explicit WordRange(const XnorMatmulArgs& a) {
    const std::int64_t of_warp = CeilDiv(CeilDiv(a.words, kFragmentWords), Tile::kWarps) * kFragmentWords;
    begin = min(a.words, threadIdx.x / kWarpSize * of_warp);
    end = min(a.words, begin + of_warp);
  }
  std::int64_t begin, end;
};

// y = columns - 2 * the sums over the warps.
template <typename Tile>
__device__ void StoreCounts(const XnorMatmulArgs& a, const Counts<Tile>& counts, std::int64_t first) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int s = warp; s < Tile::kSamples && first + s < a.samples; s += Tile::kWarps) {
    int differ = 0;
    for (int other = 0; other < Tile::kWarps; ++other) differ += counts.of_warp[other][s][lane];
    StoreRow(a, blockIdx.x, first + s, lane, static_cast<int>(a.columns) - 2 * differ);
  }
}

// Bits of three words added up: the sum's and, in `carry`, the next place's.
__device__ std::uint64_t Add(std::uint64_t a, std::uint64_t b, std::uint64_t c, std::uint64_t& carry) {
  carry = (a & b) | (c & (a | b));
  return a ^ b ^ c;
}

// A count of bits that holds single ones and pairs back.
struct Counter {
  std::uint64_t ones = 0, twos = 0;
  int fours = 0;

  __device__ void Take(const std::uint64_t (&words)[kFragmentWords]) {
    std::uint64_t first, second, carry;
    ones = Add(ones, words[0], words[1], first);
    ones = Add(ones, words[2], words[3], second);
    twos = Add(twos, first, second, carry);
    fours += __popcll(carry);
  }
  __device__ int Count() const { return 4 * fours + 2 * __popcll(twos) + __popcll(ones); }
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) XnorCountKernel(XnorMatmulArgs a) {
  auto& counts = SharedMemory<Counts<Tile>>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const std::uint64_t* weight = a.weight + std::int64_t{blockIdx.x} * a.words * kXnorRows + lane;
  const WordRange<Tile> range(a);
  const std::int64_t step = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples; first += step) {
    const int count = static_cast<int>(min(std::int64_t{Tile::kSamples}, a.samples - first));
    Counter counters[Tile::kSamples];
    for (std::int64_t i = range.begin; i < range.end; i += kFragmentWords) {
      std::uint64_t w[kFragmentWords];
#pragma unroll
      for (int k = 0; k < kFragmentWords; ++k) w[k] = i + k < range.end ? weight[(i + k) * kXnorRows] : 0;
#pragma unroll
      for (int s = 0; s < Tile::kSamples; ++s) {
        if (s >= count) break;
        const std::uint64_t* x = a.x + (first + s) * a.words + i;
        std::uint64_t differ[kFragmentWords];
#pragma unroll
        for (int k = 0; k < kFragmentWords; ++k) differ[k] = i + k < range.end ? w[k] ^ x[k] : 0;
        counters[s].Take(differ);
      }
    }
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) counts.of_warp[warp][s][lane] = counters[s].Count();
    __syncthreads();
    StoreCounts<Tile>(a, counts, first);
    __syncthreads();
  }
}

// ---- tensor cores: they count the ones in common, and popcount(w ^ x) = popcount(w) + popcount(x) - 2 popcount(w &
// x); the two counts are products with ones.

__device__ std::uint32_t Low(std::uint64_t word) { return static_cast<std::uint32_t>(word); }
__device__ std::uint32_t High(std::uint64_t word) { return static_cast<std::uint32_t>(word >> 32); }

// Sums of a warp's product: kFragments of samples by kParts fragments of rows.
template <int kFragments, int kParts>
struct Common {
  int both[kFragments][kParts][4] = {}, of_x[kFragments][4] = {}, of_w[kParts][4] = {};

  // Of a fragment's words, this lane's: word t of samples g and g + 8, and of row g.
  __device__ void Take(const std::uint64_t (&x)[kFragments][2], const std::uint64_t (&w)[kParts]) {
    constexpr std::uint32_t kOnes[4] = {~0u, ~0u, ~0u, ~0u};
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const std::uint32_t words[4] = {Low(x[f][0]), Low(x[f][1]), High(x[f][0]), High(x[f][1])};
      CountCommonOnes(of_x[f], words, ~0u, ~0u);
#pragma unroll
      for (int p = 0; p < kParts; ++p) CountCommonOnes(both[f][p], words, Low(w[p]), High(w[p]));
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) CountCommonOnes(of_w[p], kOnes, Low(w[p]), High(w[p]));
  }
  // How many bits differ, of sample g + 8 (i / 2) of fragment f and row 2 t + i % 2 of part p.
  __device__ int Differ(int f, int p, int i) const { return of_x[f][i] + of_w[p][i] - 2 * both[f][p][i]; }
};

template <typename Tile, int kFragments>
__global__ void __launch_bounds__(Tile::kThreads) XnorFewKernel(XnorMatmulArgs a) {
  constexpr int kParts = kXnorRows / kFragmentRows;
  auto& counts = SharedMemory<Counts<Tile>>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const std::uint64_t* weight = a.weight + std::int64_t{blockIdx.x} * a.words * kXnorRows + g;
  const WordRange<Tile> range(a);
  const std::int64_t step = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples; first += step) {
    Common<kFragments, kParts> common;
#pragma unroll 2
    for (std::int64_t i = range.begin + t; i - t < range.end; i += kFragmentWords) {
      std::uint64_t x[kFragments][2], w[kParts];
#pragma unroll
      for (int p = 0; p < kParts; ++p) w[p] = i < range.end ? weight[i * kXnorRows + p * kFragmentRows] : 0;
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const std::int64_t n = first + f * kFragmentSamples + h * 8 + g;
          x[f][h] = i < range.end && n < a.samples ? a.x[n * a.words + i] : 0;
        }
      }
      common.Take(x, w);
    }
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          int& to = counts.of_warp[warp][f * kFragmentSamples + h * 8 + g][p * kFragmentRows + 2 * t];
          reinterpret_cast<int2&>(to) = int2{common.Differ(f, p, 2 * h), common.Differ(f, p, 2 * h + 1)};
        }
      }
    }
    __syncthreads();
    StoreCounts<Tile>(a, counts, first);
    __syncthreads();
  }
}

// ---- many samples: a block keeps a part of x and of some tiles in shared memory, and the next part on its way

template <int kFragmentsOfWarp, int kWordsOfStage, int kStagesOfBlock, int kSampleWarps, int kRowWarps>
struct ManyTileOf {
  static constexpr int kWarpsOfSamples = kSampleWarps, kWarpsOfRows = kRowWarps;
  static constexpr int kFragments = kFragmentsOfWarp, kParts = kXnorRows / kFragmentRows;  // of a warp
  static constexpr int kThreads = kWarpsOfSamples * kWarpsOfRows * kWarpSize;
  static constexpr int kSamples = kWarpsOfSamples * kFragments * kFragmentSamples;
  static constexpr int kRows = kWarpsOfRows * kXnorRows;
  static constexpr int kWords = kWordsOfStage;
  static constexpr int kStages = kStagesOfBlock;

  // A half-warp reads 4 words of 4 rows: 4 more than a multiple of 16 words of 8 bytes puts them into different banks.
  struct Stage {
    std::uint64_t x[kSamples][kWords + 4];
    std::uint64_t weight[kWords][kRows + 4];
  };
};
using ManyTile = ManyTileOf<4, 8, 3, 2, 4>;

// What a lane needs to know of its rows: two neighbours in each of kParts fragments.
template <int kParts>
struct RowsOfLane {
  __device__ RowsOfLane(const XnorMatmulArgs& a, std::int64_t first) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const std::int64_t r = first + p * kFragmentRows + c;
        const bool within = r < a.rows;
        scale[p][c] = within && a.scale != nullptr ? a.scale[r] : 1.0f;
        bias[p][c] = within && a.bias != nullptr ? a.bias[r] : 0.0f;
        threshold[p][c] = within && a.thresholds != nullptr ? a.thresholds[r] : 0;
      }
    }
  }
  float scale[kParts][2], bias[kParts][2];
  int threshold[kParts][2];
};

// Starts the copies of a stage; what is past the end is 0.
template <typename Tile>
__device__ void CopyStage(const XnorMatmulArgs& a, typename Tile::Stage& stage, std::int64_t first, std::int64_t word) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = thread; i < Tile::kSamples * Tile::kWords; i += Tile::kThreads) {
    const int sample = i / Tile::kWords, k = i % Tile::kWords;
    std::uint64_t* to = &stage.x[sample][k];
    if (first + sample < a.samples && word + k < a.words) {
      CopyAsync8(to, a.x + (first + sample) * a.words + word + k);
    } else {
      *to = 0;
    }
  }
#pragma unroll
  for (int i = thread; i < Tile::kWords * Tile::kRows / 2; i += Tile::kThreads) {
    const int k = i / (Tile::kRows / 2), r = i % (Tile::kRows / 2) * 2;
    const std::int64_t tile = std::int64_t{blockIdx.x} * Tile::kWarpsOfRows + r / kXnorRows;
    std::uint64_t* to = &stage.weight[k][r];
    if (tile * kXnorRows < a.rows && word + k < a.words) {
      CopyAsync16(to, a.weight + (tile * a.words + word + k) * kXnorRows + r % kXnorRows);
    } else {
      to[0] = 0;
      to[1] = 0;
    }
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) XnorManyKernel(XnorMatmulArgs a) {
  auto* stages = DynamicSharedMemory<typename Tile::Stage>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int sample = warp / Tile::kWarpsOfRows * Tile::kFragments * kFragmentSamples;
  const int row = warp % Tile::kWarpsOfRows * kXnorRows;
  const std::int64_t tile = std::int64_t{blockIdx.x} * Tile::kWarpsOfRows + warp % Tile::kWarpsOfRows;
  const std::int64_t step = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples; first += step) {
    Common<Tile::kFragments, Tile::kParts> common;
    constexpr int kAhead = Tile::kStages - 1;
    for (int i = 0; i < kAhead; ++i) {
      CopyStage<Tile>(a, stages[i], first, i * Tile::kWords);
      CommitCopies();
    }
    int now = 0;
    for (std::int64_t word = 0; word < a.words; word += Tile::kWords) {
      WaitForCopies<kAhead - 1>();
      __syncthreads();  // what others copied is there, and what everybody has used may go
      CopyStage<Tile>(a, stages[(now + kAhead) % Tile::kStages], first, word + kAhead * Tile::kWords);
      CommitCopies();
      const typename Tile::Stage& stage = stages[now];
      now = (now + 1) % Tile::kStages;
#pragma unroll
      for (int k = 0; k < Tile::kWords; k += kFragmentWords) {
        std::uint64_t x[Tile::kFragments][2], w[Tile::kParts];
#pragma unroll
        for (int f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
          for (int h = 0; h < 2; ++h) x[f][h] = stage.x[sample + f * kFragmentSamples + h * 8 + g][k + t];
        }
#pragma unroll
        for (int p = 0; p < Tile::kParts; ++p) w[p] = stage.weight[k + t][row + p * kFragmentRows + g];
        common.Take(x, w);
      }
    }
    WaitForCopies<0>();
    __syncthreads();
    const RowsOfLane<Tile::kParts> rows(a, tile * kXnorRows + 2 * t);
#pragma unroll
    for (int f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::int64_t n = first + sample + f * kFragmentSamples + h * 8 + g;
        std::uint32_t signs = 0;
#pragma unroll
        for (int p = 0; p < Tile::kParts; ++p) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int place = p * kFragmentRows + 2 * t + c;
            const std::int64_t r = tile * kXnorRows + place;
            if (n >= a.samples || r >= a.rows) continue;
            const int dot = static_cast<int>(a.columns) - 2 * common.Differ(f, p, 2 * h + c);
            if (a.bits != nullptr) {
              signs |= std::uint32_t{dot < rows.threshold[p][c]} << place;
            } else if (a.dots != nullptr) {
              a.dots[n * a.rows + r] = dot;
            } else {
              a.floats[n * a.rows + r] = fmaf(static_cast<float>(dot), rows.scale[p][c], rows.bias[p][c]);
            }
          }
        }
        if (a.bits == nullptr) continue;
        signs |= __shfl_xor_sync(kWholeWarp, signs, 1);
        signs |= __shfl_xor_sync(kWholeWarp, signs, 2);
        if (t == 0 && n < a.samples && tile * kXnorRows < a.rows) StoreSigns(a, tile, n, signs);
      }
    }
  }
}

template <typename Tile>
dim3 TileGrid(const XnorMatmulArgs& a, std::int64_t rows) {
  return {BlocksOnX(a.rows, rows), BlocksOnY(a.samples, Tile::kSamples), 1};
}

// Samples from which blocks of ManyTile are enough to fill a GPU, about.
constexpr std::int64_t kManySamples = 256;

}  // namespace

int XnorMatmulCuda(const XnorMatmulArgs& a, void* stream) noexcept {
  if (!HasBinaryTensorCores()) return XnorMatmulCudaBy(XnorPath::kCount, a, stream);
  return XnorMatmulCudaBy(a.samples < kManySamples ? XnorPath::kFew : XnorPath::kMany, a, stream);
}

int XnorMatmulCudaBy(XnorPath path, const XnorMatmulArgs& a, void* stream) noexcept {
  if (a.rows == 0 || a.samples == 0) return cudaSuccess;
  if (path == XnorPath::kCount) {
    return Launch(XnorCountKernel<CountTile>, TileGrid<CountTile>(a, kXnorRows), CountTile::kThreads, stream, a);
  }
  if (path == XnorPath::kMany) {
    return LaunchWithMemory(XnorManyKernel<ManyTile>, TileGrid<ManyTile>(a, ManyTile::kRows), ManyTile::kThreads,
                            ManyTile::kStages * sizeof(ManyTile::Stage), stream, a);
  }
  if (a.samples > kFragmentSamples) {
    using Tile = FragmentTile<2>;
    return Launch(XnorFewKernel<Tile, 2>, TileGrid<Tile>(a, kXnorRows), Tile::kThreads, stream, a);
  }
  using Tile = FragmentTile<1>;
  return Launch(XnorFewKernel<Tile, 1>, TileGrid<Tile>(a, kXnorRows), Tile::kThreads, stream, a);
}

}  // namespace tersetorch
