#include <immintrin.h>

#include <cstdint>

#include "kernels/sign_max_pool2d/sign_max_pool2d.h"
#include "kernels/sign_max_pool2d/sign_max_pool2d_simd.h"

namespace tersetorch {
namespace {

struct Avx512 {
  static constexpr Index kWords = 8;

  static __m512i Ones() { return _mm512_set1_epi64(-1); }
  static __mmask8 Within(Index count) { return static_cast<__mmask8>((1 << count) - 1); }
  static __m512i Load(const char* words, Index count) { return _mm512_maskz_loadu_epi64(Within(count), words); }
  static void Store(char* words, __m512i signs, Index count) { _mm512_mask_storeu_epi64(words, Within(count), signs); }
};

}  // namespace

const SignMaxPool2dVariant kSignMaxPool2dAvx512 = &PoolRows<Avx512>;

}  // namespace tersetorch
