#include "native/vector_kmeans.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>

#include "kernels/vector_kmeans/vector_kmeans.h"

namespace py = pybind11;

namespace tersetorch {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void CheckDimensions(const char* function, const char* argument, const py::array& array, std::int64_t dimensions) {
  if (array.ndim() != dimensions) {
    throw py::value_error(std::string(function) + ": " + argument + " must have " + std::to_string(dimensions) +
                          " dimensions, got " + std::to_string(array.ndim()));
  }
}

// draws [problems, clusters], or nullptr where centres [problems, clusters, width] say where to start.
py::tuple Solve(const char* function, const Array<float>& points, const double* draws, Array<float> centres,
                std::int64_t iterations, std::int64_t exchanges) {
  const std::int64_t problems = points.shape(0), count = points.shape(1), width = points.shape(2);
  const std::int64_t clusters = centres.shape(1);
  if (clusters < 1 || clusters > count || count >= std::numeric_limits<std::int32_t>::max() || width < 1 ||
      centres.shape(0) != problems || centres.shape(2) != width) {
    throw py::value_error(std::string(function) + ": clusters must be at least 1 and at most the number of points, " +
                          "for as many problems, got " + std::to_string(clusters) + " for " + std::to_string(count) +
                          " points of " + std::to_string(width) + " numbers");
  }
  Array<std::int32_t> codes({problems, count});
  Array<double> errors(problems);
  float* const to_centres = centres.mutable_data();
  std::int32_t* const to_codes = codes.mutable_data();
  double* const to_errors = errors.mutable_data();
  {
    const py::gil_scoped_release release;
    const auto scratch = std::make_unique_for_overwrite<double[]>(VectorKmeansScratch(count, width, clusters));
    for (std::int64_t p = 0; p < problems; ++p) {
      to_errors[p] = VectorKmeans({points.data() + p * count * width, count, width, clusters,
                                   draws == nullptr ? nullptr : draws + p * clusters, iterations, exchanges,
                                   to_codes + p * count, to_centres + p * clusters * width, scratch.get()});
    }
  }
  return py::make_tuple(codes, centres, errors);
}

py::tuple Cluster(const Array<float>& points, const Array<double>& draws, std::int64_t iterations,
                  std::int64_t exchanges) {
  const char* function = "vector_kmeans";
  CheckDimensions(function, "points", points, 3);
  CheckDimensions(function, "draws", draws, 2);
  if (!std::all_of(draws.data(), draws.data() + draws.size(), [](double draw) { return draw >= 0 && draw < 1; })) {
    throw py::value_error("vector_kmeans: draws must lie in [0, 1)");
  }
  Array<float> centres({draws.shape(0), draws.shape(1), points.shape(2)});
  return Solve(function, points, draws.data(), std::move(centres), iterations, exchanges);
}

py::tuple Refine(const Array<float>& points, const Array<float>& centres, std::int64_t iterations) {
  const char* function = "vector_lloyd";
  CheckDimensions(function, "points", points, 3);
  CheckDimensions(function, "centres", centres, 3);
  Array<float> moved({centres.shape(0), centres.shape(1), centres.shape(2)});
  std::copy_n(centres.data(), centres.size(), moved.mutable_data());
  return Solve(function, points, nullptr, std::move(moved), iterations, 0);
}

}  // namespace

void BindVectorKmeans(py::module_& m) {
  m.def("vector_kmeans", &Cluster);
  m.def("vector_lloyd", &Refine);
}

}  // namespace tersetorch
