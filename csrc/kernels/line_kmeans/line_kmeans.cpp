#include "kernels/line_kmeans/line_kmeans.h"

#include <algorithm>
#include <limits>

namespace tersetorch {
namespace {

constexpr int kLanes = 8;
constexpr int kBlock = 32;

// Two lanes, which every x86-64 has: more at a time would wait for the same divider.
using Pair = double __attribute__((vector_size(16), aligned(8), may_alias));
constexpr int kPairs = kLanes / 2;

Pair Load(const double* from) { return *reinterpret_cast<const Pair*>(from); }

// One round of the recurrence: c - 1 clusters are solved, and c are asked for.
struct Round {
  std::int64_t n;
  const double* weight;
  const double* moment;
  const double* square;
  const double* base;          // best_{c-1}[i] - S_i
  const std::int32_t* before;  // choice_{c-1} or nullptr: a lower bound
  std::int32_t* choice;
  double* best;

  double Cost(std::int64_t i, std::int64_t j) const {
    const double spread = moment[j] - moment[i];
    return base[i] - spread * spread / (weight[j] - weight[i]);
  }

  // The first i in [low, high] of least cost for the prefix j. A block's costs come first and its least is looked for
  // in independent lanes, so that the compiler finds vectors in both; where it lies matters only for a new least.
  void Search(std::int64_t j, std::int64_t low, std::int64_t high) {
    double least = std::numeric_limits<double>::infinity();
    std::int64_t where = low;
    std::int64_t i = low;
    for (; i + kBlock <= high + 1; i += kBlock) {
      double costs[kBlock], lanes[kLanes];
      for (int t = 0; t < kBlock; ++t) costs[t] = Cost(i + t, j);
      for (int t = 0; t < kLanes; ++t) lanes[t] = costs[t];
      for (int t = kLanes; t < kBlock; t += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          lanes[lane] = costs[t + lane] < lanes[lane] ? costs[t + lane] : lanes[lane];
        }
      }
      const double of_block = *std::min_element(lanes, lanes + kLanes);
      if (of_block < least) {
        least = of_block;
        where = i + (std::find(costs, costs + kBlock, of_block) - costs);
      }
    }
    for (; i <= high; ++i) {
      const double cost = Cost(i, j);
      if (cost < least) {
        least = cost;
        where = i;
      }
    }
    choice[j] = static_cast<std::int32_t>(where);
    best[j] = least + square[j];
  }

  // The same for the kLanes prefixes from `first` on at once, with first > high: no branch depends on a cost.
  void SearchTogether(std::int64_t first, std::int64_t last, std::int64_t low, std::int64_t high) {
    const double infinity = std::numeric_limits<double>::infinity();
    Pair least[kPairs], where[kPairs];  // an index is exact in a double, and so as wide as what it is chosen by
    for (int pair = 0; pair < kPairs; ++pair) {
      least[pair] = Pair{infinity, infinity};
      where[pair] = Pair{} + static_cast<double>(low);
    }
    for (std::int64_t i = low; i <= high; ++i) {
      for (int pair = 0; pair < kPairs; ++pair) {
        const Pair spread = Load(moment + first + 2 * pair) - moment[i];
        const Pair cost = base[i] - spread * spread / (Load(weight + first + 2 * pair) - weight[i]);
        const auto less = cost < least[pair];
        where[pair] = less ? Pair{} + static_cast<double>(i) : where[pair];
        least[pair] = less ? cost : least[pair];
      }
    }
    for (std::int64_t j = first; j <= last; ++j) {
      const std::int64_t lane = j - first;
      choice[j] = static_cast<std::int32_t>(where[lane / 2][lane % 2]);
      best[j] = least[lane / 2][lane % 2] + square[j];
    }
  }

  std::int64_t Lowest(std::int64_t j, std::int64_t low) const {
    return std::max<std::int64_t>(low, before == nullptr ? 0 : before[j]);
  }

  // All prefixes in [first, last], whose choices lie in [low, high].
  void Solve(std::int64_t first, std::int64_t last, std::int64_t low, std::int64_t high) {
    while (first <= last) {
      // Where few are left, all pairs of them and their choices cost less than the branches of a search.
      if (last - first < kLanes && high < first && first + kLanes <= n + 1) {
        SearchTogether(first, last, Lowest(first, low), high);
        return;
      }
      const std::int64_t j = first + (last - first) / 2;
      const std::int64_t from = Lowest(j, low);
      Search(j, from, std::max(from, std::min(high, j - 1)));
      Solve(first, j - 1, low, choice[j]);
      first = j + 1;
      low = choice[j];
    }
  }
};

template <typename T>
void Codes(const T* values, std::int64_t n, const T* thresholds, std::int64_t count, std::uint8_t* codes) {
  T table[256];
  std::fill(table, table + 256, std::numeric_limits<T>::infinity());
  std::copy(thresholds, thresholds + count, table);
  int top = 1;
  while (top <= count) top *= 2;
  for (std::int64_t t = 0; t < n; ++t) {
    int code = 0;
    for (int step = top / 2; step > 0; step /= 2) code += values[t] >= table[code + step - 1] ? step : 0;
    codes[t] = static_cast<std::uint8_t>(std::min<std::int64_t>(code, count));  // infinity reaches the padding
  }
}

}  // namespace

void OptimalRuns(const double* weight, const double* moment, const double* square, std::int64_t n,
                 std::int64_t clusters, double* sums, std::int32_t* choices, std::int64_t* starts) noexcept {
  double* best = sums;
  double* base = sums + n + 1;
  best[0] = 0;
  for (std::int64_t j = 1; j <= n; ++j) {
    const double spread = moment[j] - moment[0];
    best[j] = square[j] - square[0] - spread * spread / (weight[j] - weight[0]);
  }
  const std::int32_t* before = nullptr;
  for (std::int64_t c = 2; c <= clusters; ++c) {
    for (std::int64_t i = 0; i <= n; ++i) base[i] = best[i] - square[i];
    std::int32_t* choice = choices + (c - 2) * (n + 1);
    const std::int64_t last = n - (clusters - c);  // each later run needs a point
    Round round{n, weight, moment, square, base, before, choice, best};
    round.Solve(c == clusters ? n : c, last, c - 1, n - 1);
    if (last < n) choice[last + 1] = choice[last];  // a lower bound for the next round, which looks at one prefix more
    before = choice;
  }
  std::int64_t end = n;
  for (std::int64_t c = clusters; c >= 2; --c) {
    end = choices[(c - 2) * (n + 1) + end];
    starts[c - 1] = end;
  }
  starts[0] = 0;
}

void ThresholdCodes(const float* values, std::int64_t n, const float* thresholds, std::int64_t count,
                    std::uint8_t* codes) noexcept {
  Codes(values, n, thresholds, count, codes);
}

void ThresholdCodes(const double* values, std::int64_t n, const double* thresholds, std::int64_t count,
                    std::uint8_t* codes) noexcept {
  Codes(values, n, thresholds, count, codes);
}

}  // namespace tersetorch
