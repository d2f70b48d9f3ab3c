// k-means of short vectors, one problem at a time: which centre each point is nearest to, and clusterings made of it.
//
// Math:   score[i][c] = |c|^2 / 2 - x_i . c; a point's code is the first c of least score, its distance |x_i - c|^2,
//         computed from the difference, and lost is twice the second least score less the least: by how much its
//         distance would grow without its centre. One centre alone loses infinitely much.
//         Lloyd: centres become the means of their members (sums in double), those without members the points farthest
//         from their centres; rounds go on while the error falls by more than kVectorLeastGain of it.
//         Clusters: k-means++ draws the centres, Lloyd moves them, and exchanges then move those whose members lose
//         least next to where the error is greatest, which stays where it lowers the error after some rounds of Lloyd;
//         at first a sixth of them at a time, then fewer, at last single ones: the next pair after each that failed,
//         and in turns with them a point drawn as at the start.
//         Lloyd's last rounds go on to a hundredth of that gain.
// Layout: points row-major. The kernels take them as planes [width][stride], stride a multiple of kVectorBlock, zeros
//         past the last point; centres [clusters][width + 1], each followed by |c|^2 / 2.
// Limits: for each centre and 16 points, AVX-512 on Intel: `width` FMA, a comparison, a minimum and a selection, all on
//         two ports. 4096 points of 4 numbers and 256 centres: 65,536 times 3.5 cycles, 75 us at 3.07 GHz, 57 % of what
//         FMA alone would allow; measured 81, of which 5 fetch the own centres for the distances. Points and centres,
//         70 to 140 KiB, are in the second cache. Sums of members take 5 us. A draw of 256 centres costs as many passes
//         over points and distances, 80 KiB a pass: six rounds of Lloyd.
// Source: Arthur and Vassilvitskii, k-means++ (2007); Fritzke, The k-means-u* algorithm (2017), for the exchanges, here
//         with several centres at a time.
//
// Single-threaded: the caller may run problems side by side, and none depends on another. No pointer needs to be
// aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"

namespace tersetorch {

inline constexpr std::int64_t kVectorBlock = 64;
inline constexpr double kVectorLeastGain = 1e-5;

struct VectorKmeansArgs {
  const float* points;  // [count, width], finite; count and width at least 1
  std::int64_t count, width;
  std::int64_t clusters;  // 1 to 2^30
  const double* draws;    // [clusters] of [0, 1), or null where centres holds where to start
  std::int64_t iterations, exchanges;
  std::int32_t* codes;  // [count]
  float* centres;       // [clusters, width]
  double* scratch;      // VectorKmeansScratch numbers
};

TERSETORCH_API std::int64_t VectorKmeansScratch(std::int64_t count, std::int64_t width, std::int64_t clusters) noexcept;

// Writes codes and centres and returns the sum of the squared distances.
TERSETORCH_API double VectorKmeans(const VectorKmeansArgs& args) noexcept;

struct NearestCentresArgs {
  const float* planes;
  std::int64_t count, stride, width;
  const float* centres;
  std::int64_t clusters;
  std::int32_t* codes;  // [stride], as the next two
  float* distances;
  float* lost;  // or null
};

// The variants, hidden in the library; the kernel tests link them directly.
struct VectorKmeansFunctions {
  // Past count, distances become 0. Returns their sum.
  double (*nearest)(const NearestCentresArgs&) noexcept;
  // sums[code][j] += points[i][j] and ++sizes[code] for each point, in the order of the points.
  void (*members)(const float* points, const std::int32_t* codes, std::int64_t count, std::int64_t width, double* sums,
                  std::int32_t* sizes) noexcept;
  // distances[i] = min(distances[i], |x_i - centre|^2), and the sum of each kVectorBlock of them.
  void (*closer)(const float* planes, std::int64_t stride, std::int64_t width, const float* centre, float* distances,
                 float* sums) noexcept;
};
extern const VectorKmeansFunctions kVectorKmeansScalar;
extern const VectorKmeansFunctions kVectorKmeansAvx2;
extern const VectorKmeansFunctions kVectorKmeansAvx512;

}  // namespace tersetorch
