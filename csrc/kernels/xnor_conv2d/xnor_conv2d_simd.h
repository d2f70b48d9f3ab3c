// What the vector levels of xnor_conv2d share: the walk over tiles, rectangles of outputs and their pixels. A level
// counts the bits that differ for a few pixels and the filters of a tile at a time.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/xnor_conv2d/xnor_conv2d.h"

namespace tersetorch {
namespace {

constexpr Index kWordBytes = 8;
constexpr Index kTileWordBytes = kWordBytes * kXnorFilters;  // a word of each of a tile's filters

// The filters of a tile: those of the output from `first` on, `count` of them.
struct XnorTile {
  XnorTile(const XnorConv2dArgs& a, Index tile) {
    const Index of_group = XnorConvTiles(a.filters, 1), begin = tile % of_group * kXnorFilters;
    group = tile / of_group;
    first = group * a.filters + begin;
    count = a.filters - begin < kXnorFilters ? a.filters - begin : kXnorFilters;
    weight = reinterpret_cast<const char*>(a.weight) + tile * a.kernel_h * a.kernel_w * a.words * kTileWordBytes;
    whole = XnorWholeTiles(a);
    outputs = a.groups * a.filters;
  }
  Index group, first, count;
  const char* weight;
  bool whole;
  Index outputs;  // of a pixel
};

// The taps that a rectangle of outputs sees: rows of runs of words that follow each other in x and in the weight.
struct XnorTaps {
  XnorTaps(const XnorConv2dArgs& a, const XnorTile& tile, const XnorSpan& rows, const XnorSpan& columns)
      : row_begin(rows.tap_begin), row_end(rows.tap_end), begin(columns.tap_begin), end(columns.tap_end) {
    const Index pixel = a.pixel_words * kWordBytes, of_tap = a.words * kTileWordBytes;
    this->rows = row_end - row_begin;
    runs = end - begin;
    words = a.words;
    x_row = a.dilation_h * a.width * pixel;
    x_run = a.dilation_w * pixel;
    weight_row = a.kernel_w * of_tap;
    weight_run = of_tap;
    weight = tile.weight + row_begin * weight_row + begin * of_tap;
    if (a.dilation_w == 1 && a.words == a.pixel_words) {
      words *= runs;
      runs = runs < 1 ? runs : 1;
    }
  }
  bool Has(Index kh, Index kw) const { return kh >= row_begin && kh < row_end && kw >= begin && kw < end; }
  Index row_begin, row_end, begin, end;
  Index rows, runs, words;
  Index x_row, x_run, weight_row, weight_run;  // bytes from one to the next
  const char* weight;
};

// The pixels of a rectangle, row after row.
struct XnorPixels {
  XnorPixels(const XnorConv2dArgs& a, const XnorTaps& taps, Index group, Index image, Index row_begin, Index row_end,
             const XnorSpan& columns)
      : left((row_end - row_begin) * (columns.end - columns.begin)), width(columns.end - columns.begin) {
    const Index pixel = a.pixel_words * kWordBytes;
    const Index row = image * a.height + row_begin * a.stride_h + taps.row_begin * a.dilation_h - a.pad_h;
    const Index column = columns.begin * a.stride_w + taps.begin * a.dilation_w - a.pad_w;
    step = a.stride_w * pixel;
    next_row = (a.stride_h * a.width - width * a.stride_w) * pixel;
    x = (row * a.width + column) * pixel + group * a.words * kWordBytes;
    y = (image * a.out_height + row_begin) * a.out_width + columns.begin;
    next_y = a.out_width - width;
  }
  void Next() {
    x += step;
    ++y;
    --left;
    if (++column < width) return;
    column = 0;
    x += next_row;
    y += next_y;
  }
  Index left, width, column = 0;
  Index x, step, next_row;  // in bytes, of the first tap
  Index y, next_y;          // in pixels
};

// Channels [64 i, 64 i + 64) of a group that are all -1, or 0 for +1.
inline std::uint64_t OutsideWord(const XnorConv2dArgs& a, Index i) {
  const Index rest = a.channels - 64 * i;
  if (a.outside > 0) return 0;
  return rest >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << rest) - 1;
}

// The bits of a tile's filters for an output pixel.
inline void StoreBits(const XnorConv2dArgs& a, const XnorTile& tile, Index pixel, std::uint32_t bits) {
  char* y = reinterpret_cast<char*>(a.bits) + pixel * ((tile.outputs + 63) / 64) * kWordBytes;
  if (tile.whole) return Store(y + tile.first / 8, bits);
  const Index shift = tile.first % 64;
  const auto add = [](char* word, std::uint64_t these) { Store(word, LoadAt<std::uint64_t>(word, 0, 0) | these); };
  y += tile.first / 64 * kWordBytes;
  add(y, std::uint64_t{bits} << shift);
  if (shift > 32 && bits >> (64 - shift) != 0) add(y + kWordBytes, bits >> (64 - shift));
}

template <typename Level, int kPixels>
void ConvolvePixels(const XnorConv2dArgs& a, const XnorTile& tile, const XnorTaps& taps,
                    const typename Level::Filters& filters, XnorPixels& pixels) {
  while (pixels.left >= kPixels) {
    const char* x[kPixels];
    Index y[kPixels];
    for (int m = 0; m < kPixels; ++m) {
      x[m] = reinterpret_cast<const char*>(a.x) + (taps.rows * taps.runs == 0 ? 0 : pixels.x);
      y[m] = pixels.y;
      pixels.Next();
    }
    Level::Multiply(a, tile, taps, filters, x, y);
  }
  if constexpr (kPixels > 1) ConvolvePixels<Level, kPixels / 2>(a, tile, taps, filters, pixels);
}

// Calls convolve(rows, columns, begin, end) for each rectangle of outputs: rows [begin, end) of those of a span.
template <typename Convolve>
void ForRectangles(const XnorConv2dArgs& a, const XnorConvPart& p, const Convolve& convolve) {
  for (Index r = 0; r < a.row_span_count; ++r) {
    const XnorSpan& rows = a.row_spans[r];
    const Index begin = rows.begin < p.row_begin ? p.row_begin : rows.begin;
    const Index end = rows.end < p.row_end ? rows.end : p.row_end;
    if (begin >= end) continue;
    for (Index c = 0; c < a.column_span_count; ++c) convolve(rows, a.column_spans[c], begin, end);
  }
}

template <typename Level>
void ConvolveTiles(const XnorConv2dArgs& a, const XnorConvPart& p) noexcept {
  for (Index t = p.tile_begin; t < p.tile_end; ++t) {
    const XnorTile tile(a, t);
    ForRectangles(a, p, [&](const XnorSpan& rows, const XnorSpan& columns, Index begin, Index end) {
      const XnorTaps taps(a, tile, rows, columns);
      const typename Level::Filters filters(a, tile, taps);
      XnorPixels pixels(a, taps, tile.group, p.image, begin, end, columns);
      ConvolvePixels<Level, Level::kPixels>(a, tile, taps, filters, pixels);
    });
  }
}

}  // namespace
}  // namespace tersetorch
