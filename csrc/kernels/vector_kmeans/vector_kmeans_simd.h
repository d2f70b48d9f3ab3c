// Nearest centres at every vector level, written once. Everything here is local to the including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/vector_kmeans/vector_kmeans.h"

namespace tersetorch {
namespace {

#ifdef __AVX512F__
constexpr int kPointLanes = 16;
typedef std::int32_t PointCodes __attribute__((vector_size(64)));
#else
constexpr int kPointLanes = 8;
typedef std::int32_t PointCodes __attribute__((vector_size(32)));
#endif
using Points = Vector<kPointLanes>;
typedef double Total __attribute__((vector_size(8 * kPointLanes)));
typedef float Float4 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));

inline Points Gather(const float* from, PointCodes places) {
#ifdef __AVX512F__
  return (Points)_mm512_i32gather_ps((__m512i)places, from, 4);
#else
  return (Points)_mm256_i32gather_ps(from, (__m256i)places, 4);
#endif
}

// Points [i, i + kVectors * kPointLanes); kWidth numbers of each stay in registers, or none of them where it is 0.
template <int kWidth, int kVectors, bool kLost>
void NearestBlock(const NearestCentresArgs& a, Index i, Total& total) {
  const Index width = kWidth > 0 ? kWidth : a.width;
  const float infinity = __builtin_inff();
  Points x[kWidth > 0 ? kWidth : 1][kVectors], first[kVectors], second[kVectors];
  PointCodes codes[kVectors];
  for (int j = 0; j < kWidth; ++j) {
    for (int v = 0; v < kVectors; ++v) x[j][v] = Load<Points>(a.planes + j * a.stride + i + v * kPointLanes);
  }
  for (int v = 0; v < kVectors; ++v) {
    first[v] = second[v] = Splat<kPointLanes>(infinity);
    codes[v] = PointCodes{};
  }
  const float* centre = a.centres;
  for (Index c = 0; c < a.clusters; ++c, centre += width + 1) {
    Points score[kVectors];
    for (int v = 0; v < kVectors; ++v) score[v] = Splat<kPointLanes>(centre[width]);
    if constexpr (kWidth > 0) {
#pragma GCC unroll 8
      for (int j = 0; j < kWidth; ++j) {
        const Points number = Splat<kPointLanes>(centre[j]);
        for (int v = 0; v < kVectors; ++v) score[v] -= x[j][v] * number;
      }
    } else {
      for (Index j = 0; j < width; ++j) {
        const Points number = Splat<kPointLanes>(centre[j]);
        const float* plane = a.planes + j * a.stride + i;
        for (int v = 0; v < kVectors; ++v) score[v] -= Load<Points>(plane + v * kPointLanes) * number;
      }
    }
    const PointCodes code = PointCodes{} + static_cast<std::int32_t>(c);
    for (int v = 0; v < kVectors; ++v) {
      const auto less = score[v] < first[v];
      if constexpr (kLost) {
        const Points other = less ? first[v] : score[v];
        second[v] = other < second[v] ? other : second[v];
      }
      first[v] = less ? score[v] : first[v];
      codes[v] = less ? code : codes[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const Index at = i + v * kPointLanes;
    Store(a.codes + at, codes[v]);
    if constexpr (kLost) Store(a.lost + at, 2 * (second[v] - first[v]));
    Points distance{};
    const PointCodes places = codes[v] * static_cast<std::int32_t>(width + 1);
    for (Index j = 0; j < width; ++j) {
      const Points difference = Load<Points>(a.planes + j * a.stride + at) - Gather(a.centres + j, places);
      distance += difference * difference;
    }
    for (Index lane = a.count > at ? a.count - at : 0; lane < kPointLanes; ++lane) distance[lane] = 0;
    Store(a.distances + at, distance);
    total += __builtin_convertvector(distance, Total);
  }
}

template <int kWidth, int kVectors>
double NearestOfWidth(const NearestCentresArgs& a) {
  Total total{};
  static_assert(kVectorBlock % (kVectors * kPointLanes) == 0);
  for (Index i = 0; i < a.stride; i += kVectors * kPointLanes) {
    if (a.lost == nullptr) {
      NearestBlock<kWidth, kVectors, false>(a, i, total);
    } else {
      NearestBlock<kWidth, kVectors, true>(a, i, total);
    }
  }
  double sum = 0;
  for (int lane = 0; lane < kPointLanes; ++lane) sum += total[lane];
  return sum;
}

double Nearest(const NearestCentresArgs& a) noexcept {
  constexpr int kMany = kPointLanes / 4;  // vectors that the registers of a level hold beside a few numbers of each
  switch (a.width) {
    case 1:
      return NearestOfWidth<1, kMany>(a);
    case 2:
      return NearestOfWidth<2, kMany>(a);
    case 3:
      return NearestOfWidth<3, kMany>(a);
    case 4:
      return NearestOfWidth<4, kMany>(a);
    case 8:
      return NearestOfWidth<8, kMany / 2>(a);
    default:
      return NearestOfWidth<0, kMany>(a);
  }
}

template <int kWidth>
void MembersOfWidth(const float* points, const std::int32_t* codes, Index count, double* sums, std::int32_t* sizes) {
  for (Index i = 0; i < count; ++i) {
    ++sizes[codes[i]];
    double* sum = sums + codes[i] * kWidth;
    for (int j = 0; j < kWidth; j += 4) {
      const Double4 x = __builtin_convertvector(LoadAt<Float4>(points, i * kWidth + j, 4), Double4);
      Store(sum + j, LoadAt<Double4>(sum, j, 8) + x);
    }
  }
}

void Members(const float* points, const std::int32_t* codes, Index count, Index width, double* sums,
             std::int32_t* sizes) noexcept {
  if (width == 4) return MembersOfWidth<4>(points, codes, count, sums, sizes);
  if (width == 8) return MembersOfWidth<8>(points, codes, count, sums, sizes);
  for (Index i = 0; i < count; ++i) {
    ++sizes[codes[i]];
    for (Index j = 0; j < width; ++j) sums[codes[i] * width + j] += points[i * width + j];
  }
}

void Closer(const float* planes, Index stride, Index width, const float* centre, float* distances,
            float* sums) noexcept {
  for (Index block = 0; block < stride; block += kVectorBlock) {
    Points sum{};
    for (Index i = block; i < block + kVectorBlock; i += kPointLanes) {
      Points distance{};
      for (Index j = 0; j < width; ++j) {
        const Points difference = Load<Points>(planes + j * stride + i) - Splat<kPointLanes>(centre[j]);
        distance += difference * difference;
      }
      const Points before = Load<Points>(distances + i);
      distance = distance < before ? distance : before;
      Store(distances + i, distance);
      sum += distance;
    }
    float total = 0;
    for (int lane = 0; lane < kPointLanes; ++lane) total += sum[lane];
    sums[block / kVectorBlock] = total;
  }
}

}  // namespace
}  // namespace tersetorch
