// Images as planes of words: the numbers of 2 or 4 neighbouring channels of one pixel in 4 bytes, so that a convolution
// reads a word as it reads a float.
//
// Math:   planes[w][i] = word of x[c][i] for the channels c of word w, of one image. Words do not cross the borders of
//         groups: with G = channels / groups and n = 2 or 4, word g * ceil(G / n) + j holds the channels from
//         g * G + n * j on, those past the group's last being 0.
//         Pairs: bfloat16 of two channels, nearest, ties to even.
//         Quads: q of four channels plus an offset, modulo 2^8, where q = round(x * inverse), ties to even, as
//         kernels/panels describes it for the image as one sample. With inverse 0, q is 0.
// Layout: x [channels, pixels], or [pixels, channels] with the channels last, float32 or bfloat16; planes
//         [words, pixels], the first channel of a word lowest.
// Limits: a pass over memory: it reads x once and writes a half or a quarter of its float32 size.
//
// Single-threaded; the caller may split the pixels. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

struct WordPlanesArgs {
  const void* x;
  FloatDtype stored_as;
  bool channels_last;
  std::int64_t channels, groups, pixels;
  std::uint32_t* planes;
  float inverse;        // for quads only, as the next
  std::int32_t offset;  // 0 or 128
};

// Pixels [begin, end) of every plane.
TERSETORCH_API void PairPlanes(const WordPlanesArgs& args, std::int64_t begin, std::int64_t end) noexcept;
TERSETORCH_API void QuadPlanes(const WordPlanesArgs& args, std::int64_t begin, std::int64_t end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
struct WordPlanesFunctions {
  void (*pairs)(const WordPlanesArgs&, std::int64_t, std::int64_t) noexcept;
  void (*quads)(const WordPlanesArgs&, std::int64_t, std::int64_t) noexcept;
};
extern const WordPlanesFunctions kWordPlanesScalar;
extern const WordPlanesFunctions kWordPlanesAvx2;
extern const WordPlanesFunctions kWordPlanesAvx512;

}  // namespace tersetorch
