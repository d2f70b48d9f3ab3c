#include <limits>

#include "kernels/vector_kmeans/vector_kmeans.h"

namespace tersetorch {
namespace {

double Nearest(const NearestCentresArgs& a) noexcept {
  double total = 0;
  for (std::int64_t i = 0; i < a.stride; ++i) {
    float first = std::numeric_limits<float>::infinity(), second = first;
    std::int32_t code = 0;
    for (std::int64_t c = 0; c < a.clusters; ++c) {
      const float* centre = a.centres + c * (a.width + 1);
      float score = centre[a.width];
      for (std::int64_t j = 0; j < a.width; ++j) score -= a.planes[j * a.stride + i] * centre[j];
      if (score < first) {
        second = first;
        first = score;
        code = static_cast<std::int32_t>(c);
      } else if (score < second) {
        second = score;
      }
    }
    const float* centre = a.centres + code * (a.width + 1);
    float distance = 0;
    for (std::int64_t j = 0; j < a.width; ++j) {
      const float difference = a.planes[j * a.stride + i] - centre[j];
      distance += difference * difference;
    }
    a.codes[i] = code;
    a.distances[i] = i < a.count ? distance : 0;
    if (a.lost != nullptr) a.lost[i] = 2 * (second - first);
    total += a.distances[i];
  }
  return total;
}

void Members(const float* points, const std::int32_t* codes, std::int64_t count, std::int64_t width, double* sums,
             std::int32_t* sizes) noexcept {
  for (std::int64_t i = 0; i < count; ++i) {
    ++sizes[codes[i]];
    for (std::int64_t j = 0; j < width; ++j) sums[codes[i] * width + j] += points[i * width + j];
  }
}

void Closer(const float* planes, std::int64_t stride, std::int64_t width, const float* centre, float* distances,
            float* sums) noexcept {
  for (std::int64_t block = 0; block < stride; block += kVectorBlock) {
    float sum = 0;
    for (std::int64_t i = block; i < block + kVectorBlock; ++i) {
      float distance = 0;
      for (std::int64_t j = 0; j < width; ++j) {
        const float difference = planes[j * stride + i] - centre[j];
        distance += difference * difference;
      }
      if (distance < distances[i]) distances[i] = distance;
      sum += distances[i];
    }
    sums[block / kVectorBlock] = sum;
  }
}

}  // namespace

const VectorKmeansFunctions kVectorKmeansScalar{Nearest, Members, Closer};

}  // namespace tersetorch
