#include <cmath>

#include "kernels/common/cuda.cuh"
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

// The bits of a tile's filters, of which the first is filter `first` of all, for an output pixel.
__device__ void StoreBits(const XnorConv2dArgs& a, bool whole, std::int64_t pixel, std::int64_t first,
                          std::uint32_t bits) {
  auto* y = reinterpret_cast<std::uint32_t*>(a.bits) + pixel * 2 * CeilDiv(a.groups * a.filters, 64) + first / 32;
  if (whole) {
    *y = bits;
    return;
  }
  const int shift = static_cast<int>(first % 32);
  atomicOr(y, bits << shift);
  if (shift != 0 && bits >> (32 - shift) != 0) atomicOr(y + 1, bits >> (32 - shift));
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) XnorConvKernel(XnorConv2dArgs a, bool whole) {
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
    const std::int64_t group = tile / of_group, in_group = tile % of_group * kXnorFilters;
    const std::int64_t first = group * a.filters + in_group;
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
    const bool within = in_group + lane < a.filters;
    const std::int64_t o = first + lane;
#pragma unroll
    for (int m = 0; m < Tile::kPixels; ++m) {
      const std::int64_t pixel = from + m;
      if (pixel >= pixels) break;
      const int dot = taps[m] * static_cast<int>(a.channels) - 2 * counters[m].Count();
      if (a.bits != nullptr) {
        const unsigned bits = __ballot_sync(kWholeWarp, within && dot < a.thresholds[o]);
        if (lane == 0) StoreBits(a, whole, pixel, first, bits);
      } else if (within && a.dots != nullptr) {
        a.dots[pixel * a.groups * a.filters + o] = dot;
      } else if (within) {
        const float scale = a.scale == nullptr ? 1.0f : a.scale[o], bias = a.bias == nullptr ? 0.0f : a.bias[o];
        a.floats[pixel * a.groups * a.filters + o] = fmaf(static_cast<float>(dot), scale, bias);
      }
    }
  }
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
  const std::int64_t pixels = a.images * a.out_height * a.out_width, tiles = XnorConvTiles(a.filters, a.groups);
  if (pixels == 0 || tiles == 0) return cudaSuccess;
  if (a.bits != nullptr) {
    const auto bytes = static_cast<std::size_t>(8 * pixels * CeilDiv(a.groups * a.filters, 64));
    const int error = cudaMemsetAsync(a.bits, 0, bytes, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(CeilDiv(pixels, PixelTile::kWarps * PixelTile::kPixels)), BlocksOnY(tiles, 1));
  return Launch(XnorConvKernel<PixelTile>, grid, PixelTile::kThreads, stream, a, XnorWholeTiles(a));
}

int XnorSplitGroupsCuda(const std::uint64_t* x, std::int64_t pixels, std::int64_t groups, std::int64_t channels,
                        std::uint64_t* split, void* stream) noexcept {
  const std::int64_t words = pixels * groups * CeilDiv(channels, 64);
  if (words == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(words, SplitTile::kThreads)));
  return Launch(SplitGroups<SplitTile>, grid, SplitTile::kThreads, stream, x, pixels, groups, channels, split);
}

}  // namespace tersetorch
