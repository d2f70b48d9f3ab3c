#include "native/line_kmeans.h"

#include <pybind11/numpy.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <string>

#include "kernels/line_kmeans/line_kmeans.h"

namespace py = pybind11;

namespace tersetorch {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

constexpr std::int64_t kMostThresholds = 255;  // codes are bytes

Array<std::int64_t> Runs(const Array<double>& weight, const Array<double>& moment, const Array<double>& square,
                         std::int64_t clusters) {
  const std::int64_t n = weight.size() - 1;
  if (moment.size() != weight.size() || square.size() != weight.size()) {
    throw py::value_error("optimal_runs: weight, moment and square must have as many sums, got " +
                          std::to_string(weight.size()) + ", " + std::to_string(moment.size()) + " and " +
                          std::to_string(square.size()));
  }
  if (clusters < 1 || clusters > n || n >= std::numeric_limits<std::int32_t>::max()) {
    throw py::value_error("optimal_runs: clusters must be at least 1 and at most the number of points, got " +
                          std::to_string(clusters) + " for " + std::to_string(n) + " points");
  }
  Array<std::int64_t> starts(clusters);
  std::int64_t* to = starts.mutable_data();
  const py::gil_scoped_release release;  // what follows touches no Python object, the return included
  // Not vectors: the choices, hundreds of megabytes of them, are all written before they are read.
  const auto sums = std::make_unique_for_overwrite<double[]>(OptimalRunsSums(n));
  const auto choices = std::make_unique_for_overwrite<std::int32_t[]>(OptimalRunsChoices(n, clusters));
  OptimalRuns(weight.data(), moment.data(), square.data(), n, clusters, sums.get(), choices.get(), to);
  return starts;
}

template <typename T>
Array<std::uint8_t> CodesOf(const Array<T>& values, const Array<T>& thresholds) {
  if (thresholds.size() > kMostThresholds) {
    throw py::value_error("threshold_codes: thresholds must be at most 255, got " + std::to_string(thresholds.size()));
  }
  Array<std::uint8_t> codes(values.size());
  std::uint8_t* to = codes.mutable_data();
  const py::gil_scoped_release release;
  ThresholdCodes(values.data(), values.size(), thresholds.data(), thresholds.size(), to);
  return codes;
}

}  // namespace

void BindLineKmeans(py::module_& m) {
  m.def("optimal_runs", &Runs);
  m.def("threshold_codes", &CodesOf<float>);
  m.def("threshold_codes", &CodesOf<double>);
}

}  // namespace tersetorch
