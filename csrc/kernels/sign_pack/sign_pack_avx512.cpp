#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/sign_pack/sign_pack.h"

namespace tersetorch {
namespace {

// Which of 16 numbers are less than 0, or NaN, of those that `within` marks; the others are not read.
__mmask16 SignsOf(const void* x, FloatDtype stored_as, Index i, __mmask16 within) {
  __m512 floats;
  if (stored_as == FloatDtype::kFloat32) {
    floats = _mm512_maskz_loadu_ps(within, static_cast<const char*>(x) + 4 * i);
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16(within, static_cast<const char*>(x) + 2 * i);
    floats = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  return _mm512_mask_cmp_ps_mask(within, floats, _mm512_setzero_ps(), _CMP_NGE_UQ);
}

void Pack(const SignPackArgs& a, Index word_begin, Index word_end) noexcept {
  const Index words = SignWords(a.columns);
  if (word_begin >= word_end) return;
  Index row = word_begin / words * a.columns, word = word_begin % words;
  for (Index i = word_begin; i < word_end; ++i) {
    const Index first = word * kSignBits, begin = row + first;
    const Index count = a.columns - first < kSignBits ? a.columns - first : kSignBits;
    const std::uint64_t within = ~std::uint64_t{0} >> (kSignBits - count);
    std::uint64_t bits = 0;
#pragma GCC unroll 4
    for (int c = 0; c < kSignBits; c += 16) {
      bits |= std::uint64_t{SignsOf(a.x, a.stored_as, begin + c, static_cast<__mmask16>(within >> c))} << c;
    }
    Store(reinterpret_cast<char*>(a.bits) + 8 * i, bits);
    if (++word < words) continue;
    word = 0;
    row += a.columns;
  }
}

// `count` pixels from p on, at most 16 * kVectors; channels of half a word at a time.
template <int kVectors>
void PackPixels(const SignPackPlanesArgs& a, Index p, Index count) {
  const Index halves = 2 * SignWords(a.channels);
  __mmask16 within[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const Index left = count - 16 * v;
    within[v] = static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
  }
  for (Index h = 0; h < a.groups * halves; ++h) {
    const Index first = h % halves * 32, left = a.channels - first, plane = h / halves * a.channels + first;
    __m512i signs[kVectors] = {}, bit = _mm512_set1_epi32(1);
    for (Index c = 0; c < left && c < 32; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const __mmask16 ones = SignsOf(a.x, a.stored_as, (plane + c) * a.pixels + p + 16 * v, within[v]);
        signs[v] = _mm512_mask_or_epi32(signs[v], ones, signs[v], bit);
      }
      bit = _mm512_slli_epi32(bit, 1);
    }
    std::uint32_t of_pixels[16 * kVectors];
    for (int v = 0; v < kVectors; ++v) Store(of_pixels + 16 * v, signs[v]);
    char* bits = reinterpret_cast<char*>(a.bits) + 4 * (p * a.groups * halves + h);
    for (Index n = 0; n < count; ++n) Store(bits + 4 * n * a.groups * halves, of_pixels[n]);
  }
}

void PackPlanes(const SignPackPlanesArgs& a, Index pixel_begin, Index pixel_end) noexcept {
  Index p = pixel_begin;
  for (; p + 64 <= pixel_end; p += 64) PackPixels<4>(a, p, 64);
  for (; p < pixel_end; p += 16) PackPixels<1>(a, p, pixel_end - p < 16 ? pixel_end - p : 16);
}

}  // namespace

const SignPackPlanesVariant kSignPackPlanesAvx512 = &PackPlanes;
const SignPackVariant kSignPackAvx512 = &Pack;

}  // namespace tersetorch
