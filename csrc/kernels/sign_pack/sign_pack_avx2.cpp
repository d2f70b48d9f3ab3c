#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/sign_pack/sign_pack.h"

namespace tersetorch {
namespace {

// Less than 0, or NaN.
__m256 IsNegative(Float8 x) { return _mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_NGE_UQ); }
bool IsNegative(float x) { return !(x >= 0); }

std::uint64_t SignsOf(Float8 x) { return static_cast<unsigned>(_mm256_movemask_ps(IsNegative(x))); }

void Pack(const SignPackArgs& a, Index word_begin, Index word_end) noexcept {
  const Index words = SignWords(a.columns);
  if (word_begin >= word_end) return;
  Index row = word_begin / words * a.columns, word = word_begin % words;
  for (Index i = word_begin; i < word_end; ++i) {
    const Index first = word * kSignBits, begin = row + first;
    const Index count = a.columns - first < kSignBits ? a.columns - first : kSignBits;
    std::uint64_t bits = 0;
    Index c = 0;
    for (; c + 8 <= count; c += 8) bits |= SignsOf(LoadFloats(a.x, a.stored_as, begin + c)) << c;
    for (; c < count; ++c) bits |= std::uint64_t{IsNegative(LoadFloat(a.x, a.stored_as, begin + c))} << c;
    Store(reinterpret_cast<char*>(a.bits) + 8 * i, bits);
    if (++word < words) continue;
    word = 0;
    row += a.columns;
  }
}

// Vectors of pixels from p on; channels of half a word at a time. kLanes is 8, or 1 for a single pixel.
template <int kLanes, int kVectors>
void PackPixels(const SignPackPlanesArgs& a, Index p) {
  const Index halves = 2 * SignWords(a.channels);
  for (Index h = 0; h < a.groups * halves; ++h) {
    const Index first = h % halves * 32, left = a.channels - first, plane = h / halves * a.channels + first;
    std::uint32_t of_pixels[8 * kVectors] = {};
    __m256i signs[kVectors] = {}, bit = _mm256_set1_epi32(1);
    for (Index c = 0; c < left && c < 32; ++c) {
      const Index at = (plane + c) * a.pixels + p;
      if constexpr (kLanes == 1) {
        of_pixels[0] |= std::uint32_t{IsNegative(LoadFloat(a.x, a.stored_as, at))} << c;
        continue;
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const __m256i ones = _mm256_castps_si256(IsNegative(LoadFloats(a.x, a.stored_as, at + 8 * v)));
        signs[v] = _mm256_or_si256(signs[v], _mm256_and_si256(ones, bit));
      }
      bit = _mm256_slli_epi32(bit, 1);
    }
    if constexpr (kLanes > 1) {
      for (int v = 0; v < kVectors; ++v) Store(of_pixels + 8 * v, signs[v]);
    }
    char* bits = reinterpret_cast<char*>(a.bits) + 4 * (p * a.groups * halves + h);
    for (Index n = 0; n < kLanes * kVectors; ++n) Store(bits + 4 * n * a.groups * halves, of_pixels[n]);
  }
}

void PackPlanes(const SignPackPlanesArgs& a, Index pixel_begin, Index pixel_end) noexcept {
  Index p = pixel_begin;
  for (; p + 32 <= pixel_end; p += 32) PackPixels<8, 4>(a, p);
  for (; p + 8 <= pixel_end; p += 8) PackPixels<8, 1>(a, p);
  if (p < pixel_end && pixel_end - pixel_begin >= 8) return PackPixels<8, 1>(a, pixel_end - 8);  // some of them again
  for (; p < pixel_end; ++p) PackPixels<1, 1>(a, p);
}

}  // namespace

const SignPackPlanesVariant kSignPackPlanesAvx2 = &PackPlanes;
const SignPackVariant kSignPackAvx2 = &Pack;

}  // namespace tersetorch
