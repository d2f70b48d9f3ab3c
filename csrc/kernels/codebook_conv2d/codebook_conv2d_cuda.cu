#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/codebook_conv2d/codebook_conv2d_cuda.h"
#include "kernels/codebook_matmul/codebook_paths_cuda.h"
#include "kernels/common/cuda.cuh"
#include "kernels/common/tensor_cores.cuh"

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

// ---- windows: outputs as samples of codebook_matmul, in its order

// A block makes so many words of the windows of some outputs. Lanes are outputs while it reads, and words while it
// writes: the pitch keeps both from meeting in a bank.
struct WindowTile {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize, kOutputs = kWarpSize, kWords = 64, kMostInWord = 4;

  struct alignas(16) Tap {
    std::int32_t offset, down, right;  // from an output's first tap in channel 0 of the group
    bool within;
  };
  struct Memory {
    Tap taps[kMostInWord][kWords];
    std::uint32_t words[kOutputs][kWords + 1];
  };
};

// Words of exact windows hold a column each; those of a step of codebook_matmul hold columns that lie 16 apart.
struct WindowOrder {
  __device__ std::uint32_t Column(std::uint32_t word, int i) const {
    return in_word == 1 ? word : word / 16 * 16 * in_word + 16 * i + word % 16;
  }
  int in_word;
};

// x[i], i < in_word, as a word.
__device__ std::uint32_t PackedWord(const float (&x)[WindowTile::kMostInWord], int in_word) {
  if (in_word == 1) return __float_as_uint(x[0]);
  return FromFloat<BFloat16>(x[0]).bits | std::uint32_t{FromFloat<BFloat16>(x[1]).bits} << 16;
}
__device__ std::uint32_t PackedWord(const std::int8_t (&x)[WindowTile::kMostInWord], int) {
  std::uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < WindowTile::kMostInWord; ++i) word |= std::uint32_t{static_cast<std::uint8_t>(x[i])} << 8 * i;
  return word;
}

// Windows of outputs [first, first + count) for the group that begins with `channel`.
template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads)
    CodebookWindowsKernel(CodebookConvCudaArgs a, std::int64_t channel, std::int64_t first, std::int64_t count) {
  constexpr bool kIntegers = std::is_same_v<Float, std::int8_t>;
  using Number = std::conditional_t<kIntegers, std::int8_t, float>;
  LetNextBegin();
  auto& memory = SharedMemory<typename Tile::Memory>();
  const ConvShape& s = a.shape;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const WindowOrder order{kIntegers ? 4 : a.mode == CodebookMode::kExact ? 1 : 2};
  const auto words = static_cast<std::uint32_t>(a.plan.window_stride / 4);
  const std::uint32_t tiles = (words + Tile::kWords - 1) / Tile::kWords, first_word = blockIdx.x % tiles * Tile::kWords;
  const std::int64_t first_of_block = std::int64_t{blockIdx.x / tiles} * Tile::kOutputs;
  for (int i = thread; i < Tile::kWords * order.in_word; i += Tile::kThreads) {
    const std::uint32_t column = order.Column(first_word + i % Tile::kWords, i / Tile::kWords);
    const auto kernel_w = static_cast<std::uint32_t>(s.kernel_w), row = column / kernel_w;
    const auto kernel_h = static_cast<std::uint32_t>(s.kernel_h);
    const std::int64_t down = row % kernel_h * s.dilation_h, right = column % kernel_w * s.dilation_w;
    const bool within = column < a.weight.columns;
    const std::int64_t offset =
        within ? row / kernel_h * a.x_steps.channel + down * a.x_steps.row + right * a.x_steps.column : 0;
    memory.taps[i / Tile::kWords][i % Tile::kWords] = {
        static_cast<std::int32_t>(offset), static_cast<std::int32_t>(down), static_cast<std::int32_t>(right), within};
  }
  const std::int64_t plane = a.out_height * a.out_width, output = first + min(first_of_block + lane, count - 1);
  const std::int64_t image = output / plane;
  const auto place = static_cast<std::uint32_t>(output - image * plane),
             out_width = static_cast<std::uint32_t>(a.out_width);
  const auto top = static_cast<std::int32_t>(place / out_width * s.stride_h - a.pad_h);
  const auto left = static_cast<std::int32_t>(place % out_width * s.stride_w - a.pad_w);
  const Float* x = static_cast<const Float*>(a.x) + image * a.x_steps.image + channel * a.x_steps.channel +
                   top * a.x_steps.row + left * a.x_steps.column;
  __syncthreads();
#pragma unroll 4  // so many loads are on their way
  for (int word = warp; word < Tile::kWords; word += Tile::kWarps) {
    Number numbers[Tile::kMostInWord] = {};
#pragma unroll
    for (int i = 0; i < (kIntegers ? 4 : 2); ++i) {
      if (i >= order.in_word) break;
      const typename Tile::Tap tap = memory.taps[i][word];
      const auto h = static_cast<std::uint32_t>(top + tap.down), v = static_cast<std::uint32_t>(left + tap.right);
      if (tap.within && h < static_cast<std::uint32_t>(a.height) && v < static_cast<std::uint32_t>(a.width)) {
        if constexpr (kIntegers) {
          numbers[i] = x[tap.offset];
        } else {
          numbers[i] = ToFloat(x[tap.offset]);
        }
      }
    }
    memory.words[lane][word] = PackedWord(numbers, order.in_word);
  }
  if (kIntegers && first_word == 0 && warp == 0 && first_of_block + lane < count) {
    a.window_scales[first_of_block + lane] = a.image_scales[image];
  }
  __syncthreads();
  for (int i = thread; i < Tile::kOutputs * Tile::kWords; i += Tile::kThreads) {
    const std::int64_t n = first_of_block + i / Tile::kWords;
    const std::uint32_t word = first_word + i % Tile::kWords;
    if (n >= count || word >= words) continue;
    static_cast<std::uint32_t*>(a.windows)[n * words + word] = memory.words[i / Tile::kWords][i % Tile::kWords];
  }
}

// ---- launchers

// The product that the filters of group g and `count` windows make, whose outputs begin with `first`.
CodebookMatmulCudaArgs ProductOf(const CodebookConvCudaArgs& a, std::int64_t g, std::int64_t first,
                                 std::int64_t count) {
  const CodebookWeight& w = a.weight;
  const std::int64_t rows = w.rows / a.shape.groups, before = g * rows, plane = a.out_height * a.out_width;
  CodebookMatmulCudaArgs product{};
  product.weight = w;
  product.weight.rows = rows;
  product.weight.codes += before * CodeRowBytes(w.columns, w.column_block, CodeBits(w.entries));
  if (w.per_row) product.weight.codebook += before * w.entries;
  product.mode = a.mode;
  product.stored_as = a.stored_as;
  product.bias = a.bias == nullptr ? nullptr : a.bias + before;
  product.relu = a.relu;
  product.samples = count;
  product.packed = a.windows, product.packed_stride = a.plan.window_stride;
  product.parts = a.parts, product.part_count = a.plan.part_count;
  product.sample_scales = a.window_scales;
  product.y_rows = w.rows;
  const bool last = a.y_steps.channel == 1 && plane > 1;
  if (!last) product.plane = plane, product.first_place = first;
  const std::int64_t at = before * a.y_steps.channel + (last ? first * w.rows : 0);
  product.y = static_cast<char*>(a.y) + at * (a.stored_as == FloatDtype::kFloat32 ? 4 : 2);
  return product;
}

int ConvolveWindows(const CodebookConvCudaArgs& a, void* stream) {
  const std::int64_t outputs = a.images * a.out_height * a.out_width, channels = a.shape.in_channels / a.shape.groups;
  for (std::int64_t first = 0; first < outputs; first += a.plan.outputs) {
    const std::int64_t count = std::min(a.plan.outputs, outputs - first);
    const std::int64_t blocks =
        CeilDiv(count, WindowTile::kOutputs) * CeilDiv(a.plan.window_stride / 4, WindowTile::kWords);
    for (std::int64_t g = 0; g < a.shape.groups; ++g) {
      const auto launch = [&](auto number) {
        return Launch(CodebookWindowsKernel<WindowTile, decltype(number)>, static_cast<unsigned>(blocks),
                      WindowTile::kThreads, stream, a, g * channels, first, count);
      };
      int error = a.mode == CodebookMode::kInt8 ? launch(std::int8_t{}) : WithFloat(a.stored_as, launch);
      if (error == cudaSuccess) error = CodebookTilesCuda(ProductOf(a, g, first, count), stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace

CodebookConvPlan CodebookConvPlanCuda(const CodebookConvCudaArgs& a) noexcept {
  const CodebookWeight& w = a.weight;
  constexpr std::int64_t kMost = std::int64_t{1} << 30, kBytes = 64 << 20;
  constexpr std::int64_t kTogether = 128;
  // From so many filters on a tile of codebook_matmul, half empty or less, takes less time than a filter after the
  // other.
  const std::int64_t filters = a.mode == CodebookMode::kExact ? 64 : 32;
  const std::int64_t outputs = a.images * a.out_height * a.out_width;
  const bool fits = a.height + 2 * a.pad_h < kMost && a.width + 2 * a.pad_w < kMost && outputs < kMost &&
                    a.shape.in_channels * a.height * a.width < kMost;
  if (w.rows / a.shape.groups < filters || outputs == 0 || !fits || w.columns == 0 || !HasFewTables(w) ||
      !IsAligned(w.codes, 16) || (a.mode != CodebookMode::kExact && !HasTensorCores())) {
    return {};
  }
  CodebookConvPlan plan;
  const int bits = KernelBits(w.entries);
  plan.window_stride = a.mode == CodebookMode::kExact
                           ? CeilDiv(w.columns, 4) * 16
                           : CodeChunks(w.columns, bits) * (512 / bits) * (a.mode == CodebookMode::kInt8 ? 1 : 2);
  // Waves of equal size.
  const std::int64_t fit = std::max<std::int64_t>(1, kBytes / plan.window_stride / kTogether) * kTogether;
  plan.outputs = std::min(outputs, CeilDiv(CeilDiv(outputs, CeilDiv(outputs, fit)), kTogether) * kTogether);
  plan.part_count = CodebookTilePartsCuda(ProductOf(a, 0, 0, plan.outputs));
  return plan;
}

int CodebookConvCuda(const CodebookConvCudaArgs& a, void* stream) noexcept {
  const std::int64_t outputs = a.images * a.out_height * a.out_width;
  if (a.weight.rows == 0 || outputs == 0) return cudaSuccess;
  if (a.plan.outputs > 0) return ConvolveWindows(a, stream);
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
