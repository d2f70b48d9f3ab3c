#include <cmath>
#include <type_traits>

#include "kernels/codebook_conv2d/codebook_conv2d_cuda.h"
#include "kernels/common/cuda.cuh"

namespace tersetorch {
namespace {

// ---- tiles

// A block computes so many outputs of some filters of a group, from so many columns of theirs at a time.
struct FilterTile {
  static constexpr int kThreads = 128, kFilters = 8, kColumns = 128, kLoads = 8;
  static constexpr int kCodes = kFilters * kColumns / kThreads;  // that a thread decodes, all of one filter
  static_assert(kColumns % kLoads == 0 && kThreads % kFilters == 0 && kCodes * kThreads == kFilters * kColumns,
                "whole filters");
};

// ---- modes: what is multiplied and added up

struct Exact {
  using Sum = float;
  __device__ static float Weight(const CodebookConvCudaArgs& a, std::int64_t table, std::uint32_t code) {
    return a.weight.codebook[table * a.weight.entries + code];
  }
  template <typename Float>
  __device__ static float X(const CodebookConvCudaArgs& a, std::int64_t at) {
    return ToFloat(static_cast<const Float*>(a.x)[at]);
  }
  __device__ static float Number(const CodebookConvCudaArgs&, float sum, std::int64_t, std::int64_t, float bias) {
    return sum + bias;
  }
};

struct Rounded : Exact {
  __device__ static float Weight(const CodebookConvCudaArgs& a, std::int64_t table, std::uint32_t code) {
    return ToFloat(FromFloat<BFloat16>(Exact::Weight(a, table, code)));
  }
  template <typename Float>
  __device__ static float X(const CodebookConvCudaArgs& a, std::int64_t at) {
    const Float x = static_cast<const Float*>(a.x)[at];
    if constexpr (std::is_same_v<Float, BFloat16>) return ToFloat(x);
    return ToFloat(FromFloat<BFloat16>(ToFloat(x)));
  }
};

struct Integers {
  using Sum = int;
  __device__ static int Weight(const CodebookConvCudaArgs& a, std::int64_t table, std::uint32_t code) {
    return a.tables[table * a.table_stride + code];
  }
  template <typename Float>
  __device__ static int X(const CodebookConvCudaArgs& a, std::int64_t at) {
    return static_cast<const std::int8_t*>(a.x)[at];
  }
  __device__ static float Number(const CodebookConvCudaArgs& a, int sum, std::int64_t n, std::int64_t r, float bias) {
    const float of_table = a.table_scales[a.weight.per_row ? r : 0], of_image = a.image_scales[n];
    const float low = of_image < of_table ? of_image : of_table, high = of_image < of_table ? of_table : of_image;
    return fmaf(static_cast<float>(sum) * low, high, bias);
  }
};

// ---- kernels

// The code of a column of a row, and the block of columns it is in: CodeAt, without its divisions of 64 bits, which are
// calls.
struct CodeOfRow {
  std::uint32_t block, code;

  __device__ CodeOfRow(const CodebookWeight& w, const std::uint8_t* row, std::uint32_t column) {
    const int bits = CodeBits(w.entries), log_of_chunk = bits == 2 ? 8 : bits == 4 ? 7 : 6;
    const auto of_block = static_cast<std::uint32_t>(min(w.column_block, w.columns));
    block = column / of_block;
    const std::uint32_t in_block = column % of_block, in_chunk = in_block & ((1u << log_of_chunk) - 1);
    const std::int64_t chunk = block * CodeChunks(of_block, bits) + (in_block >> log_of_chunk);
    const auto* words = reinterpret_cast<const std::uint32_t*>(row + chunk * kCodeChunkBytes);
    code = words[in_chunk % 16] >> in_chunk / 16 * bits & ((1u << bits) - 1);
  }
};

// Columns of a filter and the weights there, as all outputs see them.
template <typename Tile, typename Number>
struct Taps {
  alignas(16) Number weights[Tile::kColumns][Tile::kFilters];
  std::int64_t offsets[Tile::kColumns];  // in x, from the input that an output's first tap multiplies in channel 0
  std::int64_t down[Tile::kColumns], right[Tile::kColumns];  // of that input
  bool damaged[Tile::kThreads];                              // by what each thread decoded
};

// Neighbouring blocks compute the same outputs of other filters: what one reads, the next finds in the cache.
template <typename Tile, typename Mode, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) CodebookConvKernel(CodebookConvCudaArgs a, std::int64_t row_bytes) {
  using Number = typename Mode::Sum;
  auto& taps = SharedMemory<Taps<Tile, Number>>();
  const ConvShape& s = a.shape;
  const CodebookWeight& w = a.weight;
  const int thread = static_cast<int>(threadIdx.x);
  const auto groups = static_cast<unsigned>(s.groups), of_group = static_cast<unsigned>(s.out_channels) / groups;
  const unsigned tiles = (of_group + Tile::kFilters - 1) / Tile::kFilters, group = blockIdx.x / tiles % groups;
  const std::int64_t filter = std::int64_t{group} * of_group + blockIdx.x % tiles * Tile::kFilters;
  const auto filters = static_cast<int>(min(std::int64_t{Tile::kFilters}, std::int64_t{group + 1} * of_group - filter));
  const std::int64_t output = std::int64_t{blockIdx.x / (tiles * groups)} * Tile::kThreads + thread;
  const std::int64_t plane = a.out_height * a.out_width, image = output / plane;
  const auto place = static_cast<unsigned>(output - image * plane), out_width = static_cast<unsigned>(a.out_width);
  const unsigned i = place / out_width, j = place % out_width;
  const bool inside = image < a.images;  // the others decode with them
  const std::int64_t top = i * s.stride_h - a.pad_h, left = j * s.stride_w - a.pad_w;
  const std::int64_t origin = image * a.x_steps.image + top * a.x_steps.row + left * a.x_steps.column;
  const std::int64_t channel = std::int64_t{group} * (static_cast<unsigned>(s.in_channels) / groups);
  const int mine = thread % Tile::kFilters;
  const std::uint8_t* codes = w.codes + (filter + mine) * row_bytes;
  bool damaged = false;
  Number totals[Tile::kFilters] = {};
  for (std::int64_t first = 0; first < w.columns; first += Tile::kColumns) {
    const auto count = static_cast<int>(min(std::int64_t{Tile::kColumns}, w.columns - first));
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < Tile::kCodes; ++k) {
      const int c = k * (Tile::kThreads / Tile::kFilters) + thread / Tile::kFilters;
      Number weight{};
      if (c < count && mine < filters) {
        const CodeOfRow found(w, codes, static_cast<std::uint32_t>(first) + c);
        const bool wrong = found.code >= w.entries;
        damaged |= wrong;
        if (!wrong) weight = Mode::Weight(a, w.per_row ? filter + mine : found.block, found.code);
      }
      taps.weights[c][mine] = weight;
    }
    if (thread < count) {
      const auto column = static_cast<std::uint32_t>(first + thread);
      const std::uint32_t kernel_w = static_cast<std::uint32_t>(s.kernel_w), row = column / kernel_w;
      const std::uint32_t kernel_h = static_cast<std::uint32_t>(s.kernel_h);
      const std::int64_t down = row % kernel_h * s.dilation_h, right = column % kernel_w * s.dilation_w;
      taps.offsets[thread] =
          (channel + row / kernel_h) * a.x_steps.channel + down * a.x_steps.row + right * a.x_steps.column;
      taps.down[thread] = down, taps.right[thread] = right;
    }
    __syncthreads();
    if (!inside) continue;
    for (int c = 0; c < count; c += Tile::kLoads) {
      Number x[Tile::kLoads];  // all are on their way before the first is needed
#pragma unroll
      for (int k = 0; k < Tile::kLoads; ++k) {
        const int tap = min(c + k, count - 1);
        const auto h = static_cast<std::uint64_t>(top + taps.down[tap]);
        const auto v = static_cast<std::uint64_t>(left + taps.right[tap]);
        const bool read =
            c + k < count && h < static_cast<std::uint64_t>(a.height) && v < static_cast<std::uint64_t>(a.width);
        x[k] = read ? Mode::template X<Float>(a, origin + taps.offsets[tap]) : Number{};
      }
#pragma unroll
      for (int k = 0; k < Tile::kLoads; ++k) {
#pragma unroll
        for (int f = 0; f < Tile::kFilters; ++f) totals[f] += taps.weights[c + k][f] * x[k];
      }
    }
  }
  taps.damaged[thread] = damaged;
  __syncthreads();
  if (!inside) return;
#pragma unroll
  for (int f = 0; f < Tile::kFilters; ++f) {
    if (f >= filters) break;
    bool nan = false;
    for (int t = f; t < Tile::kThreads; t += Tile::kFilters) nan |= taps.damaged[t];
    const float bias = a.bias == nullptr ? 0.0f : a.bias[filter + f];
    const float number = nan ? DamagedWeight() : Mode::Number(a, totals[f], image, filter + f, bias);
    const std::int64_t at =
        image * a.y_steps.image + (filter + f) * a.y_steps.channel + i * a.y_steps.row + j * a.y_steps.column;
    static_cast<Float*>(a.y)[at] = FromFloat<Float>(a.relu && number < 0 ? 0.0f : number);
  }
}

}  // namespace

int CodebookConvCuda(const CodebookConvCudaArgs& a, void* stream) noexcept {
  const std::int64_t outputs = a.images * a.out_height * a.out_width;
  if (a.weight.rows == 0 || outputs == 0) return cudaSuccess;
  const std::int64_t tiles = a.shape.groups * CeilDiv(a.shape.out_channels / a.shape.groups, FilterTile::kFilters);
  const dim3 blocks(static_cast<unsigned>(CeilDiv(outputs, FilterTile::kThreads) * tiles), 1, 1);
  const CodebookWeight& w = a.weight;
  const std::int64_t row_bytes = CodeRowBytes(w.columns, w.column_block, CodeBits(w.entries));
  return WithFloat(a.stored_as, [&](auto number) {
    using Float = decltype(number);
    switch (a.mode) {
      case CodebookMode::kExact:
        return Launch(CodebookConvKernel<FilterTile, Exact, Float>, blocks, FilterTile::kThreads, stream, a, row_bytes);
      case CodebookMode::kBFloat16:
        return Launch(CodebookConvKernel<FilterTile, Rounded, Float>, blocks, FilterTile::kThreads, stream, a,
                      row_bytes);
      default:
        return Launch(CodebookConvKernel<FilterTile, Integers, Float>, blocks, FilterTile::kThreads, stream, a,
                      row_bytes);
    }
  });
}

}  // namespace tersetorch
