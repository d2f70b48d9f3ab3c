// The best cuts against the plain recurrence, and codes against counting, on sizes around every block.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels/check.h"
#include "kernels/line_kmeans/line_kmeans.h"

using tersetorch::test::Expect;

namespace {

struct Sums {
  std::vector<double> weight{0}, moment{0}, square{0};

  Sums(std::int64_t n, std::mt19937& random) {
    std::exponential_distribution<double> step, mass;
    double point = -static_cast<double>(n) / 2;
    for (std::int64_t i = 0; i < n; ++i) {
      point += step(random) + 1e-3;
      const double w = mass(random) + 0.1;
      weight.push_back(weight.back() + w);
      moment.push_back(moment.back() + w * point);
      square.push_back(square.back() + w * point * point);
    }
  }

  double Cost(std::int64_t i, std::int64_t j) const {
    const double spread = moment[j] - moment[i];
    return square[j] - square[i] - spread * spread / (weight[j] - weight[i]);
  }
};

double Least(const Sums& sums, std::int64_t n, std::int64_t clusters) {
  std::vector<double> best(n + 1, std::numeric_limits<double>::infinity());
  best[0] = 0;
  for (std::int64_t c = 0; c < clusters; ++c) {
    std::vector<double> next(n + 1, std::numeric_limits<double>::infinity());
    for (std::int64_t j = 1; j <= n; ++j) {
      for (std::int64_t i = 0; i < j; ++i) next[j] = std::min(next[j], best[i] + sums.Cost(i, j));
    }
    best = next;
  }
  return best[n];
}

void TestRuns(std::int64_t n, std::int64_t clusters, std::mt19937& random) {
  const Sums sums(n, random);
  std::vector<double> scratch(tersetorch::OptimalRunsSums(n));
  std::vector<std::int32_t> choices(tersetorch::OptimalRunsChoices(n, clusters));
  std::vector<std::int64_t> starts(clusters);
  tersetorch::OptimalRuns(sums.weight.data(), sums.moment.data(), sums.square.data(), n, clusters, scratch.data(),
                          choices.data(), starts.data());
  double cost = 0;
  for (std::int64_t c = 0; c < clusters; ++c) {
    const std::int64_t end = c + 1 < clusters ? starts[c + 1] : n;
    Expect(starts[c] < end && (c > 0 || starts[0] == 0), "run %d of %d over %d points", static_cast<int>(c),
           static_cast<int>(clusters), static_cast<int>(n));
    cost += sums.Cost(starts[c], end);
  }
  const double least = Least(sums, n, clusters);
  Expect(cost <= least + 1e-9 * (1 + sums.square[n]), "cost of %d clusters of %d points", static_cast<int>(clusters),
         static_cast<int>(n));
}

template <typename T>
void TestCodes(std::int64_t count, std::mt19937& random) {
  std::uniform_real_distribution<T> uniform(-1, 1);
  std::vector<T> thresholds(count), values(513);
  for (T& threshold : thresholds) threshold = uniform(random);
  std::sort(thresholds.begin(), thresholds.end());
  for (std::size_t t = 0; t < values.size(); ++t) {
    values[t] = count > 0 && t % 2 ? thresholds[t % static_cast<std::size_t>(count)] : uniform(random);
  }
  values[0] = std::numeric_limits<T>::infinity();
  values[2] = -std::numeric_limits<T>::infinity();
  std::vector<std::uint8_t> codes(values.size());
  tersetorch::ThresholdCodes(values.data(), static_cast<std::int64_t>(values.size()), thresholds.data(), count,
                             codes.data());
  for (std::size_t t = 0; t < values.size(); ++t) {
    int reached = 0;
    for (const T threshold : thresholds) reached += values[t] >= threshold;
    Expect(codes[t] == reached, "code %d of %d thresholds", static_cast<int>(t), static_cast<int>(count));
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (const std::int64_t n : {1, 2, 3, 7, 63, 64, 65, 127, 128, 131, 257}) {
    for (const std::int64_t clusters : {1, 2, 3, 8, 31, 64, 257}) {
      if (clusters <= n) TestRuns(n, clusters, random);
    }
  }
  for (const std::int64_t count : {0, 1, 2, 3, 7, 8, 127, 128, 254, 255}) {
    TestCodes<float>(count, random);
    TestCodes<double>(count, random);
  }
  return tersetorch::test::Failures() != 0;
}
