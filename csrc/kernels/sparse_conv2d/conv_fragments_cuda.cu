#include <type_traits>

#include "kernels/common/cuda.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "kernels/sparse_conv2d/conv_fragments_cuda.h"
#include "kernels/sparse_conv2d/conv_numbers.cuh"

namespace tersetorch {
namespace {

// ---- numbers

constexpr int kWords = 16;                // of channels that are multiplied together
constexpr int kUnits = kWords / 4;        // of 16 bytes
constexpr int kRowsOfFragment = 16;       // filters
constexpr int kTapUnits = 2 * kWarpSize;  // of a tap's two fragments
constexpr int kFilterTile = 64, kMostTaps = 36, kPlaces = 512;

// How words hold channels.
struct BFloat16Words {
  using Sum = float;
  using Bits = std::uint16_t;
  static constexpr int kInWord = 2;
  __device__ static std::uint32_t BitsOf(float number, float) { return FromFloat<BFloat16>(number).bits; }
};
struct Int8Words {
  using Sum = int;
  using Bits = std::uint8_t;
  static constexpr int kInWord = 4;
  __device__ static std::uint32_t BitsOf(float number, float inverse) {
    return static_cast<std::uint32_t>(Rounded(number, inverse)) & 0xffu;
  }
};

// Channels of a group in blocks of kWords words, and what lies where in scratch.
struct FragmentLayout {
  int group_filters, group_channels, taps, row_tiles, channel_blocks;
  std::int64_t pixels;

  __host__ __device__ explicit FragmentLayout(const ConvCudaArgs& a)
      : group_filters(static_cast<int>(a.shape.out_channels / a.shape.groups)),
        group_channels(static_cast<int>(a.shape.in_channels / a.shape.groups)),
        taps(static_cast<int>(a.shape.kernel_h * a.shape.kernel_w)),
        row_tiles((group_filters + kRowsOfFragment - 1) / kRowsOfFragment),
        channel_blocks(static_cast<int>(CeilDiv(group_channels, a.mode == ConvMode::kInt8 ? 4 * kWords : 2 * kWords))),
        pixels(a.height * a.width) {}

  // Units of a tile of rows: [channel_blocks][taps][2 fragments][lanes].
  __host__ __device__ std::int64_t RowTileUnits() const { return std::int64_t{channel_blocks} * taps * kTapUnits; }
  __host__ __device__ std::int64_t WeightUnits(const ConvCudaArgs& a) const {
    return a.shape.groups * row_tiles * RowTileUnits();
  }
  // Units of an image: [groups][channel_blocks][pixels][kUnits].
  __host__ __device__ std::int64_t ImageUnits(const ConvCudaArgs& a) const {
    return a.shape.groups * channel_blocks * pixels * kUnits;
  }
};

// ---- tiles

// Warps lie in a grid over the tile; a warp has kSlots times 16 filters and kGroups times 8 outputs.
template <int kGroupsOfWarp>
struct FragmentTile {
  static constexpr int kFilterWarps = 2, kNumberWarps = 4, kWarps = kFilterWarps * kNumberWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSlots = kFilterTile / kFilterWarps / kRowsOfFragment, kGroups = kGroupsOfWarp;
  static constexpr int kNumbers = kNumberWarps * kGroups * 8;
  static constexpr int kStages = 2, kCopies = kPlaces * kUnits / kThreads;
  static constexpr int kBlocksAtOnce = kGroups == 8 ? 1 : 2;
  static_assert(kSlots * kFilterWarps * kRowsOfFragment == kFilterTile && kCopies * kThreads == kPlaces * kUnits);
};

// A block writes 16 filters of a block of channels.
struct ExpandTile {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;

  struct Memory {
    alignas(16) std::uint32_t words[kMostTaps * kTapUnits * 4];
  };
};

// A block packs so many pixels of a block of channels.
struct PackTile {
  static constexpr int kThreads = 256, kPixels = kThreads / kUnits;
};

// ---- kernels

template <typename Tile, typename Words>
__global__ void __launch_bounds__(Tile::kThreads, 4) ConvExpandKernel(ConvCudaArgs a) {
  using Bits = typename Words::Bits;
  const FragmentLayout layout(a);
  auto& memory = SharedMemory<typename Tile::Memory>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int taps = layout.taps, block = static_cast<int>(blockIdx.x % static_cast<unsigned>(layout.channel_blocks));
  const unsigned tile = blockIdx.x / static_cast<unsigned>(layout.channel_blocks);
  const int group = static_cast<int>(tile / static_cast<unsigned>(layout.row_tiles)),
            first = static_cast<int>(tile % static_cast<unsigned>(layout.row_tiles)) * kRowsOfFragment;
  auto* units = reinterpret_cast<uint4*>(memory.words);
  for (int i = thread; i < taps * kTapUnits; i += Tile::kThreads) units[i] = {0, 0, 0, 0};
  __syncthreads();
  const int low = block * kWords * Words::kInWord * taps;
  const bool last = block + 1 == layout.channel_blocks;
  const int high = last ? layout.group_channels * taps : low + kWords * Words::kInWord * taps;
#pragma unroll 1
  for (int r = warp; r < kRowsOfFragment && first + r < layout.group_filters; r += Tile::kWarps) {
    const std::int64_t filter = std::int64_t{group} * layout.group_filters + first + r;
    const Row row = RowAt(a.weight, filter);
    const int from = block == 0 ? row.begin : FindColumn(a.weight, row.begin, row.end, low);
    const int to = last ? row.end : FindColumn(a.weight, row.begin, row.end, high);
    // Columns that do not rise are damage: two lanes could have the same place.
    bool damaged = row.damaged || from > to;
    for (int k = from + lane; k < to; k += kWarpSize) {
      const std::int32_t column = ColumnAt(a.weight, k);
      damaged |= column < low || column >= high || (k > from && ColumnAt(a.weight, k - 1) >= column);
      WeightAt(a.weight, k, damaged);
    }
    // Of the fragments' words: 4 g + t is the lane, a half of them in each fragment.
    const int row_word = 4 * (4 * (r % 8)) + r / 8;
    if (__any_sync(kWholeWarp, damaged) != 0) {
      // One NaN makes every sum NaN; integers have it in their scale, which several blocks may have to say.
      if (lane != 0) continue;
      if constexpr (Words::kInWord == 2) {
        *reinterpret_cast<Bits*>(&memory.words[row_word]) = 0x7fc0;
      } else {
        atomicExch(reinterpret_cast<unsigned*>(&a.scales[a.images + filter].scale), __float_as_uint(DamagedWeight()));
      }
      continue;
    }
    const float inverse = Words::kInWord == 4 ? a.scales[a.images + filter].inverse : 0.0f;
    for (int k = from + lane; k < to; k += kWarpSize) {
      const int in_block = ColumnAt(a.weight, k) - low, channel = in_block / taps, tap = in_block - channel * taps;
      const int word = channel / Words::kInWord;
      const int at = (tap * kTapUnits + word % 4 / 2 * kWarpSize + word / 4) * 4 + word % 2 * 2 + row_word;
      const std::uint32_t bits = Words::BitsOf(WeightAt(a.weight, k, damaged), inverse);
      reinterpret_cast<Bits*>(&memory.words[at])[channel % Words::kInWord] = static_cast<Bits>(bits);
    }
  }
  __syncthreads();
  uint4* to = static_cast<uint4*>(a.scratch) + std::int64_t{blockIdx.x} * taps * kTapUnits;
  for (int i = thread; i < taps * kTapUnits; i += Tile::kThreads) to[i] = units[i];
}

template <typename Tile, typename Words, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) ConvPackKernel(ConvCudaArgs a) {
  constexpr int kNumbers = 4 * Words::kInWord;  // of a unit
  LetNextBegin();
  const FragmentLayout layout(a);
  const auto parts = static_cast<unsigned>(CeilDiv(layout.pixels, Tile::kPixels));
  const auto blocks = static_cast<unsigned>(layout.channel_blocks), groups = static_cast<unsigned>(a.shape.groups);
  const unsigned part = blockIdx.x % parts, block = blockIdx.x / parts % blocks;
  const unsigned group = blockIdx.x / parts / blocks % groups;
  const std::int64_t image = blockIdx.x / parts / blocks / groups;
  // A quarter of a warp has 8 neighbouring pixels: whole sectors of x where channels come first.
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, unit = lane / 8;
  const std::int64_t pixel =
      std::int64_t{part} * Tile::kPixels + static_cast<int>(threadIdx.x) / kWarpSize * 8 + lane % 8;
  if (pixel >= layout.pixels) return;
  const int first = static_cast<int>(block) * kWords * Words::kInWord + unit * kNumbers;
  const int count = layout.group_channels - first;
  const float inverse = Words::kInWord == 4 ? a.scales[image].inverse : 0.0f;
  std::uint32_t words[4] = {};
  const Float* x = static_cast<const Float*>(a.x) + image * a.x_steps.image + pixel * a.x_steps.column +
                   (std::int64_t{group} * layout.group_channels + first) * a.x_steps.channel;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) {
    const float number = i < count ? ToFloat(x[i * a.x_steps.channel]) : 0.0f;
    words[i / Words::kInWord] |= Words::BitsOf(number, inverse) << i % Words::kInWord * (32 / Words::kInWord);
  }
  uint4* packed = static_cast<uint4*>(a.scratch) + layout.WeightUnits(a) + image * layout.ImageUnits(a);
  packed[((std::int64_t{group} * blocks + block) * layout.pixels + pixel) * kUnits + unit] = {words[0], words[1],
                                                                                              words[2], words[3]};
}

// The sum of an output's products with its non-zeros alone, in their order.
[[maybe_unused]] __device__ float SumOfNonZeros(const ConvCudaArgs& a, std::int64_t image, std::int64_t filter,
                                                std::int64_t i, std::int64_t j) {
  const Row row = RowAt(a.weight, filter);
  if (row.damaged) return DamagedWeight();
  const std::int64_t top = i * a.shape.stride_h - a.pad_h, left = j * a.shape.stride_w - a.pad_w;
  const std::int64_t origin = image * a.x_steps.image + top * a.x_steps.row + left * a.x_steps.column;
  float sum = 0;
#pragma unroll 1
  for (std::int32_t k = row.begin; k < row.end; ++k) {
    const Tap tap = TapAt(a, filter, k);
    const std::int64_t h = top + tap.down, w = left + tap.right;
    const bool read = 0 <= h && h < a.height && 0 <= w && w < a.width;
    const float x = read ? InputAt(a, origin + tap.offset) : 0.0f;
    sum += ToFloat(FromFloat<BFloat16>(tap.value)) * ToFloat(FromFloat<BFloat16>(x));
  }
  return sum;
}

// Neighbouring blocks share a tile of x.
template <typename Tile, typename Words>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksAtOnce) ConvFragmentsKernel(ConvCudaArgs a) {
#if TERSETORCH_TENSOR_CORES
  using Sum = typename Words::Sum;
  constexpr int kSlots = Tile::kSlots, kGroups = Tile::kGroups, kCopies = Tile::kCopies, kNumbers = Tile::kNumbers;
  const FragmentLayout layout(a);
  const ConvCudaPlan& plan = a.plan;
  const ConvShape& s = a.shape;
  uint4* memory = DynamicSharedMemory<uint4>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int g = lane / 4, t = lane % 4;

  // The block's part: filters fastest, then groups, then tiles.
  unsigned rest = blockIdx.x;
  const auto next_part = [&](std::int64_t parts) {
    const unsigned part = rest % static_cast<unsigned>(parts);
    rest /= static_cast<unsigned>(parts);
    return static_cast<int>(part);
  };
  const int first_filter = next_part(CeilDiv(layout.group_filters, kFilterTile)) * kFilterTile;
  const int group = next_part(s.groups);
  const int first_column = next_part(CeilDiv(a.out_width, plan.columns)) * plan.columns;
  const int first_row = next_part(CeilDiv(a.out_height, plan.rows)) * plan.rows;
  const std::int64_t first_image = std::int64_t{rest} * plan.images;

  // What this thread copies for each block of channels: from where in the tile's images, or nothing.
  const int stage_units = plan.images * plan.in_size * kUnits;
  const std::int64_t image_units = layout.ImageUnits(a), block_units = layout.pixels * kUnits;
  int from[kCopies];
#pragma unroll
  for (int c = 0; c < kCopies; ++c) {
    const int item = c * Tile::kThreads + thread, place = item / kUnits, image = place / plan.in_size;
    const int in_image = place - image * plan.in_size, row = in_image / plan.in_pitch;
    const std::int64_t h = first_row * s.stride_h - a.pad_h + row;
    const std::int64_t w = first_column * s.stride_w - a.pad_w + in_image - row * plan.in_pitch;
    const bool inside =
        item < stage_units && first_image + image < a.images && 0 <= h && h < a.height && 0 <= w && w < a.width;
    from[c] = inside ? static_cast<int>(image * image_units + (h * a.width + w) * kUnits + item % kUnits) : -1;
    if (inside || item >= stage_units) continue;
    memory[item] = memory[stage_units + item] = {0, 0, 0, 0};
  }

  // Where the lane's outputs have their first inputs, and the lane's channels there.
  int places[kGroups];
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    const int number = (warp / Tile::kFilterWarps * kGroups + n) * 8 + g, image = number / plan.outputs;
    const int in_image = number - image * plan.outputs, i = in_image / plan.pitch, j = in_image - i * plan.pitch;
    const int place = static_cast<int>(image * plan.in_size + i * s.stride_h * plan.in_pitch + j * s.stride_w);
    places[n] = (image < plan.images ? place * kUnits : 0) + t;
  }

  WaitForPrevious();
  const auto* scratch = static_cast<const uint4*>(a.scratch);
  const uint4* x = scratch + layout.WeightUnits(a) + first_image * image_units +
                   std::int64_t{group} * layout.channel_blocks * block_units;
  const auto copy = [&](int block) {
    uint4* stage = memory + block % Tile::kStages * stage_units;
#pragma unroll
    for (int c = 0; c < kCopies; ++c) {
      if (block < layout.channel_blocks && from[c] >= 0) {
        CopyAsync16(stage + c * Tile::kThreads + thread, x + block * block_units + from[c]);
      }
    }
    CommitCopies();
  };

  // Tiles of rows past the last are the last.
  const int steps = layout.channel_blocks * layout.taps;
  const uint4* rows[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int tile = first_filter / kRowsOfFragment + warp % Tile::kFilterWarps * kSlots + slot;
    rows[slot] = scratch +
                 (std::int64_t{group} * layout.row_tiles + min(tile, layout.row_tiles - 1)) * layout.RowTileUnits() +
                 lane;
  }
  uint4 ahead[kSlots][2];
  const auto load = [&](int step) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const uint4* of_step = rows[slot] + std::int64_t{min(step, steps - 1)} * kTapUnits;
      ahead[slot][0] = of_step[0];
      ahead[slot][1] = of_step[kWarpSize];
    }
  };

  Sum sums[kSlots][kGroups][4] = {};
  const int across = static_cast<int>(s.dilation_w) * kUnits,
            down = static_cast<int>(s.dilation_h) * plan.in_pitch * kUnits, kernel_w = static_cast<int>(s.kernel_w);
  copy(0);
  load(0);
  int step = 0;
#pragma unroll 1
  for (int block = 0; block < layout.channel_blocks; ++block) {
    WaitForCopies<0>();
    __syncthreads();  // all have this block, and all are done with the one before
    copy(block + 1);
    const uint4* stage = memory + block % Tile::kStages * stage_units;
    int column = 0, tap_of_row = 0, tap = 0;
#pragma unroll 1
    for (int i = 0; i < layout.taps; ++i) {
      uint4 weights[kSlots][2];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        weights[slot][0] = ahead[slot][0];
        weights[slot][1] = ahead[slot][1];
      }
      load(++step);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const uint4 words = stage[places[n] + tap];
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          const uint4 low = weights[slot][0], high = weights[slot][1];
          MultiplyFragments(sums[slot][n], {low.x, low.y, low.z, low.w}, words.x, words.y);
          MultiplyFragments(sums[slot][n], {high.x, high.y, high.z, high.w}, words.z, words.w);
        }
      }
      if (++column == kernel_w) {
        column = 0, tap_of_row += down, tap = tap_of_row;
      } else {
        tap += across;
      }
    }
  }
  WaitForCopies<0>();
  __syncthreads();

  // By way of memory, so that a warp stores neighbouring outputs. Columns are moved by the row's last bits: the lanes
  // of a half-warp meet in no bank.
  auto* results = reinterpret_cast<ConvSum*>(memory);
  const int first_slot = warp % Tile::kFilterWarps * kSlots, first_number = warp / Tile::kFilterWarps * kGroups * 8;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int filter = (first_slot + slot) * kRowsOfFragment + 8 * half + g;
        const int number = (first_number + 8 * n + 2 * t) ^ (8 * (filter % 4));
        const Sum left = sums[slot][n][2 * half], right = sums[slot][n][2 * half + 1];
        uint2 pair;
        if constexpr (std::is_same_v<Sum, float>) {
          pair = {__float_as_uint(left), __float_as_uint(right)};
        } else {
          pair = {static_cast<ConvSum>(left), static_cast<ConvSum>(right)};
        }
        *reinterpret_cast<uint2*>(&results[filter * kNumbers + number]) = pair;
      }
    }
  }
  __syncthreads();
  constexpr int kFilters = kFilterTile / Tile::kWarps;  // of a warp
#pragma unroll 1
  for (int number = lane; number < kNumbers; number += kWarpSize) {
    const int in_tile = number / plan.outputs, in_image = number - in_tile * plan.outputs;
    const int i = in_image / plan.pitch, j = in_image - i * plan.pitch;
    const std::int64_t image = first_image + in_tile, row = first_row + i, column = first_column + j;
    const bool inside = in_tile < plan.images && image < a.images && i < plan.rows && row < a.out_height &&
                        j < plan.columns && column < a.out_width;
    if (!inside) continue;
    const std::int64_t at = image * a.y_steps.image + row * a.y_steps.row + column * a.y_steps.column;
#pragma unroll 2
    for (int f = 0; f < kFilters; ++f) {
      const int of_tile = warp * kFilters + f;
      if (first_filter + of_tile >= layout.group_filters) break;
      const std::int64_t filter = std::int64_t{group} * layout.group_filters + first_filter + of_tile;
      ConvSum sum = results[of_tile * kNumbers + (number ^ (8 * (of_tile % 4)))];
      if constexpr (std::is_same_v<Sum, float>) {
        const float whole = __uint_as_float(sum);
        if (whole != whole) sum = __float_as_uint(SumOfNonZeros(a, image, filter, row, column));
      }
      PutOutput(a, at + filter * a.y_steps.channel, Finished(a, image, filter, sum));
    }
  }
#endif
}

// ---- launchers

constexpr std::int64_t kMultiprocessors = 132;  // of an H100

std::int64_t TilesOf(const ConvCudaArgs& a, const ConvCudaPlan& plan) {
  return CeilDiv(a.images, plan.images) * CeilDiv(a.out_height, plan.rows) * CeilDiv(a.out_width, plan.columns);
}
std::int64_t BlocksOf(const ConvCudaArgs& a, const ConvCudaPlan& plan) {
  return TilesOf(a, plan) * a.shape.groups * CeilDiv(a.shape.out_channels / a.shape.groups, kFilterTile);
}

// Clocks of ConvFragmentsKernel.
double ClocksOf(const ConvCudaArgs& a, const ConvCudaPlan& plan) {
  constexpr double kProducts = 730, kLeast = 1000;
  const FragmentLayout layout(a);
  const double of_block = std::max(kLeast, layout.taps * 2.0 * kWords * kFilterTile * plan.numbers / kProducts);
  return static_cast<double>(CeilDiv(BlocksOf(a, plan), kMultiprocessors)) * layout.channel_blocks * of_block;
}

// Tiles of at most so many numbers, or none that fit.
ConvCudaPlan TilesFor(const ConvCudaArgs& a, int numbers) {
  const ConvShape& s = a.shape;
  ConvCudaPlan plan{};
  const auto parts_of = [](std::int64_t size, std::int64_t most) { return CeilDiv(size, CeilDiv(size, most)); };
  const bool contiguous = s.stride_w == 1 && s.stride_h == 1;
  const std::int64_t columns = parts_of(a.out_width, 64);
  const std::int64_t in_pitch = (columns - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  const std::int64_t pitch = contiguous ? in_pitch : columns;
  if (in_pitch > kPlaces) return plan;
  std::int64_t rows = std::min(a.out_height, (numbers - columns) / pitch + 1);
  const auto in_rows = [&] { return (rows - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1; };
  while (rows > 1 && in_rows() * in_pitch > kPlaces) --rows;
  rows = parts_of(a.out_height, rows);
  const std::int64_t size = in_rows() * in_pitch, outputs = (rows - 1) * pitch + columns;
  if (size > kPlaces) return plan;
  std::int64_t images = 1;
  if (rows == a.out_height && columns == a.out_width) {
    images = std::max<std::int64_t>(1, std::min({a.images, numbers / outputs, kPlaces / size}));
  }
  plan.fragments = true, plan.numbers = numbers, plan.splits = 1;
  plan.columns = static_cast<int>(columns), plan.rows = static_cast<int>(rows), plan.pitch = static_cast<int>(pitch);
  plan.images = static_cast<int>(images), plan.outputs = static_cast<int>(outputs);
  plan.in_pitch = static_cast<int>(in_pitch), plan.in_rows = static_cast<int>(in_rows());
  plan.in_size = static_cast<int>(size);
  return plan;
}

template <typename Words>
int LaunchAll(const ConvCudaArgs& a, void* stream) {
  const FragmentLayout layout(a);
  const std::int64_t channel_blocks = a.shape.groups * layout.channel_blocks;
  int error = Launch(ConvExpandKernel<ExpandTile, Words>, BlocksOnX(channel_blocks * layout.row_tiles),
                     ExpandTile::kThreads, stream, a);
  if (error != cudaSuccess) return error;
  error = WithFloat(a.stored_as, [&](auto number) {
    return Launch(ConvPackKernel<PackTile, Words, decltype(number)>,
                  BlocksOnX(a.images * channel_blocks * CeilDiv(layout.pixels, PackTile::kPixels)), PackTile::kThreads,
                  stream, a);
  });
  if (error != cudaSuccess) return error;
  const auto launch = [&](auto tile) {
    using Tile = decltype(tile);
    const std::int64_t stages = std::int64_t{Tile::kStages} * a.plan.images * a.plan.in_size * kUnits * sizeof(uint4);
    const std::int64_t results = std::int64_t{kFilterTile} * Tile::kNumbers * sizeof(ConvSum);
    return LaunchEarly(ConvFragmentsKernel<Tile, Words>, BlocksOnX(BlocksOf(a, a.plan)), Tile::kThreads,
                       static_cast<std::size_t>(std::max(stages, results)), stream, a);
  };
  return a.plan.numbers == FragmentTile<8>::kNumbers ? launch(FragmentTile<8>{}) : launch(FragmentTile<4>{});
}

}  // namespace

ConvCudaPlan ConvFragmentPlan(const ConvCudaArgs& a) noexcept {
  const ConvShape& s = a.shape;
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  const bool exact = a.mode != ConvMode::kExact ||
                     (a.stored_as == FloatDtype::kBFloat16 && a.weight.stored_as == CsrValues::kBFloat16);
  const bool empty = a.images * a.out_height * a.out_width * s.in_channels * s.out_channels == 0;
  if (!exact || empty || s.kernel_h * s.kernel_w > kMostTaps || !HasTensorCores()) return {};
  // 32 bits number what a tile reads.
  const FragmentLayout layout(a);
  const bool fits = a.height + 2 * a.pad_h < kMost && a.width + 2 * a.pad_w < kMost && s.stride_h < kMost &&
                    s.stride_w < kMost && a.x_steps.row == a.width * a.x_steps.column &&
                    layout.ImageUnits(a) < kMost / kPlaces &&
                    std::int64_t{layout.channel_blocks} * layout.taps < kMost / 64;
  if (!fits || (s.kernel_h - 1) * s.dilation_h >= kPlaces || (s.kernel_w - 1) * s.dilation_w >= kPlaces) return {};
  const ConvCudaPlan large = TilesFor(a, FragmentTile<8>::kNumbers), small = TilesFor(a, FragmentTile<4>::kNumbers);
  if (!small.fragments || !large.fragments) return large;
  return ClocksOf(a, small) <= ClocksOf(a, large) ? small : large;
}

bool ConvTakesFragments(const ConvCudaArgs& a, const ConvCudaPlan& plan) noexcept {
  constexpr double kLaunches = 3500, kBytes = 1374, kNonZeros = 11;  // of a clock; of a multiprocessor
  const FragmentLayout layout(a);
  const double packed = 16.0 * static_cast<double>(a.images * layout.ImageUnits(a) + layout.WeightUnits(a));
  const double of_x = static_cast<double>(a.images * a.x_steps.image * (a.stored_as == FloatDtype::kFloat32 ? 4 : 2));
  const double products =
      static_cast<double>(a.images * a.out_height * a.out_width) * static_cast<double>(a.weight.nnz);
  return ClocksOf(a, plan) + kLaunches + (packed + of_x) / kBytes < products / (kNonZeros * kMultiprocessors);
}

std::int64_t ConvFragmentBytes(const ConvCudaArgs& a) noexcept {
  const FragmentLayout layout(a);
  return 16 * (layout.WeightUnits(a) + a.images * layout.ImageUnits(a));
}

int ConvFragmentsCuda(const ConvCudaArgs& a, void* stream) noexcept {
  return a.mode == ConvMode::kInt8 ? LaunchAll<Int8Words>(a, stream) : LaunchAll<BFloat16Words>(a, stream);
}

}  // namespace tersetorch
