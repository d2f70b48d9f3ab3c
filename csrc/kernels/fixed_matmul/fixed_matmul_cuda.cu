#include "kernels/common/cuda.cuh"
#include "kernels/common/fixed_sums.h"
#include "kernels/common/tensor_cores.cuh"
#include "kernels/fixed_matmul/fixed_matmul_cuda.h"

namespace tersetorch {
namespace {

// ---- words: 4 numbers of 8 bits or 2 of 16

template <typename Whole>
constexpr int kOfWord = static_cast<int>(4 / sizeof(Whole));

// Columns [c, c + 4 or 2) of a row, 0 past its end; kWhole where every row is of whole words: then loads need no
// branches between them, and wait for memory together.
template <bool kWhole, typename Whole>
__device__ std::uint32_t WordAt(const Whole* row, std::int64_t c, std::int64_t columns) {
  if constexpr (kWhole) return c < columns ? *reinterpret_cast<const std::uint32_t*>(row + c) : 0;
  std::uint32_t word = 0;
  for (int i = 0; i < kOfWord<Whole> && c + i < columns; ++i) {
    const auto bits = static_cast<std::uint32_t>(row[c + i]) & (0xffffffffu >> (32 - 8 * sizeof(Whole)));
    word |= bits << 8 * sizeof(Whole) * i;
  }
  return word;
}

template <typename Whole>
bool WholeWords(const FixedMatmulArgs& a) {
  const auto aligned = [](const void* rows) { return reinterpret_cast<std::uintptr_t>(rows) % 4 == 0; };
  return aligned(a.x) && aligned(a.weight) && a.columns % kOfWord<Whole> == 0;
}

// sum += the products of two words. 2^14 of them fit 32 bits where the numbers have 8.
__device__ inline void AddProducts(int& sum, std::uint32_t x, std::uint32_t w) {
  sum = __dp4a(static_cast<int>(x), static_cast<int>(w), sum);
}
__device__ inline void AddProducts(long long& sum, std::uint32_t x, std::uint32_t w) {
  const auto low = [](std::uint32_t word) { return static_cast<int>(static_cast<std::int16_t>(word & 0xffff)); };
  sum += static_cast<long long>(low(x)) * low(w);
  sum += static_cast<long long>(low(x >> 16)) * low(w >> 16);
}

template <typename Whole>
struct SumOf {
  using Type = long long;
};
template <>
struct SumOf<std::int8_t> {
  using Type = int;
};

__device__ inline long long BiasOf(const FixedMatmulArgs& a, std::int64_t r) {
  const std::int64_t bias = a.bias == nullptr ? 0 : a.bias[r];
  return bias < -kMostBias ? -kMostBias : bias > kMostBias ? kMostBias : bias;
}

// ---- any columns: a warp multiplies one row with some samples

template <typename Tile, typename Whole, bool kWhole>
__global__ void __launch_bounds__(Tile::kThreads) MultiplyRows(FixedMatmulArgs a) {
  constexpr int kWords = 4;  // of a row, which are on their way before the first is needed
  const std::int64_t r = Tile::RowOfWarp();
  if (r >= a.rows) return;
  const auto* w = static_cast<const Whole*>(a.weight) + r * a.columns;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples;
       first += std::int64_t{gridDim.y} * Tile::kSamples) {
    const auto* x = static_cast<const Whole*>(a.x) + first * a.columns;
    const auto samples = static_cast<int>(min(std::int64_t{Tile::kSamples}, a.samples - first));
    long long totals[Tile::kSamples] = {};
    for (std::int64_t c = lane * kOfWord<Whole>; c < a.columns; c += kWords * kWarpSize * kOfWord<Whole>) {
      std::uint32_t words[kWords];
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        words[k] = WordAt<kWhole>(w, c + k * kWarpSize * kOfWord<Whole>, a.columns);
      }
#pragma unroll
      for (int s = 0; s < Tile::kSamples; ++s) {
        if (s >= samples) break;
        typename SumOf<Whole>::Type sum = 0;
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
          const std::int64_t from = c + k * kWarpSize * kOfWord<Whole>;
          AddProducts(sum, WordAt<kWhole>(x + s * a.columns, from, a.columns), words[k]);
        }
        totals[s] += sum;
      }
    }
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      const long long sum = WarpSum(totals[s]);
      if (lane == s && s < samples) a.sums[(first + s) * a.rows + r] = sum + BiasOf(a, r);
    }
  }
}

// ---- many samples and rows of whole words: a block multiplies some rows with some samples, through shared memory

// The words that a thread brings for the next step: one of every so many lines of W, and of x.
template <typename Tile, typename Whole>
struct NextWords {
  static constexpr int kStride = Tile::kThreads / Tile::kWords;
  static constexpr int kOfW = Tile::kRows / kStride, kOfX = Tile::kSamples / kStride;
  static constexpr std::int64_t kColumns = Tile::kWords * kOfWord<Whole>;
  static_assert(kOfW * kStride == Tile::kRows && kOfX * kStride == Tile::kSamples, "whole loads");
  std::uint32_t of_w[kOfW], of_x[kOfX];

  __device__ static int Word() { return static_cast<int>(threadIdx.x) % Tile::kWords; }
  __device__ static int Line() { return static_cast<int>(threadIdx.x) / Tile::kWords; }

  __device__ void Load(const FixedMatmulArgs& a, std::int64_t first_row, std::int64_t first, std::int64_t c) {
    Load(of_w, static_cast<const Whole*>(a.weight), first_row, a.rows, c, a.columns);
    Load(of_x, static_cast<const Whole*>(a.x), first, a.samples, c, a.columns);
  }

  template <int kCount>
  __device__ static void Load(std::uint32_t (&words)[kCount], const Whole* lines, std::int64_t first,
                              std::int64_t count, std::int64_t c, std::int64_t columns) {
    c += Word() * kOfWord<Whole>;
    const std::int64_t left = c < columns ? count - first - Line() : 0;  // lines that are there, from this thread's on
    const Whole* at = lines + (first + Line()) * columns + c;
#pragma unroll
    for (int i = 0; i < kCount; ++i, at += kStride * columns) {
      words[i] = i * kStride < left ? *reinterpret_cast<const std::uint32_t*>(at) : 0;
    }
  }
};

// Of int16, whose sums take 64 bits.
struct WideTile {
  static constexpr int kRows = 32, kSamples = 64, kWords = 16;  // so many words of each at a time
  static constexpr int kSide = 4;                               // a thread has 4 rows and 4 samples
  static constexpr int kThreads = kRows / kSide * (kSamples / kSide);

  // Lines side by side, and some more, so that the words of one lie in different banks.
  struct Memory {
    alignas(16) std::uint32_t w[kWords][kRows + kSide];
    alignas(16) std::uint32_t x[kWords][kSamples + kSide];
  };
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) MultiplyWide(FixedMatmulArgs a) {
  auto& memory = SharedMemory<typename Tile::Memory>();
  const int thread = static_cast<int>(threadIdx.x), row = thread % (Tile::kRows / Tile::kSide) * Tile::kSide;
  const int sample = thread / (Tile::kRows / Tile::kSide) * Tile::kSide;
  const std::int64_t first_row = std::int64_t{blockIdx.x} * Tile::kRows;
  using Next = NextWords<Tile, std::int16_t>;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples;
       first += std::int64_t{gridDim.y} * Tile::kSamples) {
    Next next;
    next.Load(a, first_row, first, 0);
    long long sums[Tile::kSide][Tile::kSide] = {};
    for (std::int64_t c = 0; c < a.columns; c += Next::kColumns) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Next::kOfW; ++i) memory.w[Next::Word()][i * Next::kStride + Next::Line()] = next.of_w[i];
#pragma unroll
      for (int i = 0; i < Next::kOfX; ++i) memory.x[Next::Word()][i * Next::kStride + Next::Line()] = next.of_x[i];
      __syncthreads();
      next.Load(a, first_row, first, c + Next::kColumns);
#pragma unroll 2
      for (int word = 0; word < Tile::kWords; ++word) {
        const uint4 of_w = *reinterpret_cast<const uint4*>(&memory.w[word][row]);
        const uint4 of_x = *reinterpret_cast<const uint4*>(&memory.x[word][sample]);
        const std::uint32_t ws[] = {of_w.x, of_w.y, of_w.z, of_w.w}, xs[] = {of_x.x, of_x.y, of_x.z, of_x.w};
#pragma unroll
        for (int s = 0; s < Tile::kSide; ++s) {
#pragma unroll
          for (int i = 0; i < Tile::kSide; ++i) AddProducts(sums[s][i], xs[s], ws[i]);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < Tile::kSide; ++s) {
#pragma unroll
      for (int i = 0; i < Tile::kSide; ++i) {
        const std::int64_t n = first + sample + s, r = first_row + row + i;
        if (n < a.samples && r < a.rows) a.sums[n * a.rows + r] = sums[s][i] + BiasOf(a, r);
      }
    }
  }
}

// Of int8, on tensor cores: a warp has 16 rows and 32 samples.
struct NarrowTile {
  static constexpr int kRows = 32, kSamples = 64, kWords = 32;
  static constexpr int kParts = 4;  // 8 samples each
  static constexpr int kThreads = kRows / 16 * (kSamples / (8 * kParts)) * kWarpSize;
  static constexpr int kSteps = 32;  // of kWords words, then sums become 64 bits wide

  // Words side by side, and some more, so that the lines that a warp reads lie in different banks.
  struct Memory {
    std::uint32_t w[kRows][kWords + 4], x[kSamples][kWords + 4];
  };
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) MultiplyNarrow(FixedMatmulArgs a) {
  auto& memory = SharedMemory<typename Tile::Memory>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int row = warp % (Tile::kRows / 16) * 16, sample = warp / (Tile::kRows / 16) * 8 * Tile::kParts;
  const std::int64_t first_row = std::int64_t{blockIdx.x} * Tile::kRows;
  using Next = NextWords<Tile, std::int8_t>;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples;
       first += std::int64_t{gridDim.y} * Tile::kSamples) {
    Next next;
    next.Load(a, first_row, first, 0);
    long long totals[Tile::kParts][4] = {};
    for (std::int64_t begin = 0; begin < a.columns; begin += Tile::kSteps * Next::kColumns) {
      int sums[Tile::kParts][4] = {};
      const std::int64_t end = min(a.columns, begin + Tile::kSteps * Next::kColumns);
      for (std::int64_t c = begin; c < end; c += Next::kColumns) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Next::kOfW; ++i) memory.w[i * Next::kStride + Next::Line()][Next::Word()] = next.of_w[i];
#pragma unroll
        for (int i = 0; i < Next::kOfX; ++i) memory.x[i * Next::kStride + Next::Line()][Next::Word()] = next.of_x[i];
        __syncthreads();
        next.Load(a, first_row, first, c + Next::kColumns);
#pragma unroll
        for (int k = t; k < Tile::kWords; k += 8) {
          const std::uint32_t of_w[] = {memory.w[row + g][k], memory.w[row + g + 8][k], memory.w[row + g][k + 4],
                                        memory.w[row + g + 8][k + 4]};
#pragma unroll
          for (int part = 0; part < Tile::kParts; ++part) {
            const auto& line = memory.x[sample + 8 * part + g];
            MultiplyFragments(sums[part], of_w, line[k], line[k + 4]);
          }
        }
      }
#pragma unroll
      for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
        for (int i = 0; i < 4; ++i) totals[part][i] += sums[part][i];
      }
    }
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::int64_t n = first + sample + 8 * part + 2 * t + i % 2, r = first_row + row + g + i / 2 * 8;
        if (n < a.samples && r < a.rows) a.sums[n * a.rows + r] = totals[part][i] + BiasOf(a, r);
      }
    }
  }
}

template <typename Tile>
dim3 TileGrid(const FixedMatmulArgs& a) {
  return {static_cast<unsigned>(CeilDiv(a.rows, Tile::kRows)), BlocksOnY(a.samples, Tile::kSamples), 1};
}

template <typename Whole>
int Multiply(const FixedMatmulArgs& a, void* stream) {
  const bool whole = WholeWords<Whole>(a);
  if (whole && a.samples > RowTile::kSamples) {
    if constexpr (sizeof(Whole) == 2) {
      return Launch(MultiplyWide<WideTile>, TileGrid<WideTile>(a), WideTile::kThreads, stream, a);
    } else if (HasTensorCores()) {
      return Launch(MultiplyNarrow<NarrowTile>, TileGrid<NarrowTile>(a), NarrowTile::kThreads, stream, a);
    }
  }
  const auto kernel = whole ? MultiplyRows<RowTile, Whole, true> : MultiplyRows<RowTile, Whole, false>;
  return Launch(kernel, RowGrid(a.rows, a.samples), RowTile::kThreads, stream, a);
}

// ---- conversion

struct ConvertTile {
  static constexpr int kThreads = 256;
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ConvertValues(FixedConvertArgs a, std::int64_t size) {
  const std::int64_t i = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  if (i >= size) return;
  const FixedConversion conversion(a.sum_fraction_bits, a.integer_bits, a.fraction_bits, a.stochastic, a.relu);
  const std::uint32_t u = conversion.random ? RandomBits(a.seed, a.offset + static_cast<std::uint64_t>(i)) : 0;
  const std::int32_t k = conversion.Of(a.sums[i], u);
  switch (a.as) {
    case FixedAs::kFloats:
      static_cast<float*>(a.y)[i] =
          static_cast<float>(k) * __uint_as_float(static_cast<std::uint32_t>(127 - a.fraction_bits) << 23);
      break;
    case FixedAs::kInt8:
      static_cast<std::int8_t*>(a.y)[i] = static_cast<std::int8_t>(k);
      break;
    case FixedAs::kInt16:
      static_cast<std::int16_t*>(a.y)[i] = static_cast<std::int16_t>(k);
      break;
    case FixedAs::kInt32:
      static_cast<std::int32_t*>(a.y)[i] = k;
      break;
  }
}

}  // namespace

int FixedMatmulCuda(const FixedMatmulArgs& a, void* stream) noexcept {
  if (a.rows == 0 || a.samples == 0) return cudaSuccess;
  return a.wide ? Multiply<std::int16_t>(a, stream) : Multiply<std::int8_t>(a, stream);
}

int FixedConvertCuda(const FixedConvertArgs& a, std::int64_t size, void* stream) noexcept {
  if (size == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(size, ConvertTile::kThreads)));
  return Launch(ConvertValues<ConvertTile>, grid, ConvertTile::kThreads, stream, a, size);
}

}  // namespace tersetorch
