#include <cmath>

#include "kernels/codebook_matmul/codebook_matmul_cuda.h"
#include "kernels/common/cuda.cuh"

namespace tersetorch {
namespace {

// ---- the weight

// Codes of row r, one column after the other; lanes that take consecutive columns read consecutive words.
struct Codes {
  __device__ Codes(const CodebookWeight& w, std::int64_t r)
      : bits(CodeBits(w.entries)),
        of_block(CodeChunks(w.column_block, bits)),
        column_block(w.column_block),
        words(reinterpret_cast<const std::uint32_t*>(w.codes + r * CodeRowBytes(w.columns, w.column_block, bits))) {}

  __device__ std::uint32_t At(std::int64_t c) const {
    const std::int64_t block = c / column_block, in_block = c % column_block, of_chunk = 512 / bits;
    const std::int64_t chunk = block * of_block + in_block / of_chunk;
    const int column = static_cast<int>(in_block % of_chunk);
    return words[chunk * 16 + column % 16] >> bits * (column / 16) & ((1u << bits) - 1);
  }

  int bits;
  std::int64_t of_block, column_block;
  const std::uint32_t* words;
};

__device__ std::int64_t TableOf(const CodebookWeight& w, std::int64_t r, std::int64_t c) {
  return w.per_row ? r : c / w.column_block;
}

// ---- modes: what is multiplied and added up

struct Exact {
  using Sum = float;
  __device__ static float Weight(const CodebookMatmulCudaArgs& a, std::int64_t table, std::uint32_t code) {
    return a.weight.codebook[table * a.weight.entries + code];
  }
  template <typename Float>
  __device__ static float X(const CodebookMatmulCudaArgs& a, std::int64_t n, std::int64_t c) {
    return ToFloat(static_cast<const Float*>(a.x)[n * a.weight.columns + c]);
  }
  __device__ static float Number(const CodebookMatmulCudaArgs&, float sum, std::int64_t, std::int64_t, float bias) {
    return sum + bias;
  }
};

struct Rounded : Exact {
  __device__ static float Weight(const CodebookMatmulCudaArgs& a, std::int64_t table, std::uint32_t code) {
    return ToFloat(FromFloat<BFloat16>(Exact::Weight(a, table, code)));
  }
  template <typename Float>
  __device__ static float X(const CodebookMatmulCudaArgs& a, std::int64_t n, std::int64_t c) {
    return ToFloat(FromFloat<BFloat16>(Exact::X<Float>(a, n, c)));
  }
};

struct Integers {
  using Sum = int;
  __device__ static int Weight(const CodebookMatmulCudaArgs& a, std::int64_t table, std::uint32_t code) {
    return a.tables[table * a.table_stride + code];
  }
  template <typename Float>
  __device__ static int X(const CodebookMatmulCudaArgs& a, std::int64_t n, std::int64_t c) {
    return static_cast<const std::int8_t*>(a.x)[n * a.x_stride + c];
  }
  __device__ static float Number(const CodebookMatmulCudaArgs& a, int sum, std::int64_t n, std::int64_t r, float bias) {
    const float of_table = a.table_scales[a.weight.per_row ? r : 0], of_sample = a.sample_scales[n];
    const float low = of_sample < of_table ? of_sample : of_table, high = of_sample < of_table ? of_table : of_sample;
    return fmaf(static_cast<float>(sum) * low, high, bias);
  }
};

// ---- kernels

template <typename Tile, typename Mode, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) CodebookMatmulKernel(CodebookMatmulCudaArgs a) {
  const CodebookWeight& w = a.weight;
  const std::int64_t r = Tile::RowOfWarp();
  if (r >= w.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const Codes codes(w, r);
  const float bias = a.bias == nullptr ? 0.0f : a.bias[r];
  Float* y = static_cast<Float*>(a.y);
  const std::int64_t step = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples; first += step) {
    const int count = static_cast<int>(min(std::int64_t{Tile::kSamples}, a.samples - first));
    typename Mode::Sum sums[Tile::kSamples] = {};
    bool damaged = false;
    for (std::int64_t c = lane; c < w.columns; c += kWarpSize) {
      const std::uint32_t code = codes.At(c);
      if (code >= w.entries) {
        damaged = true;
        continue;
      }
      const auto weight = Mode::Weight(a, TableOf(w, r, c), code);
#pragma unroll
      for (int s = 0; s < Tile::kSamples; ++s) {
        if (s < count) sums[s] += weight * Mode::template X<Float>(a, first + s, c);
      }
    }
    damaged = __any_sync(kWholeWarp, damaged) != 0;
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      if (s >= count) break;
      const auto sum = WarpSum(sums[s]);
      if (s != lane) continue;
      const float result = damaged ? DamagedWeight() : Mode::Number(a, sum, first + s, r, bias);
      y[(first + s) * w.rows + r] = FromFloat<Float>(a.relu && result < 0 ? 0.0f : result);
    }
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) CodebookDecodeKernel(CodebookDecodeCudaArgs a) {
  const CodebookWeight& w = a.weight;
  const std::int64_t r = Tile::RowOfWarp();
  if (r >= w.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const Codes codes(w, r);
  bool damaged = false;
  for (std::int64_t c = lane; c < w.columns; c += kWarpSize) damaged |= codes.At(c) >= w.entries;
  damaged = __any_sync(kWholeWarp, damaged) != 0;
  for (std::int64_t c = lane; c < w.columns; c += kWarpSize) {
    a.dense[r * w.columns + c] = damaged ? DamagedWeight() : w.codebook[TableOf(w, r, c) * w.entries + codes.At(c)];
  }
}

// A warp for each entry, which looks at all of its table's codes: atomics would give sums of no one order.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) CodebookReduceKernel(CodebookReduceCudaArgs a) {
  const CodebookWeight& w = a.weight;
  const std::int64_t entry = Tile::RowOfWarp();
  if (entry >= a.tables * w.entries) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t table = entry / w.entries;
  const std::uint32_t wanted = static_cast<std::uint32_t>(entry % w.entries);
  const std::int64_t row_begin = w.per_row ? table : 0, row_end = w.per_row ? table + 1 : w.rows;
  const std::int64_t begin = w.per_row ? 0 : table * w.column_block, end = min(w.columns, begin + w.column_block);
  double sum = 0;
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    const Codes codes(w, r);
    for (std::int64_t c = begin + lane; c < end; c += kWarpSize) {
      if (codes.At(c) == wanted) sum += static_cast<double>(a.grad[r * w.columns + c]);
    }
  }
  sum = WarpSum(sum);
  if (lane == 0) a.sums[entry] = static_cast<float>(sum);
}

}  // namespace

int CodebookMatmulCuda(const CodebookMatmulCudaArgs& a, void* stream) noexcept {
  if (a.weight.rows == 0 || a.samples == 0) return cudaSuccess;
  const dim3 grid = RowGrid(a.weight.rows, a.samples);
  return WithFloat(a.stored_as, [&](auto number) {
    using Float = decltype(number);
    switch (a.mode) {
      case CodebookMode::kExact:
        return Launch(CodebookMatmulKernel<RowTile, Exact, Float>, grid, RowTile::kThreads, stream, a);
      case CodebookMode::kBFloat16:
        return Launch(CodebookMatmulKernel<RowTile, Rounded, Float>, grid, RowTile::kThreads, stream, a);
      default:
        return Launch(CodebookMatmulKernel<RowTile, Integers, Float>, grid, RowTile::kThreads, stream, a);
    }
  });
}

int CodebookDecodeCuda(const CodebookDecodeCudaArgs& a, void* stream) noexcept {
  if (a.weight.rows == 0 || a.weight.columns == 0) return cudaSuccess;
  return Launch(CodebookDecodeKernel<RowTile>, RowGrid(a.weight.rows, 1), RowTile::kThreads, stream, a);
}

int CodebookReduceCuda(const CodebookReduceCudaArgs& a, void* stream) noexcept {
  if (a.tables == 0) return cudaSuccess;
  return Launch(CodebookReduceKernel<RowTile>, RowGrid(a.tables * a.weight.entries, 1), RowTile::kThreads, stream, a);
}

}  // namespace tersetorch
