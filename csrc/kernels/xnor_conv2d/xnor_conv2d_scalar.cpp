#include "kernels/common/scalars.h"
#include "kernels/xnor_conv2d/xnor_conv2d.h"

namespace tersetorch {
namespace {

// Channels [64 i, 64 i + 64) of a group that are all -1, or 0 for +1.
std::uint64_t Outside(const XnorConv2dArgs& a, std::int64_t i) {
  const std::int64_t left = a.channels - 64 * i;
  if (a.outside > 0) return 0;
  return left >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << left) - 1;
}

std::uint64_t Filter(const XnorConv2dArgs& a, std::int64_t tile, std::int64_t lane, std::int64_t tap, std::int64_t i) {
  const std::int64_t word = (tile * a.kernel_h * a.kernel_w + tap) * a.words + i;
  const auto half = [&](std::int64_t h) {
    return std::uint64_t{At<std::uint32_t>(a.weight, (2 * word + h) * kXnorFilters + lane)};
  };
  return half(0) | half(1) << 32;
}

std::int32_t Dot(const XnorConv2dArgs& a, std::int64_t n, std::int64_t i, std::int64_t j, std::int64_t tile,
                 std::int64_t lane) {
  const std::int64_t group = tile / (XnorConvTiles(a.filters, 1));
  std::int64_t dot = 0;
  for (std::int64_t kh = 0; kh < a.kernel_h; ++kh) {
    for (std::int64_t kw = 0; kw < a.kernel_w; ++kw) {
      const std::int64_t row = i * a.stride_h + kh * a.dilation_h - a.pad_h;
      const std::int64_t column = j * a.stride_w + kw * a.dilation_w - a.pad_w;
      const bool inside = row >= 0 && row < a.height && column >= 0 && column < a.width;
      if (!inside && a.outside == 0) continue;
      const std::int64_t pixel = ((n * a.height + row) * a.width + column) * a.pixel_words + group * a.words;
      std::int64_t differ = 0;
      for (std::int64_t k = 0; k < a.words; ++k) {
        const std::uint64_t x = inside ? At<std::uint64_t>(a.x, pixel + k) : Outside(a, k);
        differ += __builtin_popcountll(Filter(a, tile, lane, kh * a.kernel_w + kw, k) ^ x);
      }
      dot += a.channels - 2 * differ;
    }
  }
  return static_cast<std::int32_t>(dot);
}

void Store(const XnorConv2dArgs& a, std::int64_t pixel, std::int64_t o, std::int32_t dot) {
  const std::int64_t filters = a.groups * a.filters;
  if (a.dots != nullptr) return Put(a.dots, pixel * filters + o, dot);
  if (a.floats != nullptr) {
    const float scale = a.scale == nullptr ? 1.0f : At<float>(a.scale, o);
    const float bias = a.bias == nullptr ? 0.0f : At<float>(a.bias, o);
    return Put(a.floats, pixel * filters + o, __builtin_fmaf(static_cast<float>(dot), scale, bias));
  }
  const std::int64_t word = pixel * ((filters + 63) / 64) + o / 64;
  const std::uint64_t bit = dot < At<std::int32_t>(a.thresholds, o);
  Put(a.bits, word, At<std::uint64_t>(a.bits, word) | bit << o % 64);
}

void Convolve(const XnorConv2dArgs& a, const XnorConvPart& p) noexcept {
  const std::int64_t tiles_of_group = XnorConvTiles(a.filters, 1);
  for (std::int64_t i = p.row_begin; i < p.row_end; ++i) {
    for (std::int64_t j = 0; j < a.out_width; ++j) {
      for (std::int64_t tile = p.tile_begin; tile < p.tile_end; ++tile) {
        const std::int64_t group = tile / tiles_of_group, first = tile % tiles_of_group * kXnorFilters;
        for (std::int64_t lane = 0; lane < kXnorFilters && first + lane < a.filters; ++lane) {
          Store(a, (p.image * a.out_height + i) * a.out_width + j, group * a.filters + first + lane,
                Dot(a, p.image, i, j, tile, lane));
        }
      }
    }
  }
}

}  // namespace

const XnorConv2dVariant kXnorConv2dScalar = &Convolve;

}  // namespace tersetorch
