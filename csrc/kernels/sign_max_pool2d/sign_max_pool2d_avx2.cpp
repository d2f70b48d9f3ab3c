#include <immintrin.h>

#include <cstdint>

#include "kernels/sign_max_pool2d/sign_max_pool2d.h"
#include "kernels/sign_max_pool2d/sign_max_pool2d_simd.h"

namespace tersetorch {
namespace {

struct Avx2 {
  static constexpr Index kWords = 4;

  static __m256i Ones() { return _mm256_set1_epi64x(-1); }
  static __m256i Within(Index count) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static __m256i Load(const char* words, Index count) {
    if (count == kWords) return LoadAt<__m256i>(words, 0, 0);
    return _mm256_maskload_epi64(reinterpret_cast<const long long*>(words), Within(count));
  }
  static void Store(char* words, __m256i signs, Index count) {
    _mm256_maskstore_epi64(reinterpret_cast<long long*>(words), Within(count), signs);
  }
};

}  // namespace

const SignMaxPool2dVariant kSignMaxPool2dAvx2 = &PoolRows<Avx2>;

}  // namespace tersetorch
