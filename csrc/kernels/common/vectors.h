// What the vector levels share: vectors of `kLanes` floats, bfloat16, transposes. Written once for every level: the
// compiler turns `a + b * c` into one fused instruction of the level that the including file is built for. Everything
// here is local to that file, which may use a part of it.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/common/float_dtype.h"

namespace tersetorch {
namespace {

using Index = std::int64_t;

// kLanes floats that one register holds; a single lane is a plain float.
template <int kLanes>
struct VectorOf {
  typedef float Type __attribute__((vector_size(4 * kLanes)));
};
template <>
struct VectorOf<1> {
  using Type = float;
};
template <int kLanes>
using Vector = typename VectorOf<kLanes>::Type;

using Float8 = Vector<8>;
typedef std::int32_t Int8 __attribute__((vector_size(32)));
typedef std::uint32_t Bits8 __attribute__((vector_size(32)));
typedef std::uint16_t Halves8 __attribute__((vector_size(16)));
typedef std::uint16_t Halves16 __attribute__((vector_size(32)));
typedef std::uint8_t Bytes8 __attribute__((vector_size(8)));
typedef std::uint8_t Bytes32 __attribute__((vector_size(32)));

// Element i and what follows it, of an array that may be unaligned.
template <typename T>
T LoadAt(const void* array, Index i, Index element_size) {
  T value;
  __builtin_memcpy(&value, static_cast<const char*>(array) + i * element_size, sizeof value);
  return value;
}

template <typename T>
T Load(const float* p) {
  return LoadAt<T>(p, 0, 0);
}

template <typename T>
void Store(void* p, const T& value) {
  __builtin_memcpy(p, &value, sizeof value);
}

template <int kLanes>
Vector<kLanes> Splat(float value) {
  return value - Vector<kLanes>{};
}

// ---- bfloat16

inline Float8 FromBFloat16(Halves8 high) { return (Float8)(__builtin_convertvector(high, Bits8) << 16); }

// Nearest, ties to even; NaN stays NaN.
inline Halves8 ToBFloat16(Float8 value) {
  const Bits8 bits = (Bits8)value;
  const Bits8 rounded = bits + 0x7fff + (bits >> 16 & 1);
  return __builtin_convertvector((value != value ? bits | 0x400000 : rounded) >> 16, Halves8);
}

inline Float8 LoadFloats(const void* array, FloatDtype stored_as, Index i) {
  if (stored_as == FloatDtype::kFloat32) return LoadAt<Float8>(array, i, 4);
  return FromBFloat16(LoadAt<Halves8>(array, i, 2));
}

inline float LoadFloat(const void* array, FloatDtype stored_as, Index i) {
  if (stored_as == FloatDtype::kFloat32) return LoadAt<float>(array, i, 4);
  return __builtin_bit_cast(float, std::uint32_t{LoadAt<std::uint16_t>(array, i, 2)} << 16);
}

inline void StoreFloats(void* array, FloatDtype stored_as, Index i, Float8 value) {
  if (stored_as == FloatDtype::kFloat32) {
    Store(static_cast<char*>(array) + 4 * i, value);
  } else {
    Store(static_cast<char*>(array) + 2 * i, ToBFloat16(value));
  }
}

inline void StoreFloat(void* array, FloatDtype stored_as, Index i, float value) {
  if (stored_as == FloatDtype::kFloat32) {
    Store(static_cast<char*>(array) + 4 * i, value);
  } else {
    Store(static_cast<char*>(array) + 2 * i, static_cast<std::uint16_t>(ToBFloat16(Splat<8>(value))[0]));
  }
}

// ---- transposes

inline void Transpose(Float8 (&m)[8]) {
  Float8 pairs[8], quads[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = __builtin_shuffle(m[i], m[i + 1], Int8{0, 8, 1, 9, 4, 12, 5, 13});
    pairs[i + 1] = __builtin_shuffle(m[i], m[i + 1], Int8{2, 10, 3, 11, 6, 14, 7, 15});
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    quads[i] = __builtin_shuffle(pairs[i], pairs[i + 2], Int8{0, 1, 8, 9, 4, 5, 12, 13});
    quads[i + 1] = __builtin_shuffle(pairs[i], pairs[i + 2], Int8{2, 3, 10, 11, 6, 7, 14, 15});
    quads[i + 2] = __builtin_shuffle(pairs[i + 1], pairs[i + 3], Int8{0, 1, 8, 9, 4, 5, 12, 13});
    quads[i + 3] = __builtin_shuffle(pairs[i + 1], pairs[i + 3], Int8{2, 3, 10, 11, 6, 7, 14, 15});
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    m[i] = __builtin_shuffle(quads[i], quads[i + 4], Int8{0, 1, 2, 3, 8, 9, 10, 11});
    m[i + 4] = __builtin_shuffle(quads[i], quads[i + 4], Int8{4, 5, 6, 7, 12, 13, 14, 15});
  }
}

#ifdef __AVX512F__
inline void Transpose(Vector<16> (&m)[16]) {
  const auto ps = [](Vector<16> v) { return (__m512)v; };
  const auto pd = [](Vector<16> v) { return (__m512d)v; };
  Vector<16> pairs[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = (Vector<16>)_mm512_unpacklo_ps(ps(m[i]), ps(m[i + 1]));
    pairs[i + 1] = (Vector<16>)_mm512_unpackhi_ps(ps(m[i]), ps(m[i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    m[i] = (Vector<16>)_mm512_unpacklo_pd(pd(pairs[i]), pd(pairs[i + 2]));
    m[i + 1] = (Vector<16>)_mm512_unpackhi_pd(pd(pairs[i]), pd(pairs[i + 2]));
    m[i + 2] = (Vector<16>)_mm512_unpacklo_pd(pd(pairs[i + 1]), pd(pairs[i + 3]));
    m[i + 3] = (Vector<16>)_mm512_unpackhi_pd(pd(pairs[i + 1]), pd(pairs[i + 3]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pairs[i] = (Vector<16>)_mm512_shuffle_f32x4(ps(m[i]), ps(m[i + 4]), 0x88);
    pairs[i + 4] = (Vector<16>)_mm512_shuffle_f32x4(ps(m[i]), ps(m[i + 4]), 0xdd);
    pairs[i + 8] = (Vector<16>)_mm512_shuffle_f32x4(ps(m[i + 8]), ps(m[i + 12]), 0x88);
    pairs[i + 12] = (Vector<16>)_mm512_shuffle_f32x4(ps(m[i + 8]), ps(m[i + 12]), 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    m[i] = (Vector<16>)_mm512_shuffle_f32x4(ps(pairs[i]), ps(pairs[i + 8]), 0x88);
    m[i + 8] = (Vector<16>)_mm512_shuffle_f32x4(ps(pairs[i]), ps(pairs[i + 8]), 0xdd);
    m[i + 4] = (Vector<16>)_mm512_shuffle_f32x4(ps(pairs[i + 4]), ps(pairs[i + 12]), 0x88);
    m[i + 12] = (Vector<16>)_mm512_shuffle_f32x4(ps(pairs[i + 4]), ps(pairs[i + 12]), 0xdd);
  }
}
#endif

// Rows [i, i + 8) and samples [n, n + 8) of what StoreTransposed stores.
template <int kWidth>
void StoreBlock(const float* tile, Index i, Index n, Index samples, void* out, FloatDtype stored_as, Index stride,
                Index offset) {
  Float8 block[8];
  for (int j = 0; j < 8; ++j) block[j] = Load<Float8>(tile + (i + j) * kWidth + n);
  Transpose(block);
  for (Index j = 0; j < 8 && n + j < samples; ++j) {
    StoreFloats(out, stored_as, (n + j) * stride + offset + i, block[j]);
  }
}

// out[n][offset + i] = tile[i][n]: `count` rows of a tile [count][kWidth] into a row-major [samples][stride].
template <int kWidth>
void StoreTransposed(const float* tile, Index count, Index samples, void* out, FloatDtype stored_as, Index stride,
                     Index offset) {
  Index i = 0;
  if constexpr (kWidth == 1) {
    for (; i + 8 <= count; i += 8) StoreFloats(out, stored_as, offset + i, Load<Float8>(tile + i));
  } else {
    // Sample after sample: their rows of the output lie a power of two apart, and a cache set cannot hold many of them.
    const Index full = count / 8 * 8;
    Index n = 0;
#ifdef __AVX512F__
    for (; kWidth >= 16 && stored_as == FloatDtype::kFloat32 && n + 16 <= samples; n += 16) {
      for (i = 0; i + 16 <= full; i += 16) {
        Vector<16> block[16];
        for (int j = 0; j < 16; ++j) block[j] = Load<Vector<16>>(tile + (i + j) * kWidth + n);
        Transpose(block);
        for (Index j = 0; j < 16; ++j) Store(static_cast<float*>(out) + (n + j) * stride + offset + i, block[j]);
      }
      for (; i < full; i += 8) StoreBlock<kWidth>(tile, i, n, samples, out, stored_as, stride, offset);
      for (i = full / 16 * 16; i < full; i += 8) {
        StoreBlock<kWidth>(tile, i, n + 8, samples, out, stored_as, stride, offset);
      }
    }
#endif
    for (; n < samples; n += 8) {
      for (i = 0; i < full; i += 8) StoreBlock<kWidth>(tile, i, n, samples, out, stored_as, stride, offset);
    }
    i = full;
  }
  for (; i < count; ++i) {
    for (Index n = 0; n < samples; ++n) {
      StoreFloat(out, stored_as, n * stride + offset + i, Load<float>(tile + i * kWidth + n));
    }
  }
}

}  // namespace
}  // namespace tersetorch
