// k-means of numbers on a line: the best cuts by dynamic programming, and which cluster a number is in.
//
// Sorted points x_0 < x_1 < ... with weights w are cut into runs. With sums over prefixes W_j = sum_{t<j} w_t,
// M_j = sum w x and S_j = sum w x^2, the run [i, j) costs S_j - S_i - (M_j - M_i)^2 / (W_j - W_i), and
//   best_c[j] = min over i of best_{c-1}[i] + cost(i, j).
// The first minimising i never falls as j grows, nor as c does, so that divide and conquer over j looks at O(n log n)
// pairs for each c. Wang and Song, Ckmeans.1d.dp (2011), found the recurrence; the rest is folklore of Monge arrays.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"

namespace tersetorch {

// Entries of OptimalRuns' buffers for n points.
inline std::int64_t OptimalRunsSums(std::int64_t n) { return 2 * (n + 1); }
inline std::int64_t OptimalRunsChoices(std::int64_t n, std::int64_t clusters) { return (clusters - 1) * (n + 1); }

// Writes to starts [clusters] the first point of each run of the partition of n points with the least cost.
// weight, moment and square [n + 1] are W, M and S of points around 0, W strictly rising; 1 <= clusters <= n < 2^31.
// Only differences of sums count: counted from a middle point on, those of the many are not rounded to a far outlier's.
TERSETORCH_API void OptimalRuns(const double* weight, const double* moment, const double* square, std::int64_t n,
                                std::int64_t clusters, double* sums, std::int32_t* choices,
                                std::int64_t* starts) noexcept;

// codes[t] = how many of the rising thresholds (at most 255) values[t] reaches.
TERSETORCH_API void ThresholdCodes(const float* values, std::int64_t n, const float* thresholds, std::int64_t count,
                                   std::uint8_t* codes) noexcept;
TERSETORCH_API void ThresholdCodes(const double* values, std::int64_t n, const double* thresholds, std::int64_t count,
                                   std::uint8_t* codes) noexcept;

}  // namespace tersetorch
