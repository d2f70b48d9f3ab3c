#include <cmath>
#include <limits>

#include "kernels/common/cuda.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "kernels/xnor_conv2d/xnor_conv2d_cuda.h"

namespace tersetorch {
namespace {

// A warp has the filters of a tile, one in each lane, and some pixels.
struct PixelTile {
  static constexpr int kWarps = 8;
  static constexpr int kPixels = 4;  // of a warp
  static constexpr int kThreads = kWarps * kWarpSize;
};

struct SplitTile {
  static constexpr int kThreads = 256;
};

// ---- results

// The filters of a tile, of which the first is filter `first` of all, for an output pixel.
struct FiltersOfTile {
  __device__ FiltersOfTile(const XnorConv2dArgs& a, bool whole, std::int64_t group, std::int64_t tile)
      : a(a),
        whole(whole),
        lane(static_cast<int>(threadIdx.x) % kWarpSize),
        first(group * a.filters + tile * kXnorFilters),
        within(tile * kXnorFilters + lane < a.filters),
        scale(within && a.scale != nullptr ? a.scale[first + lane] : 1.0f),
        bias(within && a.bias != nullptr ? a.bias[first + lane] : 0.0f),
        threshold(within && a.thresholds != nullptr ? a.thresholds[first + lane] : 0) {}

  // Lane l has what filter l gives; all lanes of a warp call it.
  __device__ void Store(std::int64_t pixel, int dot) const {
    if (a.bits != nullptr) {
      const unsigned bits = __ballot_sync(kWholeWarp, within && dot < threshold);
      if (lane == 0) StoreBits(pixel, bits);
    } else if (within && a.dots != nullptr) {
      a.dots[pixel * a.groups * a.filters + first + lane] = dot;
    } else if (within) {
      a.floats[pixel * a.groups * a.filters + first + lane] = fmaf(static_cast<float>(dot), scale, bias);
    }
  }
  __device__ void StoreBits(std::int64_t pixel, std::uint32_t bits) const {
    auto* y = reinterpret_cast<std::uint32_t*>(a.bits) + pixel * 2 * CeilDiv(a.groups * a.filters, 64) + first / 32;
    if (whole) {
      *y = bits;
      return;
    }
    const int shift = static_cast<int>(first % 32);
    atomicOr(y, bits << shift);
    if (shift != 0 && bits >> (32 - shift) != 0) atomicOr(y + 1, bits >> (32 - shift));
  }

  const XnorConv2dArgs& a;
  bool whole;
  int lane;
  std::int64_t first;
  bool within;
  float scale, bias;
  int threshold;
};

// ---- a lane counts for its filter

// Bits that differ: a single one kept back for each place, and the pairs.
struct PairCounter {
  std::uint32_t one = 0;
  int twos = 0;

  __device__ void Take(std::uint32_t first, std::uint32_t second) {
    twos += __popc((first & second) | (one & (first | second)));
    one ^= first ^ second;
  }
  __device__ int Count() const { return 2 * twos + __popc(one); }
};

// Channels [64 i, 64 i + 64) of a group that are all -1, or 0 for +1.
__device__ std::uint64_t OutsideWord(const XnorConv2dArgs& a, std::int64_t i) {
  const std::int64_t rest = a.channels - 64 * i;
  if (a.outside > 0) return 0;
  return rest >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << rest) - 1;
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) XnorConvCountKernel(XnorConv2dArgs a, bool whole) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t of_image = a.out_height * a.out_width, pixels = a.images * of_image;
  const std::int64_t warp = std::int64_t{blockIdx.x} * Tile::kWarps + threadIdx.x / kWarpSize;
  const std::int64_t from = warp * Tile::kPixels;
  if (from >= pixels) return;
  const std::int64_t of_group = CeilDiv(a.filters, kXnorFilters), tiles = a.groups * of_group;
  std::int64_t image[Tile::kPixels], row[Tile::kPixels], column[Tile::kPixels];  // of the first tap
#pragma unroll
  for (int m = 0; m < Tile::kPixels; ++m) {
    const std::int64_t pixel = min(from + m, pixels - 1);
    image[m] = pixel / of_image * a.height;
    row[m] = pixel % of_image / a.out_width * a.stride_h - a.pad_h;
    column[m] = pixel % a.out_width * a.stride_w - a.pad_w;
  }
  for (std::int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const std::int64_t group = tile / of_group;
    const auto* w = reinterpret_cast<const std::uint32_t*>(a.weight) +
                    tile * a.kernel_h * a.kernel_w * 2 * a.words * kXnorFilters + lane;
    const std::uint64_t* x_group = a.x + group * a.words;
    PairCounter counters[Tile::kPixels];
    int taps[Tile::kPixels] = {};
    for (std::int64_t kh = 0; kh < a.kernel_h; ++kh) {
      for (std::int64_t kw = 0; kw < a.kernel_w; ++kw) {
        const std::uint64_t* x[Tile::kPixels];
#pragma unroll
        for (int m = 0; m < Tile::kPixels; ++m) {
          const std::int64_t r = row[m] + kh * a.dilation_h, c = column[m] + kw * a.dilation_w;
          const bool inside = r >= 0 && r < a.height && c >= 0 && c < a.width;
          x[m] = inside ? x_group + ((image[m] + r) * a.width + c) * a.pixel_words : nullptr;
          taps[m] += inside || a.outside != 0;
        }
        for (std::int64_t i = 0; i < a.words; ++i, w += 2 * kXnorFilters) {
          const std::uint32_t low = w[0], high = w[kXnorFilters];
#pragma unroll
          for (int m = 0; m < Tile::kPixels; ++m) {
            if (x[m] == nullptr && a.outside == 0) continue;
            const std::uint64_t signs = x[m] == nullptr ? OutsideWord(a, i) : x[m][i];
            counters[m].Take(low ^ static_cast<std::uint32_t>(signs), high ^ static_cast<std::uint32_t>(signs >> 32));
          }
        }
      }
    }
    const FiltersOfTile filters(a, whole, group, tile % of_group);
#pragma unroll
    for (int m = 0; m < Tile::kPixels; ++m) {
      if (from + m >= pixels) break;
      filters.Store(from + m, taps[m] * static_cast<int>(a.channels) - 2 * counters[m].Count());
    }
  }
}

// ---- tensor cores: they count the ones in common. popcount(w ^ x) = popcount(~w & x) + popcount(w & ~x), which makes
// two products of each, but no counts of either side; and a tap that is left out is 0 as x and as ~x.

// A block has some pixels and two tiles of a group; its warps lie in a grid over them. Words are those of a pixel's
// taps, one after the other; a stage has some of them, and others are on their way.
struct FragmentTile {
  static constexpr int kFragments = 2, kParts = kXnorFilters / 8;  // of a warp, of 16 pixels and 8 filters
  static constexpr int kPixelWarps = 2, kFilterWarps = 2;
  static constexpr int kThreads = kPixelWarps * kFilterWarps * kWarpSize, kBlocksAtOnce = 4;
  static constexpr int kPixels = kPixelWarps * kFragments * 16, kFilters = kFilterWarps * kXnorFilters;
  static constexpr int kWords = 8, kStages = 4;
  static constexpr int kWordsOfStep = 4;

  // Nobody meets in a bank. A half-warp copies 8 words of 2 pixels, and reads 4 words of 4, 2 of which have their
  // halves swapped; a warp reads 4 words, half words of 8 filters each, whose pitch is 4 more than a multiple of 16.
  struct Stage {
    uint2 x[kPixels][kWords];
    alignas(16) std::uint32_t weight[2 * kWords][kFilters + 4];
    std::uint32_t seen[kPixels / 4];  // a byte for each pixel, a bit for each word
  };
  __device__ static int Swizzled(int pixel, int word) { return word ^ (pixel / 2 % 2 * kWordsOfStep); }
  // Nor here, where half-warps write pairs of 4 pixels and warps read 32 filters.
  struct Counts {
    int2 differ[kPixels][kFilters / 2 + 4];
  };
  struct Place {
    std::int64_t first;      // word of x at the first tap
    std::int32_t top, left;  // of that tap
  };
  static constexpr std::int32_t kNowhere = std::numeric_limits<std::int32_t>::min();  // a top that no tap leaves
  struct Memory {
    Stage stages[kStages];
    Place places[kPixels];
    int taps[kPixels];  // that are not left out
  };
  static_assert(sizeof(Counts) <= sizeof(Stage[kStages]) && kWords * 4 == kWarpSize && kPixels <= kThreads);
};

template <typename Tile>
struct FragmentsOfBlock {
  using Stage = typename Tile::Stage;

  __device__ FragmentsOfBlock(const XnorConv2dArgs& a, typename Tile::Memory& memory)
      : a(a),
        memory(memory),
        thread(static_cast<int>(threadIdx.x)),
        words(static_cast<unsigned>(a.words)),
        all(static_cast<int>(a.kernel_h * a.kernel_w * a.words)),
        kernel_w(static_cast<unsigned>(a.kernel_w)) {}

  // Thread p finds out where output pixel `from` + p begins.
  __device__ void FindPlaces(std::int64_t from) const {
    if (thread >= Tile::kPixels) return;
    const std::int64_t of_image = a.out_height * a.out_width, image = (from + thread) / of_image;
    if (image >= a.images) {
      memory.places[thread] = {0, Tile::kNowhere, 0};
      memory.taps[thread] = 0;
      return;
    }
    const auto place = static_cast<unsigned>(from + thread - image * of_image);
    const auto out_width = static_cast<unsigned>(a.out_width);
    const std::int64_t top = place / out_width * a.stride_h - a.pad_h, left = place % out_width * a.stride_w - a.pad_w;
    memory.places[thread] = {((image * a.height + top) * a.width + left) * a.pixel_words,
                             static_cast<std::int32_t>(top), static_cast<std::int32_t>(left)};
    int rows = 0, columns = 0;
    for (int kh = 0; kh < a.kernel_h; ++kh) {
      const std::int64_t r = top + kh * a.dilation_h;
      rows += a.outside != 0 || (r >= 0 && r < a.height);
    }
    for (int kw = 0; kw < a.kernel_w; ++kw) {
      const std::int64_t c = left + kw * a.dilation_w;
      columns += a.outside != 0 || (c >= 0 && c < a.width);
    }
    memory.taps[thread] = rows * columns;
  }

  // Starts the copies of words [word, word + kWords) for tiles [tile, tile + kFilterWarps) of a group, as a group of
  // copies.
  __device__ void Copy(Stage& stage, std::int64_t group, std::int64_t tile, std::int64_t of_group, int word) const {
    if (word < all) {
      CopyX(stage, group, word);
      CopyWeight(stage, group * of_group + tile, min(std::int64_t{Tile::kFilterWarps}, of_group - tile), word);
    }
    CommitCopies();
  }

  // Each thread has its word of some pixels.
  __device__ void CopyX(Stage& stage, std::int64_t group, int word) const {
    const int k = thread % Tile::kWords;
    const bool any = word + k < all;
    const auto at = static_cast<unsigned>(min(word + k, all - 1));
    const unsigned tap = at / words, i = at % words;
    const int down = static_cast<int>(tap / kernel_w) * static_cast<int>(a.dilation_h);
    const int right = static_cast<int>(tap % kernel_w) * static_cast<int>(a.dilation_w);
    const std::uint64_t* x = a.x + (down * a.width + right) * a.pixel_words + group * a.words + i;
    const std::uint64_t outside = any && a.outside != 0 ? OutsideWord(a, i) : 0;
#pragma unroll 1  // nobody waits for copies, and registers are few
    for (int first = 0; first < Tile::kPixels; first += Tile::kThreads / Tile::kWords) {
      const int p = first + thread / Tile::kWords;
      const typename Tile::Place place = memory.places[p];
      const auto r = static_cast<unsigned>(place.top + down), c = static_cast<unsigned>(place.left + right);
      const bool inside = any && r < static_cast<unsigned>(a.height) && c < static_cast<unsigned>(a.width);
      uint2* to = &stage.x[p][Tile::Swizzled(p, k)];
      if (inside) {
        CopyAsync8(to, x + place.first);
      } else {
        *to = {static_cast<std::uint32_t>(outside), static_cast<std::uint32_t>(outside >> 32)};
      }
      const unsigned seen = __ballot_sync(kWholeWarp, inside || (any && a.outside != 0));
      if (thread % kWarpSize == 0) stage.seen[p / 4] = seen;
    }
  }

  __device__ void CopyWeight(Stage& stage, std::int64_t tile, std::int64_t tiles, int word) const {
    constexpr int kOfRow = Tile::kFilters / 4;  // pieces of 16 bytes
#pragma unroll 1
    for (int i = thread; i < 2 * Tile::kWords * kOfRow; i += Tile::kThreads) {
      const int half = i / kOfRow, filter = i % kOfRow * 4, of_tile = filter / kXnorFilters;
      std::uint32_t* to = &stage.weight[half][filter];
      if (of_tile < tiles && 2 * word + half < 2 * all) {
        CopyAsync16(to,
                    a.weight + ((tile + of_tile) * 2 * all + 2 * word + half) * kXnorFilters + filter % kXnorFilters);
      } else {
        to[0] = to[1] = to[2] = to[3] = 0;
      }
    }
  }

  const XnorConv2dArgs& a;
  typename Tile::Memory& memory;
  const int thread;
  const unsigned words;
  const int all;  // words of all taps
  const unsigned kernel_w;
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksAtOnce)
    XnorConvFragmentsKernel(XnorConv2dArgs a, bool whole) {
  auto& memory = SharedMemory<typename Tile::Memory>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int first_pixel = warp / Tile::kFilterWarps * Tile::kFragments * 16;
  const int tile_of_block = warp % Tile::kFilterWarps, first_filter = tile_of_block * kXnorFilters;
  const std::int64_t pixels = a.images * a.out_height * a.out_width;
  const std::int64_t of_group = CeilDiv(a.filters, kXnorFilters), pairs = CeilDiv(of_group, Tile::kFilterWarps);
  // Neighbouring blocks have the same pixels: what one reads, the next finds in the cache.
  const auto together = static_cast<unsigned>(a.groups * pairs);
  const std::int64_t from = std::int64_t{blockIdx.x / together} * Tile::kPixels, pair = blockIdx.x % together;
  const FragmentsOfBlock<Tile> block(a, memory);
  const std::int64_t group = pair / pairs, tile = pair % pairs * Tile::kFilterWarps;
  const bool idle = tile + tile_of_block >= of_group;
  constexpr int kAhead = Tile::kStages - 1;
  int differ[Tile::kFragments][Tile::kParts][4] = {};
  block.FindPlaces(from);
  __syncthreads();
  for (int i = 0; i < kAhead; ++i) block.Copy(memory.stages[i], group, tile, of_group, i * Tile::kWords);
  int now = 0;
  for (int word = 0; word < block.all; word += Tile::kWords) {
    WaitForCopies<kAhead - 1>();
    __syncthreads();  // what others copied is there, and what everybody has used may go
    block.Copy(memory.stages[(now + kAhead) % Tile::kStages], group, tile, of_group, word + kAhead * Tile::kWords);
    const typename Tile::Stage& stage = memory.stages[now];
    now = (now + 1) % Tile::kStages;
    if (idle) continue;
#pragma unroll
    for (int k = 0; k < Tile::kWords; k += Tile::kWordsOfStep) {
      if (word + k >= block.all) break;
      std::uint32_t w[Tile::kParts][2], not_w[Tile::kParts][2];
#pragma unroll
      for (int p = 0; p < Tile::kParts; ++p) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          w[p][half] = stage.weight[2 * (k + t) + half][first_filter + p * 8 + g];
          not_w[p][half] = ~w[p][half];
        }
      }
#pragma unroll
      for (int f = 0; f < Tile::kFragments; ++f) {
        std::uint32_t x[4], not_x[4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int pixel = first_pixel + f * 16 + h * 8 + g;
          const uint2 signs = stage.x[pixel][Tile::Swizzled(pixel, k + t)];
          // The word's bit, in all places.
          const auto seen = static_cast<std::uint32_t>(
              static_cast<std::int32_t>(stage.seen[pixel / 4] << (31 - (pixel % 4 * Tile::kWords + k + t))) >> 31);
          x[h] = signs.x, x[h + 2] = signs.y;
          not_x[h] = ~signs.x & seen, not_x[h + 2] = ~signs.y & seen;
        }
#pragma unroll
        for (int p = 0; p < Tile::kParts; ++p) {
          CountCommonOnes(differ[f][p], x, not_w[p][0], not_w[p][1]);
          CountCommonOnes(differ[f][p], not_x, w[p][0], w[p][1]);
        }
      }
    }
  }
  WaitForCopies<0>();
  __syncthreads();

  auto& counts = *reinterpret_cast<typename Tile::Counts*>(&memory.stages);
#pragma unroll
  for (int f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
    for (int p = 0; p < Tile::kParts; ++p) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        counts.differ[first_pixel + f * 16 + h * 8 + g][first_filter / 2 + p * 4 + t] = {differ[f][p][2 * h],
                                                                                         differ[f][p][2 * h + 1]};
      }
    }
  }
  __syncthreads();
  if (idle) return;
  const FiltersOfTile filters(a, whole, group, tile + tile_of_block);
  for (int p = warp / Tile::kFilterWarps; p < Tile::kPixels && from + p < pixels; p += Tile::kPixelWarps) {
    const int count = reinterpret_cast<const int*>(counts.differ[p])[first_filter + lane];
    filters.Store(from + p, memory.taps[p] * static_cast<int>(a.channels) - 2 * count);
  }
}

// Whether the numbers that the kernel for tensor cores counts in fit 32 bits.
bool FitsFragments(const XnorConv2dArgs& a) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  return a.height + 2 * a.pad_h < kMost && a.width + 2 * a.pad_w < kMost &&
         a.words * a.kernel_h * a.kernel_w < kMost / 2;
}

// A thread has a word of the split pixels.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    SplitGroups(const std::uint64_t* x, std::int64_t pixels, std::int64_t groups, std::int64_t channels,
                std::uint64_t* split) {
  const std::int64_t at = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x, words = CeilDiv(channels, 64);
  if (at >= pixels * groups * words) return;
  const std::int64_t i = at % words, group = at / words % groups, pixel = at / words / groups;
  const std::int64_t first = group * channels + 64 * i, word = pixel * CeilDiv(groups * channels, 64) + first / 64;
  const int shift = static_cast<int>(first % 64), count = static_cast<int>(min(std::int64_t{64}, channels - 64 * i));
  std::uint64_t bits = x[word] >> shift;
  if (shift + count > 64) bits |= x[word + 1] << (64 - shift);
  split[at] = bits & ~std::uint64_t{0} >> (64 - count);
}

}  // namespace

int XnorConv2dCuda(const XnorConv2dArgs& a, void* stream) noexcept {
  const bool fragments = HasBinaryTensorCores() && FitsFragments(a);
  return XnorConv2dCudaBy(fragments ? XnorConvPath::kFragments : XnorConvPath::kCount, a, stream);
}

int XnorConv2dCudaBy(XnorConvPath path, const XnorConv2dArgs& a, void* stream) noexcept {
  const std::int64_t pixels = a.images * a.out_height * a.out_width, tiles = XnorConvTiles(a.filters, a.groups);
  if (pixels == 0 || tiles == 0) return cudaSuccess;
  if (a.bits != nullptr) {
    const auto bytes = static_cast<std::size_t>(8 * pixels * CeilDiv(a.groups * a.filters, 64));
    const int error = cudaMemsetAsync(a.bits, 0, bytes, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  const bool whole = XnorWholeTiles(a);
  if (path == XnorConvPath::kFragments) {
    using Tile = FragmentTile;
    const std::int64_t blocks = CeilDiv(pixels, Tile::kPixels) * a.groups * CeilDiv(a.filters, Tile::kFilters);
    return Launch(XnorConvFragmentsKernel<Tile>, static_cast<unsigned>(blocks), Tile::kThreads, stream, a, whole);
  }
  const dim3 grid(static_cast<unsigned>(CeilDiv(pixels, PixelTile::kWarps * PixelTile::kPixels)), BlocksOnY(tiles, 1));
  return Launch(XnorConvCountKernel<PixelTile>, grid, PixelTile::kThreads, stream, a, whole);
}

int XnorSplitGroupsCuda(const std::uint64_t* x, std::int64_t pixels, std::int64_t groups, std::int64_t channels,
                        std::uint64_t* split, void* stream) noexcept {
  const std::int64_t words = pixels * groups * CeilDiv(channels, 64);
  if (words == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(words, SplitTile::kThreads)));
  return Launch(SplitGroups<SplitTile>, grid, SplitTile::kThreads, stream, x, pixels, groups, channels, split);
}

}  // namespace tersetorch
