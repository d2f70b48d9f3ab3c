// Nearest centres at every level against sums in double, and clusterings against plain Lloyd, on sizes around every
// block.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/vector_kmeans/vector_kmeans.h"

using tersetorch::CpuIsa;
using tersetorch::kVectorBlock;
using tersetorch::VectorKmeansFunctions;
using tersetorch::test::Expect;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  const VectorKmeansFunctions* functions;
};

constexpr Variant kVariants[] = {{"scalar", CpuIsa::kScalar, &tersetorch::kVectorKmeansScalar},
                                 {"avx2", CpuIsa::kAvx2, &tersetorch::kVectorKmeansAvx2},
                                 {"avx512", CpuIsa::kAvx512, &tersetorch::kVectorKmeansAvx512}};

std::vector<float> Random(std::int64_t size, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> numbers(size);
  for (float& number : numbers) number = normal(random);
  return numbers;
}

double Distance(const float* x, const float* centre, std::int64_t width) {
  double sum = 0;
  for (std::int64_t j = 0; j < width; ++j) sum += (double{x[j]} - centre[j]) * (double{x[j]} - centre[j]);
  return sum;
}

void TestNearest(const Variant& variant, std::int64_t count, std::int64_t width, std::int64_t clusters,
                 std::mt19937& random) {
  const std::int64_t stride = (count + kVectorBlock - 1) / kVectorBlock * kVectorBlock;
  const std::vector<float> points = Random(count * width, random), centres = Random(clusters * width, random);
  std::vector<float> planes(stride * width), packed;
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t j = 0; j < width; ++j) planes[j * stride + i] = points[i * width + j];
  }
  for (std::int64_t c = 0; c < clusters; ++c) {
    const float* centre = centres.data() + c * width;
    packed.insert(packed.end(), centre, centre + width);
    const std::vector<float> zeros(width);
    packed.push_back(static_cast<float>(Distance(centre, zeros.data(), width) / 2));
  }
  std::vector<std::int32_t> codes(stride);
  std::vector<float> distances(stride), lost(stride), closer(stride), sums(stride / kVectorBlock);
  variant.functions->nearest(
      {planes.data(), count, stride, width, packed.data(), clusters, codes.data(), distances.data(), lost.data()});
  std::vector<std::int32_t> again(stride);
  const double error = variant.functions->nearest(
      {planes.data(), count, stride, width, packed.data(), clusters, again.data(), distances.data(), nullptr});
  Expect(codes == again, "%s: codes without losses", variant.name);
  std::fill_n(closer.begin(), count, 3.0f);
  variant.functions->closer(planes.data(), stride, width, centres.data(), closer.data(), sums.data());
  std::vector<double> members(clusters * width), expected(clusters * width);
  std::vector<std::int32_t> sizes(clusters), sized(clusters);
  variant.functions->members(points.data(), codes.data(), count, width, members.data(), sizes.data());
  double total = 0, apart = 0;
  for (std::int64_t i = 0; i < stride; ++i) {
    const char* what = "%s: %s of point %d of %d, %d numbers, %d clusters";
    const auto expect = [&](bool ok, const char* part) {
      Expect(ok, what, variant.name, part, static_cast<int>(i), static_cast<int>(count), static_cast<int>(width),
             static_cast<int>(clusters));
    };
    if (i >= count) {
      expect(distances[i] == 0 && codes[i] >= 0 && codes[i] < clusters && closer[i] == 0, "padding");
      continue;
    }
    const float* x = points.data() + i * width;
    ++sized[codes[i]];
    for (std::int64_t j = 0; j < width; ++j) expected[codes[i] * width + j] += x[j];
    apart += distances[i];
    double least = std::numeric_limits<double>::infinity(), second = least;
    for (std::int64_t c = 0; c < clusters; ++c) {
      const double distance = Distance(x, centres.data() + c * width, width);
      second = std::min(second, std::max(distance, least));
      least = std::min(least, distance);
    }
    const double allowed = 1e-5 * static_cast<double>(width + 1) * (1 + least);
    expect(codes[i] >= 0 && codes[i] < clusters, "code");
    expect(std::abs(Distance(x, centres.data() + codes[i] * width, width) - least) <= allowed, "nearest centre");
    expect(std::abs(distances[i] - least) <= allowed, "distance");
    expect(clusters == 1 ? std::isinf(lost[i]) : std::abs(lost[i] - (second - least)) <= 2 * allowed, "loss");
    const double nearer = std::min(3.0, Distance(x, centres.data(), width));
    expect(std::abs(closer[i] - nearer) <= allowed, "nearer distance");
    total += nearer;
  }
  Expect(members == expected && sizes == sized, "%s: sums of members", variant.name);
  Expect(std::abs(error - apart) <= 1e-9 * (1 + apart), "%s: error", variant.name);
  double summed = 0;
  for (const float sum : sums) summed += sum;
  Expect(std::abs(summed - total) <= 1e-5 * (1 + total), "%s: sums of blocks", variant.name);
}

struct Result {
  std::vector<std::int32_t> codes;
  std::vector<float> centres;
  double error;
};

Result Cluster(const std::vector<float>& points, std::int64_t width, std::int64_t clusters, std::int64_t exchanges,
               std::mt19937 random) {
  const auto count = static_cast<std::int64_t>(points.size()) / width;
  std::uniform_real_distribution<double> uniform;
  std::vector<double> draws(clusters), scratch(tersetorch::VectorKmeansScratch(count, width, clusters));
  for (double& draw : draws) draw = uniform(random);
  Result result{std::vector<std::int32_t>(count), std::vector<float>(clusters * width), 0};
  result.error = tersetorch::VectorKmeans({points.data(), count, width, clusters, draws.data(), 50, exchanges,
                                           result.codes.data(), result.centres.data(), scratch.data()});
  return result;
}

void TestClusters(std::int64_t count, std::int64_t width, std::int64_t clusters, std::mt19937& random) {
  const std::vector<float> points = Random(count * width, random);
  const Result plain = Cluster(points, width, clusters, 0, random),
               mended = Cluster(points, width, clusters, 12, random);
  const auto expect = [&](bool ok, const char* what) {
    Expect(ok, "%s, %d clusters of %d points of %d numbers", what, static_cast<int>(clusters), static_cast<int>(count),
           static_cast<int>(width));
  };
  expect(mended.error <= plain.error, "exchanges only help");
  double error = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t code = mended.codes[i];
    expect(code >= 0 && code < clusters, "code");
    error += Distance(points.data() + i * width, mended.centres.data() + code * width, width);
  }
  expect(std::abs(error - mended.error) <= 1e-4 * (1 + error), "error is that of codes and centres");
  expect(clusters < count || mended.error <= 1e-6, "each point its own cluster");
  // Where it starts decides: Lloyd from there ends there.
  Result again{std::vector<std::int32_t>(count), mended.centres, 0};
  std::vector<double> scratch(tersetorch::VectorKmeansScratch(count, width, clusters));
  again.error = tersetorch::VectorKmeans(
      {points.data(), count, width, clusters, nullptr, 0, 0, again.codes.data(), again.centres.data(), scratch.data()});
  expect(again.codes == mended.codes && again.centres == mended.centres && again.error == mended.error, "no rounds");
}

void TestDuplicates() {
  std::vector<float> points;
  for (int i = 0; i < 130; ++i) points.insert(points.end(), {static_cast<float>(i % 3), 1.0f});
  for (const std::int64_t clusters : {3, 8}) {
    Expect(Cluster(points, 2, clusters, 12, std::mt19937(1)).error == 0, "three points, many times each");
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (const Variant& variant : kVariants) {
    if (tersetorch::ProcessCpuIsa().detected < variant.needs) continue;
    for (const std::int64_t count : {1, 7, 63, 64, 65, 131}) {
      for (const std::int64_t width : {1, 2, 3, 4, 5, 7, 8, 9, 17}) {
        for (const std::int64_t clusters : {1, 2, 37, 256}) TestNearest(variant, count, width, clusters, random);
      }
    }
  }
  for (const std::int64_t count : {1, 2, 64, 65, 257}) {
    for (const std::int64_t width : {1, 4, 5, 8}) {
      for (const std::int64_t clusters : {1, 2, 16, 257}) {
        if (clusters <= count) TestClusters(count, width, clusters, random);
      }
    }
  }
  TestDuplicates();
  return tersetorch::test::Failures() != 0;
}
