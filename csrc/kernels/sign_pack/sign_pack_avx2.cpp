#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/sign_pack/sign_pack.h"

namespace tersetorch {
namespace {

std::uint64_t SignsOf(Float8 x) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_GE_OQ)));
}

void Pack(const SignPackArgs& a, Index word_begin, Index word_end) noexcept {
  const Index words = SignWords(a.columns);
  for (Index i = word_begin; i < word_end; ++i) {
    const Index first = i % words * kSignBits, begin = i / words * a.columns + first;
    const Index count = a.columns - first < kSignBits ? a.columns - first : kSignBits;
    std::uint64_t bits = 0;
    Index c = 0;
    for (; c + 8 <= count; c += 8) bits |= SignsOf(LoadFloats(a.x, a.stored_as, begin + c)) << c;
    for (; c < count; ++c) bits |= std::uint64_t{LoadFloat(a.x, a.stored_as, begin + c) >= 0} << c;
    Store(reinterpret_cast<char*>(a.bits) + 8 * i, bits);
  }
}

}  // namespace

const SignPackVariant kSignPackAvx2 = &Pack;

}  // namespace tersetorch
