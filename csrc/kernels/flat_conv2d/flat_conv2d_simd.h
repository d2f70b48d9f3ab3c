// The algorithm of every vector level, written once over vectors of kLanes floats. Everything here is local to the
// including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/flat_conv2d/flat_conv2d.h"

namespace tersetorch {
namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
// Pixels that are multiplied at once for 1, 2, 3 or 4 panels: sums in 24 of 32 registers, one more for each vector of
// weights. A single panel has as many sums as hide the latency of adding.
constexpr int kTilePanels = 4;
constexpr int kTilePixels[] = {0, 14, 12, 8, 6};
#else
constexpr int kLanes = 8;
constexpr int kTilePanels = 1;  // sums in 12 of 16 registers
constexpr int kTilePixels[] = {0, 6};
#endif
constexpr int kParts = kFlatLanes / kLanes;
using Lanes = Vector<kLanes>;

inline Index Smaller(Index a, Index b) { return a < b ? a : b; }
inline Index Larger(Index a, Index b) { return a > b ? a : b; }

// ---- pixels

// Channels [c, c + 8) of pixels [i, i + 8), or of 16 by 16, turned round.
template <int kBlock>
inline void LoadBlock(const FlatLoadArgs& a, Index c, Index i) {
  Vector<kBlock> block[kBlock];
#pragma GCC unroll 16
  for (Index j = 0; j < kBlock; ++j) {
    const Index at = (c + j) * a.x.step + a.first + i;
    if constexpr (kBlock == 8) {
      block[j] = LoadFloats(a.x.data, a.x.stored_as, at);
    } else {
      block[j] = LoadAt<Vector<kBlock>>(a.x.data, at, 4);
    }
  }
  Transpose(block);
#pragma GCC unroll 16
  for (Index j = 0; j < kBlock; ++j) Store(a.to + (i + j) * a.step + c, block[j]);
}

template <int kBlock>
inline void StoreBlock(const FlatStoreArgs& a, Index c, Index i) {
  Vector<kBlock> block[kBlock];
#pragma GCC unroll 16
  for (Index j = 0; j < kBlock; ++j) block[j] = Load<Vector<kBlock>>(a.from + (i + j) * a.step + c);
  Transpose(block);
#pragma GCC unroll 16
  for (Index j = 0; j < kBlock; ++j) {
    const Index at = (c + j) * a.y.step + a.first + i;
    if constexpr (kBlock == 8) {
      StoreFloats(a.y.data, a.y.stored_as, at, block[j]);
    } else {
      Store(static_cast<float*>(a.y.data) + at, block[j]);
    }
  }
}

// Calls block(c, i) for blocks of channels and pixels, the last ones over others again, and one(c, i) for what no block
// fits in.
template <int kBlock, typename Block, typename One>
inline __attribute__((always_inline)) void InBlocks(Index channels, Index pixels, const Block& block, const One& one) {
  const bool fits = pixels >= kBlock;
  const Index whole = fits ? channels / kBlock * kBlock : 0;
  for (Index c = 0; c < whole; c += kBlock) {
    for (Index i = 0; i < pixels; i += kBlock) block(c, Smaller(i, pixels - kBlock));
  }
  for (Index c = whole; c < channels; ++c) {
    for (Index i = 0; i < pixels; ++i) one(c, i);
  }
}

void LoadPixels(const FlatLoadArgs& args) noexcept {
  const FlatLoadArgs a = args;
  if (a.x.channels_last) {
    for (Index i = 0; i < a.count; ++i) {
      const Index at = (a.first + i) * a.x.step;
      Index c = 0;
      for (; c + 8 <= a.channels; c += 8) Store(a.to + i * a.step + c, LoadFloats(a.x.data, a.x.stored_as, at + c));
      for (; c < a.channels; ++c) a.to[i * a.step + c] = LoadFloat(a.x.data, a.x.stored_as, at + c);
    }
    return;
  }
  const auto one = [&](Index c, Index i) {
    a.to[i * a.step + c] = LoadFloat(a.x.data, a.x.stored_as, c * a.x.step + a.first + i);
  };
  if (a.x.stored_as == FloatDtype::kFloat32) {
    InBlocks<kLanes>(a.channels, a.count, [&](Index c, Index i) { LoadBlock<kLanes>(a, c, i); }, one);
  } else {
    InBlocks<8>(a.channels, a.count, [&](Index c, Index i) { LoadBlock<8>(a, c, i); }, one);
  }
}

void StorePixels(const FlatStoreArgs& args) noexcept {
  const FlatStoreArgs a = args;
  if (a.y.channels_last) {
    for (Index i = 0; i < a.count; ++i) {
      const Index at = (a.first + i) * a.y.step;
      Index c = 0;
      for (; c + 8 <= a.channels; c += 8) {
        StoreFloats(a.y.data, a.y.stored_as, at + c, Load<Float8>(a.from + i * a.step + c));
      }
      for (; c < a.channels; ++c) StoreFloat(a.y.data, a.y.stored_as, at + c, a.from[i * a.step + c]);
    }
    return;
  }
  const auto one = [&](Index c, Index i) {
    StoreFloat(a.y.data, a.y.stored_as, c * a.y.step + a.first + i, a.from[i * a.step + c]);
  };
  if (a.y.stored_as == FloatDtype::kFloat32) {
    InBlocks<kLanes>(a.channels, a.count, [&](Index c, Index i) { StoreBlock<kLanes>(a, c, i); }, one);
  } else {
    InBlocks<8>(a.channels, a.count, [&](Index c, Index i) { StoreBlock<8>(a, c, i); }, one);
  }
}

// ---- lateral

template <int kPixels, int kPanels>
__attribute__((noinline)) void LateralTile(const FlatLateralArgs& a, Index panel, Index pixel) {
  constexpr int kVectors = kPanels * kParts;
  const float* x = a.x + pixel * a.step;
  const float* weights = a.weights + panel * a.channels * kFlatLanes;
  Lanes sums[kPixels][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const Lanes bias = Load<Lanes>(a.bias + panel * kFlatLanes + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) sums[i][v] = bias;
  }
  const float* next = x + kPixels * a.step;
  for (Index c = 0; c < a.channels; ++c) {
    __builtin_prefetch(next + c * kPixels);  // of the next pixels, which lie one after the other
    Lanes w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      w[v] = Load<Lanes>(weights + (v / kParts * a.channels + c) * kFlatLanes + v % kParts * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
      const Lanes number = Splat<kLanes>(Load<float>(x + i * a.step + c));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[i][v] += number * w[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Store(a.to + (panel + v / kParts) * a.panel_step + (pixel + i) * kFlatLanes + v % kParts * kLanes, sums[i][v]);
    }
  }
}

// Some panels for all pixels: whole tiles, then what is left in one or two smaller ones.
template <int kPanels>
inline void LateralPanels(const FlatLateralArgs& a, Index panel) {
  constexpr int kPixels = kTilePixels[kPanels];
  Index i = 0;
  for (; i + kPixels <= a.count; i += kPixels) LateralTile<kPixels, kPanels>(a, panel, i);
  for (; i + 4 <= a.count; i += 4) LateralTile<4, kPanels>(a, panel, i);
  for (; i + 2 <= a.count; i += 2) LateralTile<2, kPanels>(a, panel, i);
  for (; i < a.count; ++i) LateralTile<1, kPanels>(a, panel, i);
}

void Lateral(const FlatLateralArgs& args) noexcept {
  const FlatLateralArgs a = args;
  Index p = 0;
  if constexpr (kTilePanels == 4) {
    // By fours and threes, which no number of panels above 5 leaves over.
    const Index threes = a.panels % 4 == 0 ? 0 : 4 - a.panels % 4;
    if (3 * threes <= a.panels) {
      for (; p < 3 * threes; p += 3) LateralPanels<3>(a, p);
    }
    for (; p + 4 <= a.panels; p += 4) LateralPanels<4>(a, p);
    for (; p + 2 <= a.panels; p += 2) LateralPanels<2>(a, p);
  }
  for (; p < a.panels; ++p) LateralPanels<1>(a, p);
}

// ---- vertical and horizontal

// Columns of v that are kept: a piece of a row, a panel at a time.
constexpr Index kStrip = 256;

// Taps beyond which their number is no constant.
constexpr int kMostTaps = 7;

// What a loop reads again and again stands in local variables: a store might change anything else.

// strip[w] = bias + sum_k taps[k] * rows[k][w], for w < count.
template <int kTaps>
inline void Vertical(const float* const* rows, Index taps_count, const float* taps, const float* bias, Index count,
                     float* strip) {
  constexpr Index kKept = kTaps == 0 ? 1 : kTaps;
  for (int part = 0; part < kFlatLanes; part += kLanes) {
    const Lanes start = Load<Lanes>(bias + part);
    Lanes tap[kKept];
    const float* row[kKept];
#pragma GCC unroll 8
    for (Index k = 0; k < kTaps; ++k) tap[k] = Load<Lanes>(taps + k * kFlatLanes + part), row[k] = rows[k];
    for (Index w = part; w < count * kFlatLanes; w += kFlatLanes) {
      Lanes sum = start;
      if constexpr (kTaps == 0) {
        for (Index k = 0; k < taps_count; ++k) {
          sum += Load<Lanes>(taps + k * kFlatLanes + part) * Load<Lanes>(rows[k] + w);
        }
      } else {
#pragma GCC unroll 8
        for (Index k = 0; k < kTaps; ++k) sum += tap[k] * Load<Lanes>(row[k] + w);
      }
      Store(strip + w, sum);
    }
  }
}

// to[j * step] = sum_k taps[k] * strip[j * stride + k] and the bias, or what was there, for j < count.
template <int kTaps>
inline void Horizontal(const FlatPlanesArgs& a, const float* strip, const float* taps, const float* bias, bool first,
                       bool last, Index count, float* to) {
  constexpr Index kKept = kTaps == 0 ? 1 : kTaps;
  const Index stride = a.stride_w * kFlatLanes, step = a.step, taps_count = a.kernel_w;
  for (int part = 0; part < kFlatLanes; part += kLanes) {
    const Lanes start = Load<Lanes>(bias + part);
    const Lanes floor = Splat<kLanes>(a.relu && last ? 0.0f : -__builtin_inff());
    Lanes tap[kKept];
#pragma GCC unroll 8
    for (Index k = 0; k < kTaps; ++k) tap[k] = Load<Lanes>(taps + k * kFlatLanes + part);
    const float* from = strip + part;
    float* out = to + part;
    for (Index j = 0; j < count; ++j, from += stride, out += step) {
      Lanes sum = first ? start : Load<Lanes>(out);
      if constexpr (kTaps == 0) {
        for (Index k = 0; k < taps_count; ++k) {
          sum += Load<Lanes>(taps + k * kFlatLanes + part) * Load<Lanes>(from + k * kFlatLanes);
        }
      } else {
#pragma GCC unroll 8
        for (Index k = 0; k < kTaps; ++k) sum += tap[k] * Load<Lanes>(from + k * kFlatLanes);
      }
      Store(out, sum < floor ? floor : sum);
    }
  }
}

// Both at once for a stride of 1 and as many taps down as along: the last kTaps columns of v stay in registers, and no
// load follows a store to its neighbourhood.
template <int kTaps>
inline void Square(const FlatPlanesArgs& a, const float* const* rows, const float* vertical, const float* vertical_bias,
                   const float* horizontal, const float* bias, bool first, bool last, float* to) {
  const Index width = a.width, out_width = a.out_width, step = a.step, pad = a.pad_w;
  for (int part = 0; part < kFlatLanes; part += kLanes) {
    Lanes down[kTaps], along[kTaps], v[kTaps] = {};
    const float* row[kTaps];
#pragma GCC unroll 8
    for (int k = 0; k < kTaps; ++k) {
      down[k] = Load<Lanes>(vertical + k * kFlatLanes + part);
      along[k] = Load<Lanes>(horizontal + k * kFlatLanes + part);
      row[k] = rows[k] + part;
    }
    const Lanes start = Load<Lanes>(vertical_bias + part), end = Load<Lanes>(bias + part);
    const Lanes floor = Splat<kLanes>(a.relu && last ? 0.0f : -__builtin_inff());
    const auto take = [&](Index w) __attribute__((always_inline)) {
      Lanes sum = start;
#pragma GCC unroll 8
      for (int k = 0; k < kTaps; ++k) sum += down[k] * Load<Lanes>(row[k] + w * kFlatLanes);
      return sum;
    };
    const auto shift = [&](Lanes next) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int k = 0; k + 1 < kTaps; ++k) v[k] = v[k + 1];
      v[kTaps - 1] = next;
    };
    float* out = to + part;
    const auto give = [&]() __attribute__((always_inline)) {
      Lanes sum = first ? end : Load<Lanes>(out);
#pragma GCC unroll 8
      for (int k = 0; k < kTaps; ++k) sum += along[k] * v[k];
      Store(out, sum < floor ? floor : sum);
      out += step;
    };
    // Output j follows column j - pad + kTaps - 1.
    for (Index w = 0; w < kTaps - 1 - pad; ++w) shift(take(w));
    Index j = 0;
    for (; j < out_width && j - pad + kTaps - 1 < 0; ++j) give();
    const Index whole = Smaller(out_width, width + pad - kTaps + 1);
    for (Index w = j - pad + kTaps - 1; j < whole; ++j, ++w) {
      shift(take(w));
      give();
    }
    for (; j < out_width; ++j) {
      shift(Lanes{});
      give();
    }
  }
}

using VerticalRun = void (*)(const float* const*, Index, const float*, const float*, Index, float*);
using HorizontalRun = void (*)(const FlatPlanesArgs&, const float*, const float*, const float*, bool, bool, Index,
                               float*);
using SquareRun = void (*)(const FlatPlanesArgs&, const float* const*, const float*, const float*, const float*,
                           const float*, bool, bool, float*);
constexpr SquareRun kSquare[] = {nullptr, nullptr, nullptr, Square<3>, nullptr, Square<5>, nullptr, Square<7>};
constexpr VerticalRun kVertical[] = {Vertical<0>, Vertical<1>, Vertical<2>, Vertical<3>,
                                     Vertical<4>, Vertical<5>, Vertical<6>, Vertical<7>};
constexpr HorizontalRun kHorizontal[] = {Horizontal<0>, Horizontal<1>, Horizontal<2>, Horizontal<3>,
                                         Horizontal<4>, Horizontal<5>, Horizontal<6>, Horizontal<7>};

inline void PutZeros(float* strip, Index columns) {
  if (columns > 0) __builtin_memset(strip, 0, static_cast<std::size_t>(columns * kFlatLanes * 4));
}

// One row of y, of one panel and one of its ranks. The rows of l are those of that panel.
void Row(const FlatPlanesArgs& a, const float* const* rows, Index p, Index r, float* to) {
  const Index panel = r * a.rank_panels + p;
  const float* vertical = a.vertical + panel * a.kernel_h * kFlatLanes;
  const float* vertical_bias = a.vertical_bias + panel * kFlatLanes;
  const float* horizontal = a.horizontal + panel * a.kernel_w * kFlatLanes;
  const float* bias = a.bias + p * kFlatLanes;
  const bool first = r == 0, last = r + 1 == a.rank;
  // Of an image that is narrower than the filters no column would be whole.
  if (a.kernel_h == a.kernel_w && a.kernel_w <= kMostTaps && kSquare[a.kernel_w] != nullptr && a.stride_w == 1 &&
      a.width + a.pad_w >= a.kernel_w) {
    return kSquare[a.kernel_w](a, rows, vertical, vertical_bias, horizontal, bias, first, last, to);
  }
  alignas(64) float strip[kStrip * kFlatLanes];
  const Index most = (kStrip - a.kernel_w) / a.stride_w + 1;  // outputs of a strip
  for (Index j = 0; j < a.out_width; j += most) {
    const Index count = Smaller(most, a.out_width - j), left = j * a.stride_w - a.pad_w;
    const Index columns = (count - 1) * a.stride_w + a.kernel_w;
    const Index begin = Smaller(Larger(-left, 0), columns);
    const Index end = Larger(Smaller(a.width - left, columns), begin);
    PutZeros(strip, begin);
    PutZeros(strip + end * kFlatLanes, columns - end);
    const float* pieces[kFlatMaxKernel];
    for (Index k = 0; k < a.kernel_h; ++k) pieces[k] = rows[k] + (left + begin) * kFlatLanes;
    kVertical[a.kernel_h <= kMostTaps ? a.kernel_h : 0](pieces, a.kernel_h, vertical, vertical_bias, end - begin,
                                                        strip + begin * kFlatLanes);
    kHorizontal[a.kernel_w <= kMostTaps ? a.kernel_w : 0](a, strip, horizontal, bias, first, last, count,
                                                          to + j * a.step);
  }
}

// Row after row of one panel: those of l that two rows of y share are still in the first cache level.
void Planes(const FlatPlanesArgs& args) noexcept {
  const FlatPlanesArgs a = args;
  for (Index p = 0; p < a.panels; ++p) {
    for (Index i = 0; i < a.count; ++i) {
      for (Index r = 0; r < a.rank; ++r) {
        const float* rows[kFlatMaxKernel];
        for (Index k = 0; k < a.kernel_h; ++k) {
          const float* row = a.rows[i * a.kernel_h + k];
          rows[k] = row == nullptr ? a.zeros : row + (r * a.panels + p) * a.panel_step;
        }
        Row(a, rows, p, r, a.to + i * a.row_step + p * kFlatLanes);
      }
    }
  }
}

}  // namespace
}  // namespace tersetorch
