#include "kernels/vector_kmeans/vector_kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "kernels/common/cpu_isa.h"

namespace tersetorch {
namespace {

constexpr std::int64_t kRoundsOfExchange = 12;
constexpr double kGolden = 0.6180339887498949;  // its multiples fall evenly into [0, 1)
constexpr double kAnything = std::numeric_limits<double>::infinity();
// Of the last rounds, which an exchange may have left much to do.
constexpr double kLastGain = 1e-7;

const VectorKmeansFunctions& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kVectorKmeansAvx512;
    case CpuIsa::kAvx2:
      return kVectorKmeansAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kVectorKmeansScalar;
}

std::int64_t Stride(std::int64_t count) { return (count + kVectorBlock - 1) / kVectorBlock * kVectorBlock; }

struct State {
  std::int32_t* codes;
  float* distances;
  float* centres;  // [clusters, width]
  double error = 0;
};

class Problem {
 public:
  explicit Problem(const VectorKmeansArgs& args)
      : a_(args), stride_(Stride(args.count)), functions_(Active()), next_(args.scratch) {
    sums_ = Take<double>(a_.clusters * a_.width);
    errors_ = Take<double>(a_.clusters);
    losses_ = Take<double>(a_.clusters);
    for (State* state : {&best_, &now_, &spare_}) {
      state->codes = Take<std::int32_t>(stride_);
      state->distances = Take<float>(stride_);
      state->centres = Take<float>(a_.clusters * a_.width);
    }
    planes_ = Take<float>(stride_ * a_.width);
    lost_ = Take<float>(stride_);
    packed_ = Take<float>(a_.clusters * (a_.width + 1));
    blocks_ = Take<float>(stride_ / kVectorBlock);
    sizes_ = Take<std::int32_t>(a_.clusters);
    order_ = Take<std::int32_t>(std::max(a_.count, a_.clusters));
    for (std::int64_t j = 0; j < a_.width; ++j) {
      float* plane = planes_ + j * stride_;
      for (std::int64_t i = 0; i < a_.count; ++i) plane[i] = Point(i)[j];
      std::fill(plane + a_.count, plane + stride_, 0.0f);
    }
  }

  double Solve() {
    if (a_.draws != nullptr) {
      Draw(now_.centres);
    } else {
      std::copy_n(a_.centres, a_.clusters * a_.width, now_.centres);
    }
    Lloyd(a_.iterations, kAnything, kVectorLeastGain);
    std::swap(best_, now_);
    std::int64_t moved = std::max<std::int64_t>(1, a_.clusters / 6), failed = 0;
    for (std::int64_t round = 0; round < a_.exchanges && failed < 2 * a_.clusters * (a_.clusters - 1); ++round) {
      if (Exchange(moved, failed, round)) {
        failed = 0;
      } else if (moved > 1) {
        moved = std::max<std::int64_t>(1, moved / 3);
      } else {
        ++failed;
      }
    }
    std::swap(now_, best_);
    Lloyd(a_.iterations, kAnything, kLastGain);
    std::swap(now_, best_);
    std::copy_n(best_.codes, a_.count, a_.codes);
    std::copy_n(best_.centres, a_.clusters * a_.width, a_.centres);
    return best_.error;
  }

 private:
  template <typename T>
  T* Take(std::int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<std::int64_t>(sizeof(T)) + 7) / 8;
    return taken;
  }

  const float* Point(std::int64_t i) const { return a_.points + i * a_.width; }

  // Each centre is a point drawn in proportion to its error so far.
  void Draw(float* centres) {
    float* distances = now_.distances;
    std::fill_n(distances, a_.count, std::numeric_limits<float>::infinity());
    std::fill(distances + a_.count, distances + stride_, 0.0f);
    auto chosen = std::min(a_.count - 1, static_cast<std::int64_t>(a_.draws[0] * static_cast<double>(a_.count)));
    for (std::int64_t c = 0;;) {
      std::copy_n(Point(chosen), a_.width, centres + c * a_.width);
      if (++c == a_.clusters) return;
      functions_.closer(planes_, stride_, a_.width, Point(chosen), distances, blocks_);
      chosen = Drawn(distances, a_.draws[c]);
    }
  }

  // The first point up to which more than a part of the distances lie.
  std::int64_t Drawn(const float* distances, double part) const {
    double total = 0;
    for (std::int64_t block = 0; block < stride_ / kVectorBlock; ++block) total += blocks_[block];
    double left = total * part;
    std::int64_t block = 0;
    while (block + 1 < stride_ / kVectorBlock && blocks_[block] <= left) left -= blocks_[block++];
    std::int64_t i = block * kVectorBlock;
    const std::int64_t end = std::min(a_.count, i + kVectorBlock);
    while (i + 1 < end && distances[i] <= left) left -= distances[i++];
    return i;
  }

  void Nearest(State& state, float* lost) {
    for (std::int64_t c = 0; c < a_.clusters; ++c) {
      double square = 0;
      for (std::int64_t j = 0; j < a_.width; ++j) {
        const float number = state.centres[c * a_.width + j];
        packed_[c * (a_.width + 1) + j] = number;
        square += static_cast<double>(number) * number;
      }
      packed_[c * (a_.width + 1) + a_.width] = static_cast<float>(square / 2);
    }
    functions_.nearest(
        {planes_, a_.count, stride_, a_.width, packed_, a_.clusters, state.codes, state.distances, lost});
    state.error = 0;
    for (std::int64_t i = 0; i < a_.count; ++i) state.error += state.distances[i];
  }

  // now_ becomes where Lloyd's iteration from its centres ends; it stops early where the error, which falls less and
  // less, will not get below `wanted`.
  void Lloyd(std::int64_t iterations, double wanted, double least_gain) {
    Nearest(now_, nullptr);
    for (std::int64_t left = iterations; left > 0; --left) {
      Means(now_, spare_.centres);
      Nearest(spare_, nullptr);
      const double gain = now_.error - spare_.error;
      const bool little = gain <= least_gain * now_.error;
      // Rounding may raise the error once nothing moves any more.
      if (gain > 0) std::swap(now_, spare_);
      if (little || now_.error - static_cast<double>(std::min<std::int64_t>(left - 1, 3)) * gain > wanted) break;
    }
  }

  void Means(const State& from, float* centres) {
    std::fill_n(sums_, a_.clusters * a_.width, 0.0);
    std::fill_n(sizes_, a_.clusters, 0);
    functions_.members(a_.points, from.codes, a_.count, a_.width, sums_, sizes_);
    const std::int64_t empty = std::count(sizes_, sizes_ + a_.clusters, 0);
    if (empty > 0) Order(std::min(empty, a_.count), a_.count, from.distances);
    std::int64_t filled = 0;
    for (std::int64_t c = 0; c < a_.clusters; ++c) {
      if (sizes_[c] > 0) {
        for (std::int64_t j = 0; j < a_.width; ++j) {
          centres[c * a_.width + j] = static_cast<float>(sums_[c * a_.width + j] / sizes_[c]);
        }
      } else {
        std::copy_n(Point(order_[std::min(filled++, a_.count - 1)]), a_.width, centres + c * a_.width);
      }
    }
  }

  // The first `most` of order_ become the numbers of the largest of count values, the largest first.
  template <typename T>
  void Order(std::int64_t most, std::int64_t count, const T* values) {
    for (std::int64_t i = 0; i < count; ++i) order_[i] = static_cast<std::int32_t>(i);
    std::partial_sort(order_, order_ + most, order_ + count, [values](std::int32_t i, std::int32_t j) {
      return values[i] > values[j] || (values[i] == values[j] && i < j);
    });
  }

  // Moves the centres that are missed least to where the error is greatest, half the way to the member that lies
  // farthest; whether that helped. Of single centres, the pairs that are tried after so many that failed are those of
  // ranks whose larger one grows the latest; after each, the same centre goes to a point drawn as for the start.
  bool Exchange(std::int64_t moved, std::int64_t failed, std::int64_t round) {
    const std::int64_t pair = failed / 2;
    std::int64_t shell = 0;
    while ((shell + 1) * (shell + 1) <= pair) ++shell;
    const std::int64_t step = pair - shell * shell;
    const std::int64_t from = std::min(shell, step), to = std::min(shell, 2 * shell - step);
    Nearest(best_, lost_);
    std::fill_n(errors_, a_.clusters, 0.0);
    std::fill_n(losses_, a_.clusters, 0.0);
    std::fill_n(sizes_, a_.clusters, 0);  // the member that lies farthest
    for (std::int64_t i = 0; i < a_.count; ++i) {
      const std::int32_t code = best_.codes[i];
      errors_[code] += best_.distances[i];
      losses_[code] -= lost_[i];
      if (best_.codes[sizes_[code]] != code || best_.distances[i] >= best_.distances[sizes_[code]]) {
        sizes_[code] = static_cast<std::int32_t>(i);
      }
    }
    std::copy_n(best_.centres, a_.clusters * a_.width, now_.centres);
    Order(std::min(from + moved, a_.clusters), a_.clusters, losses_);
    std::int32_t* least = spare_.codes;  // free until Lloyd
    std::copy_n(order_ + std::min(from, a_.clusters - moved), moved, least);
    for (std::int64_t m = 0; m < moved; ++m) errors_[least[m]] = -1;  // a centre that moves away is no place to move to
    Order(std::min(to + moved, a_.clusters), a_.clusters, errors_);
    for (std::int64_t m = 0; m < moved; ++m) {
      const std::int32_t greatest = order_[std::min(to, a_.clusters - moved) + m];
      const float* centre = best_.centres + greatest * a_.width;
      const float* member = Point(sizes_[greatest]);
      for (std::int64_t j = 0; j < a_.width; ++j) now_.centres[least[m] * a_.width + j] = (centre[j] + member[j]) / 2;
    }
    if (failed % 2 == 1) {
      for (std::int64_t block = 0; block < stride_; block += kVectorBlock) {
        blocks_[block / kVectorBlock] =
            std::accumulate(best_.distances + block, best_.distances + block + kVectorBlock, 0.0f);
      }
      const double part = (a_.draws == nullptr ? 0 : a_.draws[0]) + kGolden * static_cast<double>(round + 1);
      const std::int64_t drawn = Drawn(best_.distances, part - std::floor(part));
      std::copy_n(Point(drawn), a_.width, now_.centres + least[0] * a_.width);
    }
    const double wanted = best_.error * (1 - kVectorLeastGain);
    Lloyd(kRoundsOfExchange, wanted, kVectorLeastGain);
    if (!(now_.error < wanted)) return false;
    std::swap(best_, now_);
    return true;
  }

  const VectorKmeansArgs& a_;
  const std::int64_t stride_;
  const VectorKmeansFunctions& functions_;
  double* next_;
  State best_, now_, spare_;
  double *sums_, *errors_, *losses_;
  float *planes_, *lost_, *packed_, *blocks_;
  std::int32_t *sizes_, *order_;
};

}  // namespace

std::int64_t VectorKmeansScratch(std::int64_t count, std::int64_t width, std::int64_t clusters) noexcept {
  const std::int64_t stride = Stride(count);
  // What Problem takes, in words of 4 bytes, and at most one for each piece to fill a double.
  const std::int64_t words = 2 * clusters * (width + 2) + 3 * (2 * stride + clusters * width) + stride * (width + 1) +
                             clusters * (width + 1) + stride / kVectorBlock + clusters + std::max(count, clusters);
  return words / 2 + 32;
}

double VectorKmeans(const VectorKmeansArgs& args) noexcept { return Problem(args).Solve(); }

}  // namespace tersetorch
