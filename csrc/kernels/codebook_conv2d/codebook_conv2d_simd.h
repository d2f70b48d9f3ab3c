// The algorithm of every vector level, written once over pieces of kLanes words. Everything here is local to the
// including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/codebook_conv2d/codebook_conv2d.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

#ifdef __AVX512F__
constexpr Index kLanes = 16;
#else
constexpr Index kLanes = 8;
#endif

inline Index Smaller(Index a, Index b) { return a < b ? a : b; }

// ---- borders

// Whether a tap reads rows or columns that leave `phase` when divided by the stride.
inline bool TapReads(Index phase, Index kernel, Index stride, Index dilation) {
  for (Index k = 0; k < Smaller(kernel, stride); ++k) {
    if (k * dilation % stride == phase) return true;
  }
  return false;
}

// Eight numbers from x[i] on, `step` apart.
inline Float8 LoadApart(const CodebookPadArgs& a, Index i, Index step) {
  if (step == 1) return LoadFloats(a.x, a.stored_as, i);
  if (step == 2 && i + 16 <= a.channels * a.height * a.width) {
    const Float8 low = LoadFloats(a.x, a.stored_as, i), high = LoadFloats(a.x, a.stored_as, i + 8);
    return __builtin_shuffle(low, high, Int8{0, 2, 4, 6, 8, 10, 12, 14});
  }
  Float8 x;
  for (Index l = 0; l < 8; ++l) x[l] = LoadFloat(a.x, a.stored_as, i + l * step);
  return x;
}

struct Numbers {
  explicit Numbers(const CodebookPadArgs& a) : inverse(Splat<8>(a.inverse)), none(a.inverse == 0), integer(a.integer) {}

  void Put(void* to, Index i, Float8 x) const {
    if (!integer) return Store(static_cast<float*>(to) + i, x);
    const __m256i q = none ? _mm256_setzero_si256() : _mm256_cvtps_epi32((__m256)(x * inverse));
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(static_cast<char*>(to) + i), _mm_packs_epi16(halves, halves));
  }
  void PutOne(void* to, Index i, float x) const {
    if (!integer) return Store(static_cast<float*>(to) + i, x);
    const int q = none ? 0 : _mm_cvtss_si32(_mm_set_ss(x * inverse[0]));
    static_cast<char*>(to)[i] = static_cast<char>(q);
  }
  void PutZeros(void* to, Index i, Index count) const {
    const Index size = integer ? 1 : 4;
    __builtin_memset(static_cast<char*>(to) + i * size, 0, static_cast<std::size_t>(count > 0 ? count * size : 0));
  }

  Float8 inverse;
  bool none, integer;
};

void Pad(const CodebookPadArgs& args, Index channel_begin, Index channel_end) noexcept {
  const CodebookPadArgs a = args;
  const CodebookWindowShape& s = a.shape;
  const Numbers numbers(a);
  const Index columns = CodebookPhaseColumns(a.width, a.pad_w, s.stride_w), rows = a.height + 2 * a.pad_h;
  for (Index c = channel_begin; c < channel_end; ++c) {
    for (Index h = 0; h < rows; ++h) {
      if (s.stride_h > 1 && !TapReads(h % s.stride_h, s.kernel_h, s.stride_h, s.dilation_h)) continue;
      for (Index phase = 0; phase < s.stride_w; ++phase) {
        if (s.stride_w > 1 && !TapReads(phase, s.kernel_w, s.stride_w, s.dilation_w)) continue;
        const Index to = ((c * rows + h) * s.stride_w + phase) * columns;
        if (h < a.pad_h || h >= a.pad_h + a.height) {
          numbers.PutZeros(a.padded, to, columns);
          continue;
        }
        // Column i of the phase is column i * stride_w + left of the image.
        const Index left = phase - a.pad_w, row = (c * a.height + h - a.pad_h) * a.width + left;
        const Index begin = Smaller(left < 0 ? (-left + s.stride_w - 1) / s.stride_w : 0, columns);
        Index end = left < a.width ? (a.width - left + s.stride_w - 1) / s.stride_w : 0;
        end = end < begin ? begin : Smaller(end, columns);
        numbers.PutZeros(a.padded, to, begin);
        Index i = begin;
        for (; i + 8 <= end; i += 8) numbers.Put(a.padded, to + i, LoadApart(a, row + i * s.stride_w, s.stride_w));
        for (; i < end; ++i) numbers.PutOne(a.padded, to + i, LoadFloat(a.x, a.stored_as, row + i * s.stride_w));
        numbers.PutZeros(a.padded, to + end, columns - end);
      }
    }
  }
}

// ---- windows

// kLanes words, and a part of them: the others are 0, or left alone.
#ifdef __AVX512F__
using Words = Vector<16>;
typedef std::uint32_t WordBits __attribute__((vector_size(64)));
struct Part {
  Part() = default;
  explicit Part(Index count) : mask(static_cast<__mmask16>((1u << count) - 1)) {}
  Words Load(const float* p) const { return (Words)_mm512_maskz_loadu_ps(mask, p); }
  void Store(float* p, Words v) const { _mm512_mask_storeu_ps(p, mask, (__m512)v); }

  __mmask16 mask;
};
#else
using Words = Float8;
using WordBits = Bits8;
struct Part {
  Part() = default;
  explicit Part(Index count) : mask(Int8{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<std::int32_t>(count)) {}
  Words Load(const float* p) const { return (Words)_mm256_maskload_ps(p, (__m256i)mask); }
  void Store(float* p, Words v) const { _mm256_maskstore_ps(p, (__m256i)mask, (__m256)v); }

  Int8 mask;
};
#endif

// As ToBFloat16 and back.
inline Words RoundedToBFloat16(Words v) {
  const auto bits = (WordBits)v;
  const WordBits rounded = bits + 0x7fff + (bits >> 16 & 1);
  return (Words)((v != v ? bits | 0x400000 : rounded) & 0xffff0000);
}

// Outputs of a panel that lie side by side, at most kLanes: their first number at a window's first tap, and their
// lanes.
struct Piece {
  Index from, lane, count;
  Part there;
};

// The pieces of a panel, and one of nothing for what is left of its width. What a whole piece writes past its lanes the
// next one writes again; the others would write past the panel's width.
struct Pieces {
  explicit Pieces(const CodebookWindowsArgs& a) {
    for (Index lane = 0; lane < a.count;) {
      const Index output = a.first + lane, row = output / a.out_width, column = output % a.out_width;
      const Index down = row % a.out_height * a.shape.stride_h;
      const Index count = Smaller(Smaller(a.out_width - column, a.count - lane), kLanes);
      Add(a, row / a.out_height * a.image_step + down * a.row_step + column, lane, count);
      lane += count;
    }
    for (Index lane = a.count; lane < a.width; lane += kLanes) Add(a, 0, lane, 0);
  }

  Index size = 0, whole = 0;
  Piece pieces[kCodebookMaxWidth + kCodebookMaxWidth / kLanes];

 private:
  void Add(const CodebookWindowsArgs& a, Index from, Index lane, Index count) {
    pieces[size++] = {from, lane, count, Part(count)};
    if (lane + kLanes <= a.width) whole = size;
  }
};

// Calls words(piece) for every piece and writes what it gives into a row of a panel.
template <typename Get>
inline __attribute__((always_inline)) void PutRow(const CodebookWindowsArgs& a, const Pieces& pieces, float* row,
                                                  const Get& words) {
  for (Index i = 0; i < pieces.whole; ++i) Store(row + pieces.pieces[i].lane, words(pieces.pieces[i]));
  for (Index i = pieces.whole; i < pieces.size; ++i) {
    const Piece& piece = pieces.pieces[i];
    Part(a.width - piece.lane).Store(row + piece.lane, words(piece));
  }
}

// Where one column of W after the other finds its numbers, from an output's first tap.
class Columns {
 public:
  Columns(const CodebookWindowsArgs& a, Index column)
      : kernel_h_(a.shape.kernel_h),
        kernel_w_(a.shape.kernel_w),
        stride_w_(a.shape.stride_w),
        dilation_w_(a.shape.dilation_w),
        channel_step_(a.channel_step),
        tap_row_step_(a.shape.dilation_h * a.row_step),
        phase_step_(a.phase_step),
        c_(column / (kernel_h_ * kernel_w_)),
        kh_(column / kernel_w_ % kernel_h_),
        kw_(column % kernel_w_) {
    SetRow();
  }

  Index Next() {
    const Index right = kw_ * dilation_w_;
    const Index at = stride_w_ == 1 ? row_ + right : row_ + right % stride_w_ * phase_step_ + right / stride_w_;
    if (++kw_ == kernel_w_) {
      kw_ = 0;
      if (++kh_ == kernel_h_) kh_ = 0, ++c_;
      SetRow();
    }
    return at;
  }

 private:
  void SetRow() { row_ = c_ * channel_step_ + kh_ * tap_row_step_; }

  Index kernel_h_, kernel_w_, stride_w_, dilation_w_, channel_step_, tap_row_step_, phase_step_;
  Index c_, kh_, kw_, row_ = 0;
};

// The `count` columns that a chunk has; what is left over of it nobody reads.
template <bool kRounded>
void PackFloats(const CodebookWindowsArgs& a, const Pieces& pieces, const Index* offsets, Index count, float* panel) {
  for (Index c = 0; c < count; ++c, panel += a.width) {
    const float* from = static_cast<const float*>(a.images) + offsets[c];
    PutRow(a, pieces, panel, [&](const Piece& piece) {
      const Words words = piece.there.Load(from + piece.from);
      return kRounded ? RoundedToBFloat16(words) : words;
    });
  }
}

// kLanes words of the bytes of four rows, the first lowest.
inline __attribute__((always_inline)) Words Interleaved(const __m128i (&rows)[4]) {
#ifdef __AVX512F__
  __m512i bytes = _mm512_castsi128_si512(rows[0]);
  bytes = _mm512_mask_broadcast_i32x4(bytes, 0x00f0, rows[1]);
  bytes = _mm512_mask_broadcast_i32x4(bytes, 0x0f00, rows[2]);
  bytes = _mm512_mask_broadcast_i32x4(bytes, 0xf000, rows[3]);
  // Byte j of word l is byte 16 j + l.
  WordBits order;
  for (int l = 0; l < 16; ++l) order[l] = 0x30201000u + 0x01010101u * static_cast<std::uint32_t>(l);
  return (Words)_mm512_permutexvar_epi8((__m512i)order, bytes);
#else
  const __m128i low = _mm_unpacklo_epi8(rows[0], rows[1]), high = _mm_unpacklo_epi8(rows[2], rows[3]);
  return (Words)_mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
#endif
}

// Sums of the four bytes of words, added up.
#ifdef __AVX512F__
using ByteSums = __m512i;
inline ByteSums AddBytes(ByteSums sums, WordBits words) {
  return _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), (__m512i)words);
}
#else
using ByteSums = __m256i;
inline ByteSums AddBytes(ByteSums sums, WordBits words) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), (__m256i)words);
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

// Words of a chunk. Not all of them have columns for all bytes unless it is whole.
template <bool kWhole>
void PackBytes(const CodebookWindowsArgs& a, const Pieces& pieces, const Index* offsets, Index count, float* panel,
               std::int32_t* sums) {
  const auto* images = static_cast<const char*>(a.images);
  const Index of_byte = 8 / a.bits;
  for (Index word = 0; word < 16 * of_byte; ++word) {
    const char* from[4];
    for (Index j = 0; j < 4; ++j) {
      const Index c = 16 * (j * of_byte + word / 16) + word % 16;
      from[j] = kWhole || c < count ? images + offsets[c] : nullptr;
    }
    PutRow(a, pieces, panel + word * a.width, [&](const Piece& piece) {
      __m128i rows[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        rows[j] = kWhole || from[j] != nullptr ? LoadAt<__m128i>(from[j], piece.from, 1) : _mm_setzero_si128();
      }
      const Words words = Interleaved(rows);
      return piece.count == 0 ? Words{} : words;
    });
  }
  for (Index n = 0; n < a.width; n += kLanes) {
    ByteSums total{};
    for (Index word = 0; word < 16 * of_byte; ++word) {
      total = AddBytes(total, LoadAt<WordBits>(panel, word * a.width + n, 4));
    }
    alignas(64) std::int32_t added[kLanes];
    Store(added, total);
    for (Index l = 0; l < kLanes; ++l) sums[n + l] += added[l];
  }
}

// Columns of a chunk for few outputs, number after number.
void PackFew(const CodebookWindowsArgs& a, const Index (&outputs)[kCodebookFewSamples], const Index* offsets,
             Index count, char* panel, std::int32_t* sums) {
  const bool integer = a.mode == CodebookMode::kInt8;
  const Index of_byte = integer ? 8 / a.bits : 1;
  __builtin_memset(panel, 0, static_cast<std::size_t>(CodebookVectors(a.bits, a.mode) * a.width * 64));
  for (Index c = 0; c < count; ++c) {
    const Index offset = offsets[c], vector = integer ? c / 16 % of_byte : c / 16;
    for (Index n = 0; n < a.count; ++n) {
      const Index word = (vector * a.width + n) * 16 + c % 16, from = offset + outputs[n];
      if (integer) {
        const char q = static_cast<const char*>(a.images)[from];
        panel[4 * word + c / 16 / of_byte] = q;
        sums[n] += static_cast<signed char>(q);
        continue;
      }
      const float x = LoadAt<float>(a.images, from, 4);
      StoreFloat(panel, FloatDtype::kFloat32, word,
                 a.mode == CodebookMode::kExact ? x : FromBFloat16(ToBFloat16(Splat<8>(x)))[0]);
    }
  }
}

void PackWindows(const CodebookWindowsArgs& args, Index chunk_begin, Index chunk_end) noexcept {
  const CodebookWindowsArgs a = args;
  const Index columns = a.channels * a.shape.kernel_h * a.shape.kernel_w;
  const Index of_block = CodeChunks(a.column_block, a.bits), of_chunk = 512 / a.bits;
  const Index chunk_words = CodebookVectors(a.bits, a.mode) * 16 * a.width;
  const Pieces pieces(a);
  std::int32_t sums[kCodebookMaxWidth] = {};
  Index few[kCodebookFewSamples] = {};
  if (a.width <= kCodebookFewSamples) {
    for (Index i = 0; i < pieces.size; ++i) {
      const Piece& piece = pieces.pieces[i];
      for (Index n = 0; n < piece.count; ++n) few[piece.lane + n] = piece.from + n;
    }
  }
  for (Index i = chunk_begin; i < chunk_end; ++i) {
    const Index in_block = i % of_block * of_chunk, begin = i / of_block * a.column_block + in_block;
    const Index count = Smaller(Smaller(of_chunk, a.column_block - in_block), columns - begin);
    float* panel = static_cast<float*>(a.panel) + i * chunk_words;
    Index offsets[256];
    Columns next(a, begin);
    for (Index c = 0; c < count; ++c) offsets[c] = next.Next();
    if (a.width <= kCodebookFewSamples) {
      PackFew(a, few, offsets, count, reinterpret_cast<char*>(panel), sums);
    } else if (a.mode == CodebookMode::kInt8) {
      (count == of_chunk ? PackBytes<true> : PackBytes<false>)(a, pieces, offsets, count, panel, sums);
    } else {
      (a.mode == CodebookMode::kBFloat16 ? PackFloats<true> : PackFloats<false>)(a, pieces, offsets, count, panel);
    }
  }
  for (Index n = 0; a.mode == CodebookMode::kInt8 && n < a.count; ++n) {
    __atomic_fetch_add(a.sums + n, sums[n], __ATOMIC_RELAXED);
  }
}

}  // namespace
}  // namespace tersetorch
