#include "kernels/common/cuda.cuh"
#include "kernels/sparse_conv2d/conv_fragments_cuda.h"
#include "kernels/sparse_conv2d/conv_numbers.cuh"
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"

namespace tersetorch {
namespace {

// ---- tiles

// A block computes a tile of outputs of some filters.
template <int kOfLane>
struct ConvTile {
  static constexpr int kOutputs = kOfLane;  // of a lane
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kFilters = 4;  // of a warp, at most
};

// 32 bits hold an input, a float or an integer.
struct ConvMemory {
  static constexpr int kInputs = 10 * 1024;

  struct Tap {
    int place;  // in bytes, from an output's first input
    std::uint32_t value;
  };

  std::uint32_t x[kInputs];
  Tap taps[8][kWarpSize];  // of each warp
};

// A block adds what blocks left for neighbouring outputs.
struct AddTile {
  static constexpr int kThreads = 256;
};

// A block computes so many outputs of one filter.
struct OutputTile {
  static constexpr int kThreads = 128;
};

// A block finds the scale of one image or one filter.
struct ScaleTile {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;

  struct Memory {
    std::uint32_t largest[kWarps];
  };
};

// The non-zeros that the block works on.
template <typename Tile>
struct Taps {
  Tap taps[Tile::kThreads];
};

// ---- kernels

// ScaleOf of panels.h on the device.
__device__ ConvScale ScaleOf(std::uint32_t largest_bits) {
  if (largest_bits >= 0x7f800000u) return {DamagedWeight(), 0.0f};
  if (largest_bits < (127u - 100u) << 23) return {0.0f, 0.0f};
  const float largest = __uint_as_float(largest_bits);
  return {largest / 127.0f, 127.0f / largest};
}

// The bits of the largest |x| that the thread reads; so many loads are on their way.
template <typename Tile, typename Float>
__device__ std::uint32_t LargestOfThread(const Float* x, std::int64_t size) {
  std::uint32_t largest = 0;
#pragma unroll 8
  for (std::int64_t i = threadIdx.x; i < size; i += Tile::kThreads) {
    largest = max(largest, __float_as_uint(ToFloat(x[i])) & 0x7fffffffu);
  }
  return largest;
}

// Images first. What is damaged in a filter is left to ConvKernel.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ConvScaleKernel(ConvCudaArgs a) {
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t item = blockIdx.x, filter = item - a.images;
  // Compared as integers: infinities are above all numbers, and NaN above them.
  std::uint32_t largest = 0;
  if (filter < 0) {
    const std::int64_t size = a.x_steps.image, first = item * size;
    if (a.stored_as == FloatDtype::kFloat32) {
      largest = LargestOfThread<Tile>(static_cast<const float*>(a.x) + first, size);
    } else if (a.stored_as == FloatDtype::kBFloat16) {
      largest = LargestOfThread<Tile>(static_cast<const BFloat16*>(a.x) + first, size);
    } else {
      largest = LargestOfThread<Tile>(static_cast<const Float16*>(a.x) + first, size);
    }
  } else {
    const Row row = RowAt(a.weight, filter);
    for (std::int64_t k = row.begin + thread; k < row.end; k += Tile::kThreads) {
      bool damaged = false;
      largest = max(largest, __float_as_uint(WeightAt(a.weight, k, damaged)) & 0x7fffffffu);
    }
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, distance));
  }
  auto& memory = SharedMemory<typename Tile::Memory>();
  if (thread % kWarpSize == 0) memory.largest[thread / kWarpSize] = largest;
  __syncthreads();
  for (int warp = 0; warp < Tile::kWarps; ++warp) largest = max(largest, memory.largest[warp]);
  if (thread == 0) a.scales[item] = ScaleOf(largest);
}

// What the sums of a mode are: floats, of numbers rounded or not, or integers.
struct FloatSums {
  using Sum = float;
  static constexpr bool kIntegers = false;
  __device__ static float Product(const ConvCudaArgs& a, float weight, float x, const ConvScale&, const ConvScale&) {
    if (a.mode == ConvMode::kExact) return weight * x;
    return ToFloat(FromFloat<BFloat16>(weight)) * ToFloat(FromFloat<BFloat16>(x));
  }
};
struct IntegerSums {
  using Sum = int;
  static constexpr bool kIntegers = true;
  __device__ static int Product(const ConvCudaArgs&, float weight, float x, const ConvScale& of_weight,
                                const ConvScale& of_x) {
    return Rounded(weight, of_weight.inverse) * Rounded(x, of_x.inverse);
  }
};

// Neighbouring blocks compute the same outputs of other filters: what one reads, the next finds in the cache.
template <typename Tile, typename Sums>
__global__ void __launch_bounds__(Tile::kThreads) ConvKernel(ConvCudaArgs a) {
  auto& taps = SharedMemory<Taps<Tile>>().taps;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t filter = blockIdx.x % a.weight.rows, columns = a.out_width, rows = a.out_height;
  const std::int64_t output = blockIdx.x / a.weight.rows * Tile::kThreads + thread;
  const std::int64_t j = output % columns, i = output / columns % rows, image = output / columns / rows;
  const bool inside = image < a.images;  // the others decode with them
  const std::int64_t top = i * a.shape.stride_h - a.pad_h, left = j * a.shape.stride_w - a.pad_w;
  const std::int64_t origin = image * a.x_steps.image + top * a.x_steps.row + left * a.x_steps.column;
  const Row row = RowAt(a.weight, filter);
  constexpr bool kIntegers = Sums::kIntegers;
  ConvScale of_weight{}, of_x{};
  if (kIntegers) of_weight = a.scales[a.images + filter], of_x = a.scales[inside ? image : 0];
  bool damaged = row.damaged;
  typename Sums::Sum total = 0;
  for (std::int64_t first = row.begin; first < row.end; first += Tile::kThreads) {
    const int count = static_cast<int>(min(std::int64_t{Tile::kThreads}, row.end - first));
    if (thread < count) taps[thread] = TapAt(a, filter, static_cast<std::int32_t>(first + thread));
    __syncthreads();
    if (inside) {
      for (int t = 0; t < count; ++t) {
        const Tap& tap = taps[t];
        const std::int64_t h = top + tap.down, w = left + tap.right;
        const bool read = 0 <= h && h < a.height && 0 <= w && w < a.width;
        // Damage is NaN; integers have none.
        damaged |= kIntegers && tap.value != tap.value;
        const float x = read ? InputAt(a, origin + tap.offset) : 0.0f;
        total += Sums::Product(a, tap.value, x, of_weight, of_x);
      }
    }
    __syncthreads();
  }
  if (!inside) return;
  const float bias = a.bias == nullptr ? 0.0f : a.bias[filter];
  float sum = static_cast<float>(total);
  sum = kIntegers ? fmaf(sum * of_weight.scale, of_x.scale, bias) : sum + bias;
  if (damaged) sum = DamagedWeight();
  if (a.relu && sum < 0) sum = 0;  // NaN stays
  PutOutput(a, image * a.y_steps.image + filter * a.y_steps.channel + i * a.y_steps.row + j * a.y_steps.column, sum);
}

// A number as products take it, rounded as the mode says.
__device__ std::uint32_t Staged(const ConvCudaArgs& a, float number, float inverse) {
  if (Integers(a)) return static_cast<std::uint32_t>(Rounded(number, inverse));
  return __float_as_uint(a.mode == ConvMode::kBFloat16 ? ToFloat(FromFloat<BFloat16>(number)) : number);
}

// The tile's inputs of channels [first, first + count) of x, from those of its first output on.
template <typename Tile, typename Float>
__device__ void StageInputs(const ConvCudaArgs& a, std::int64_t image, std::int64_t top, std::int64_t left,
                            std::int64_t first, int count, std::uint32_t* to) {
  const ConvCudaPlan& plan = a.plan;
  const int size = plan.images * plan.in_size;
  for (int place = static_cast<int>(threadIdx.x); place < size; place += Tile::kThreads) {
    const int n = place / plan.in_size, in_image = place - n * plan.in_size;
    const int row = in_image / plan.in_pitch, column = in_image - row * plan.in_pitch;
    const std::int64_t h = top + row, w = left + column;
    const bool inside = image + n < a.images && row < plan.in_rows && 0 <= h && h < a.height && 0 <= w && w < a.width;
    const ConvSteps& steps = a.x_steps;
    const Float* x = static_cast<const Float*>(a.x);
    if (inside) x += (image + n) * steps.image + first * steps.channel + h * steps.row + w * steps.column;
    const float inverse = Integers(a) && inside ? a.scales[image + n].inverse : 0.0f;
#pragma unroll 8
    for (int c = 0; c < count; ++c) {
      to[c * size + place] = Staged(a, inside ? ToFloat(x[c * steps.channel]) : 0.0f, inverse);
    }
  }
}

// A non-zero after the other times the outputs of a lane.
template <bool kIntegers, int kOutputs>
__device__ void AddTaps(const ConvMemory::Tap* taps, int count, const char* inputs, const int (&places)[kOutputs],
                        ConvSum (&sums)[kOutputs]) {
#pragma unroll 4
  for (int t = 0; t < count; ++t) {
    const ConvMemory::Tap tap = taps[t];
#pragma unroll
    for (int p = 0; p < kOutputs; ++p) {
      const auto x = *reinterpret_cast<const std::uint32_t*>(inputs + (places[p] + tap.place));
      sums[p] = kIntegers
                    ? sums[p] + tap.value * x
                    : __float_as_uint(fmaf(__uint_as_float(tap.value), __uint_as_float(x), __uint_as_float(sums[p])));
    }
  }
}

// Neighbouring blocks share a tile of x.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) ConvTileKernel(ConvCudaArgs a) {
  constexpr int kOutputs = Tile::kOutputs, kFilters = Tile::kFilters;
  auto& memory = SharedMemory<ConvMemory>();
  const ConvCudaPlan& plan = a.plan;
  const ConvShape& s = a.shape;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int group_filters = static_cast<int>(s.out_channels / s.groups);
  const int group_channels = static_cast<int>(s.in_channels / s.groups),
            taps = static_cast<int>(s.kernel_h * s.kernel_w);

  // The block's part: filters fastest, then what shares them, then tiles.
  const int block_filters = Tile::kWarps * plan.warp_filters;
  const int filter_blocks = static_cast<int>(CeilDiv(group_filters, block_filters));
  const auto across = static_cast<unsigned>(CeilDiv(a.out_width, plan.columns)),
             down = static_cast<unsigned>(CeilDiv(a.out_height, plan.rows));
  unsigned block = blockIdx.x;
  const auto next_part = [&](unsigned parts) {
    const unsigned part = block % parts;
    block /= parts;
    return static_cast<int>(part);
  };
  const int filter_block = next_part(filter_blocks), group = next_part(static_cast<unsigned>(s.groups));
  const int split = next_part(plan.splits);
  const std::int64_t first_column = std::int64_t{next_part(across)} * plan.columns;
  const std::int64_t first_row = std::int64_t{next_part(down)} * plan.rows;
  const std::int64_t first_image = std::int64_t{block} * plan.images;

  const int channel_blocks = static_cast<int>(CeilDiv(group_channels, plan.channels));
  const int per_split = static_cast<int>(CeilDiv(channel_blocks, plan.splits));
  const int begin = min(split * per_split, channel_blocks), end = min(begin + per_split, channel_blocks);

  // Where the lane's outputs have their first inputs, in bytes.
  int places[kOutputs];
#pragma unroll
  for (int p = 0; p < kOutputs; ++p) {
    const int number = p * kWarpSize + lane, image = number / plan.outputs, in_image = number - image * plan.outputs;
    const int i = in_image / plan.pitch, j = in_image - i * plan.pitch;
    const int place = static_cast<int>(image * plan.in_size + i * s.stride_h * plan.in_pitch + j * s.stride_w);
    places[p] = image < plan.images ? 4 * place : 0;
  }

  // The warp's filters, and what is left of the non-zeros of filter f in lane f.
  const int first_in_group = filter_block * block_filters + warp;
  const std::int64_t first_filter = std::int64_t{group} * group_filters + first_in_group;
  const int filters =
      min(plan.warp_filters, static_cast<int>(CeilDiv(max(0, group_filters - first_in_group), Tile::kWarps)));
  int next = 0, last = 0;
  float inverse = 0;
  unsigned damaged = 0;  // a bit for each filter
  if (lane < filters) {
    const std::int64_t filter = first_filter + lane * Tile::kWarps;
    const Row row = RowAt(a.weight, filter);
    next = row.begin, last = row.end;
    if (Integers(a)) inverse = a.scales[a.images + filter].inverse;
    if (row.damaged) damaged = 1u << lane;
  }
  if (plan.splits != 1) {
    for (int f = 0; f < filters; ++f) {
      const int row_begin = __shfl_sync(kWholeWarp, next, f), row_end = __shfl_sync(kWholeWarp, last, f);
      int from = row_begin, to = row_end;
      if (begin != 0) from = FindColumn(a.weight, row_begin, row_end, std::int64_t{begin} * plan.channels * taps);
      if (end != channel_blocks) {
        to = FindColumn(a.weight, row_begin, row_end, std::int64_t{end} * plan.channels * taps);
      }
      if (lane == f) next = from, last = to;
      if (from > to) damaged |= 1u << f;
    }
  }

  const char* inputs = reinterpret_cast<const char*>(memory.x);
  ConvSum sums[kFilters][kOutputs] = {};
  for (int channels = begin; channels < end; ++channels) {
    const int first_channel = channels * plan.channels, count = min(plan.channels, group_channels - first_channel);
    __syncthreads();
    WithFloatOnDevice(a.stored_as, [&](auto number) {
      StageInputs<Tile, decltype(number)>(a, first_image, first_row * s.stride_h - a.pad_h,
                                          first_column * s.stride_w - a.pad_w,
                                          std::int64_t{group} * group_channels + first_channel, count, memory.x);
    });
    __syncthreads();
    const int low = first_channel * taps, high = low + count * taps;
#pragma unroll 1
    for (int f = 0; f < filters; ++f) {
      int k = __shfl_sync(kWholeWarp, next, f);
      const int end_k = __shfl_sync(kWholeWarp, last, f);
      const float of_filter = __shfl_sync(kWholeWarp, inverse, f);
#pragma unroll 1
      while (k < end_k) {
        // A lane decodes one non-zero. Those of later channels wait, unless no later block of channels comes.
        const int own = k + lane, column = own < end_k ? ColumnAt(a.weight, own) : 0;
        const bool here = own < end_k && (column < high || channels + 1 == end);
        const unsigned waits = ~__ballot_sync(kWholeWarp, here);
        const int ready = waits == 0 ? kWarpSize : __ffs(static_cast<int>(waits)) - 1;
        if (lane < ready) {
          bool bad = column < low || column >= high;
          const std::uint32_t value = Staged(a, WeightAt(a.weight, own, bad), of_filter);
          const int in_block = bad ? 0 : column - low, channel = in_block / taps, tap = in_block - channel * taps;
          const int kernel_w = static_cast<int>(s.kernel_w), down_tap = tap / kernel_w;
          const int right = (tap - down_tap * kernel_w) * static_cast<int>(s.dilation_w);
          const int place =
              channel * plan.images * plan.in_size + down_tap * static_cast<int>(s.dilation_h) * plan.in_pitch + right;
          memory.taps[warp][lane] = {4 * place, value};
          if (bad) damaged |= 1u << f;
        }
        __syncwarp();
        // A register has no address: each filter's sums have their own copy of the loop.
#pragma unroll
        for (int g = 0; g < kFilters; ++g) {
          if (g != f) continue;
          if (Integers(a)) {
            AddTaps<true>(memory.taps[warp], ready, inputs, places, sums[g]);
          } else {
            AddTaps<false>(memory.taps[warp], ready, inputs, places, sums[g]);
          }
        }
        __syncwarp();
        k += ready;
        if (ready < kWarpSize) break;
      }
      if (lane == f) next = k;
    }
  }

  // By way of memory, where x is no longer needed: a loop over registers would be as much code again as the products.
  static_assert(kFilters * kOutputs * Tile::kThreads <= ConvMemory::kInputs);
  __syncthreads();
#pragma unroll
  for (int f = 0; f < kFilters; ++f) {
    const bool bad = __any_sync(kWholeWarp, static_cast<int>(damaged >> f & 1)) != 0;
#pragma unroll
    for (int p = 0; p < kOutputs; ++p) {
      memory.x[(p * kFilters + f) * Tile::kThreads + thread] = bad ? DamagedSum(Integers(a)) : sums[f][p];
    }
  }
  const bool whole = plan.splits == 1;
  const std::int64_t plane = a.out_height * a.out_width, step = whole ? a.y_steps.channel : plane;
#pragma unroll 1
  for (int p = 0; p < kOutputs; ++p) {
    const int number = p * kWarpSize + lane, in_tile = number / plan.outputs,
              in_image = number - in_tile * plan.outputs;
    const int i = in_image / plan.pitch, j = in_image - i * plan.pitch;
    const std::int64_t image = first_image + in_tile, row = first_row + i, column = first_column + j;
    const bool inside = in_tile < plan.images && image < a.images && i < plan.rows && row < a.out_height &&
                        j < plan.columns && column < a.out_width;
    if (!inside) continue;
    const std::int64_t at = whole ? image * a.y_steps.image + row * a.y_steps.row + column * a.y_steps.column
                                  : (split * a.images + image) * s.out_channels * plane + row * a.out_width + column;
#pragma unroll
    for (int f = 0; f < kFilters; ++f) {
      if (f >= filters) break;
      const std::int64_t filter = first_filter + f * Tile::kWarps;
      const ConvSum sum = memory.x[(p * kFilters + f) * Tile::kThreads + thread];
      if (whole) {
        PutOutput(a, at + filter * step, Finished(a, image, filter, sum));
      } else {
        static_cast<ConvSum*>(a.scratch)[at + filter * step] = sum;
      }
    }
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ConvAddKernel(ConvCudaArgs a) {
  const std::int64_t outputs = a.images * a.shape.out_channels * a.out_height * a.out_width;
  const std::int64_t at = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  if (at >= outputs) return;
  float sum = 0;
  ConvSum total = 0;
  bool damaged = false;  // NaN tells of itself
#pragma unroll 8
  for (int split = 0; split < a.plan.splits; ++split) {
    const ConvSum part = static_cast<const ConvSum*>(a.scratch)[split * outputs + at];
    damaged = damaged || part == DamagedSum(true);
    total += part;
    sum += __uint_as_float(part);
  }
  if (Integers(a)) {
    if (damaged) total = DamagedSum(true);
  } else {
    total = __float_as_uint(sum);
  }
  const std::int64_t row = at / a.out_width, plane = row / a.out_height, j = at % a.out_width, i = row % a.out_height;
  const std::int64_t image = plane / a.shape.out_channels, filter = plane % a.shape.out_channels;
  const std::int64_t to =
      image * a.y_steps.image + filter * a.y_steps.channel + i * a.y_steps.row + j * a.y_steps.column;
  PutOutput(a, to, Finished(a, image, filter, total));
}

}  // namespace

ConvCudaPlan ConvPlanCuda(const ConvCudaArgs& a) noexcept {
  const ConvCudaPlan fragments = ConvFragmentPlan(a);
  if (fragments.fragments && ConvTakesFragments(a, fragments)) return fragments;
  constexpr std::int64_t kMostOutputs = 8 * kWarpSize, kBlocks = 132, kWarps = ConvTile<8>::kWarps;
  constexpr std::int64_t kFewProducts = 100000;  // of a block that shares filters
  const ConvShape& s = a.shape;
  ConvCudaPlan plan{};
  const std::int64_t halo_w = (s.kernel_w - 1) * s.dilation_w, halo_h = (s.kernel_h - 1) * s.dilation_h;
  const std::int64_t group_channels = s.in_channels / s.groups, group_filters = s.out_channels / s.groups;
  if (halo_w >= ConvMemory::kInputs || halo_h >= ConvMemory::kInputs || s.stride_w > 64 || s.stride_h > 64) return plan;
  if (a.images == 0 || a.out_height == 0 || a.out_width == 0 || s.in_channels == 0 || s.out_channels == 0) {
    return plan;
  }
  const auto parts_of = [](std::int64_t size, std::int64_t most) { return CeilDiv(size, CeilDiv(size, most)); };
  const bool contiguous = s.stride_w == 1 && s.stride_h == 1;
  std::int64_t columns = parts_of(a.out_width, 64);
  const std::int64_t in_pitch = (columns - 1) * s.stride_w + halo_w + 1, pitch = contiguous ? in_pitch : columns;
  if (pitch > kMostOutputs) return plan;
  std::int64_t rows = parts_of(a.out_height, (kMostOutputs - columns) / pitch + 1);
  const auto in_rows = [&] { return (rows - 1) * s.stride_h + halo_h + 1; };
  while (rows > 1 && in_rows() * in_pitch > ConvMemory::kInputs / 2) rows = CeilDiv(rows, 2);
  if (in_rows() * in_pitch > ConvMemory::kInputs) return plan;
  plan.columns = static_cast<int>(columns), plan.rows = static_cast<int>(rows), plan.pitch = static_cast<int>(pitch);
  const std::int64_t outputs = (rows - 1) * pitch + columns;
  std::int64_t size = in_rows() * in_pitch, images = 1;
  if (rows == a.out_height && columns == a.out_width) {
    images = std::min(a.images, kMostOutputs / outputs);
    // Image after image in the banks as row after row.
    if (images > 1) size += ((outputs - size) % kWarpSize + kWarpSize) % kWarpSize;
    images = std::max<std::int64_t>(1, std::min(images, ConvMemory::kInputs / size));
  }
  plan.outputs = static_cast<int>(outputs), plan.images = static_cast<int>(images);
  plan.in_pitch = static_cast<int>(in_pitch), plan.in_rows = static_cast<int>(in_rows());
  plan.in_size = static_cast<int>(size);
  const std::int64_t of_lane = CeilDiv(images * outputs, kWarpSize);
  plan.lane_outputs = of_lane <= 2 ? 2 : of_lane <= 4 ? 4 : static_cast<int>(std::max<std::int64_t>(6, of_lane));
  const std::int64_t most_channels = ConvMemory::kInputs / (size * images);

  // Enough blocks for the device: first of fewer filters, then of fewer channels.
  const std::int64_t tiles = CeilDiv(a.images, images) * CeilDiv(a.out_height, rows) * CeilDiv(a.out_width, columns);
  const auto blocks = [&] { return tiles * s.groups * CeilDiv(group_filters, kWarps * plan.warp_filters); };
  plan.warp_filters = 4;
  while (plan.warp_filters > 1 &&
         (blocks() < kBlocks * (plan.warp_filters > 2 ? 2 : 1) || kWarps * plan.warp_filters / 2 >= group_filters)) {
    plan.warp_filters /= 2;
  }
  std::int64_t splits = 1;
  if (blocks() < kBlocks) {
    const std::int64_t products = a.weight.nnz * images * outputs / std::max<std::int64_t>(1, blocks() / tiles);
    splits = std::min({CeilDiv(2 * kBlocks, blocks()), products / kFewProducts + 1, group_channels});
  }
  plan.channels = static_cast<int>(std::min(most_channels, CeilDiv(group_channels, splits)));
  plan.splits = static_cast<int>(std::min(splits, CeilDiv(group_channels, plan.channels)));
  plan.tiled = true;
  return plan;
}

std::int64_t ConvScratchBytes(const ConvCudaArgs& a) noexcept {
  if (a.plan.fragments) return ConvFragmentBytes(a);
  if (!a.plan.tiled || a.plan.splits == 1) return 0;
  return a.plan.splits * a.images * a.shape.out_channels * a.out_height * a.out_width * sizeof(float);
}

namespace {

int LaunchTiles(const ConvCudaArgs& a, void* stream) {
  const ConvCudaPlan& plan = a.plan;
  const auto launch = [&](auto tile) {
    using Tile = decltype(tile);
    const std::int64_t filter_blocks = CeilDiv(a.shape.out_channels / a.shape.groups, Tile::kWarps * plan.warp_filters);
    const std::int64_t tiles =
        CeilDiv(a.images, plan.images) * CeilDiv(a.out_height, plan.rows) * CeilDiv(a.out_width, plan.columns);
    const dim3 blocks(static_cast<unsigned>(tiles * plan.splits * a.shape.groups * filter_blocks), 1, 1);
    const int error = Launch(ConvTileKernel<Tile>, blocks, Tile::kThreads, stream, a);
    if (error != cudaSuccess || plan.splits == 1) return error;
    const std::int64_t outputs = a.images * a.shape.out_channels * a.out_height * a.out_width;
    const dim3 adds(static_cast<unsigned>(CeilDiv(outputs, AddTile::kThreads)), 1, 1);
    return Launch(ConvAddKernel<AddTile>, adds, AddTile::kThreads, stream, a);
  };
  switch (plan.lane_outputs) {
    case 2:
      return launch(ConvTile<2>{});
    case 4:
      return launch(ConvTile<4>{});
    case 6:
      return launch(ConvTile<6>{});
    case 7:
      return launch(ConvTile<7>{});
    default:
      return launch(ConvTile<8>{});
  }
}

}  // namespace

int ConvCuda(const ConvCudaArgs& a, void* stream) noexcept {
  const std::int64_t outputs = a.images * a.out_height * a.out_width;
  if (a.weight.rows == 0 || outputs == 0) return cudaSuccess;
  const dim3 blocks(static_cast<unsigned>(CeilDiv(outputs, OutputTile::kThreads) * a.weight.rows), 1, 1);
  if (a.mode == ConvMode::kInt8) {
    const dim3 items(static_cast<unsigned>(a.images + a.weight.rows), 1, 1);
    const int error = Launch(ConvScaleKernel<ScaleTile>, items, ScaleTile::kThreads, stream, a);
    if (error != cudaSuccess) return error;
    if (a.plan.fragments) return ConvFragmentsCuda(a, stream);
    if (a.plan.tiled) return LaunchTiles(a, stream);
    return Launch(ConvKernel<OutputTile, IntegerSums>, blocks, OutputTile::kThreads, stream, a);
  }
  if (a.plan.fragments) return ConvFragmentsCuda(a, stream);
  if (a.plan.tiled) return LaunchTiles(a, stream);
  return Launch(ConvKernel<OutputTile, FloatSums>, blocks, OutputTile::kThreads, stream, a);
}

}  // namespace tersetorch
