#include "native/rates.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/common/cpu_isa.h"
#include "kernels/machine_rates/machine_rates.h"

namespace py = pybind11;

namespace tersetorch {
namespace {

using Buffer = py::array_t<std::uint8_t, py::array::c_style>;
using Clock = std::chrono::steady_clock;

constexpr const char* kArithmeticNames[kArithmetics] = {"float32", "bfloat16", "int8", "binary"};
constexpr double kLongest = 60;  // seconds

const MachineRateLoops& LoopsOf(const char* function, const std::string& level) {
  for (int i = 0; i <= static_cast<int>(ProcessCpuIsa().detected); ++i) {
    if (level == CpuIsaName(static_cast<CpuIsa>(i))) return MachineRates(static_cast<CpuIsa>(i));
  }
  throw py::value_error(std::string(function) + ": level must be one of cpu_levels(), got " + level);
}

void CheckSeconds(const char* function, double seconds) {
  if (!(seconds > 0 && seconds <= kLongest)) {
    throw py::value_error(std::string(function) + ": seconds must lie in (0, 60], got " + std::to_string(seconds));
  }
}

// Calls run(passes) for about `seconds` and returns passes a second.
template <typename Run>
double PassesPerSecond(double seconds, Run run) {
  const py::gil_scoped_release release;
  run(1);  // wakes the vector units, brings the buffer near
  std::int64_t passes = 1, done = 0;
  const Clock::time_point start = Clock::now();
  for (double elapsed = 0;;) {
    run(passes);
    done += passes;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    if (elapsed >= seconds) return static_cast<double>(done) / elapsed;
    // Few looks at the clock, yet no more than a quarter too long.
    passes = std::clamp(static_cast<std::int64_t>(static_cast<double>(done) * (seconds / elapsed - 1) / 4),
                        std::int64_t{1}, 8 * passes);
  }
}

double ArithmeticRate(const std::string& arithmetic, const std::string& level, double seconds) {
  CheckSeconds("arithmetic_rate", seconds);
  const MachineRateLoops& loops = LoopsOf("arithmetic_rate", level);
  const auto* found = std::find(std::begin(kArithmeticNames), std::end(kArithmeticNames), arithmetic);
  if (found == std::end(kArithmeticNames)) {
    throw py::value_error("arithmetic_rate: arithmetic must be float32, bfloat16, int8 or binary, got " + arithmetic);
  }
  const auto i = found - std::begin(kArithmeticNames);
  if (loops.operations[i] == 0) return 0;
  return static_cast<double>(loops.operations[i]) * PassesPerSecond(seconds, loops.arithmetic[i]);
}

double ReadRate(const Buffer& buffer, const std::string& level, double seconds) {
  CheckSeconds("read_rate", seconds);
  const MachineRateLoops& loops = LoopsOf("read_rate", level);
  const std::int64_t blocks = buffer.nbytes() / kRatesReadBlock;
  if (blocks == 0) {
    throw py::value_error("read_rate: buffer must hold at least 1024 bytes, got " + std::to_string(buffer.nbytes()));
  }
  const void* data = buffer.data();
  return static_cast<double>(blocks * kRatesReadBlock) *
         PassesPerSecond(seconds, [&](std::int64_t passes) { loops.read(data, blocks, passes); });
}

void Read(const Buffer& buffer) {
  const std::int64_t blocks = buffer.nbytes() / kRatesReadBlock;
  const void* data = buffer.data();
  const py::gil_scoped_release release;
  MachineRates(ProcessCpuIsa().active).read(data, blocks, 1);
}

}  // namespace

void BindRates(py::module_& m) {
  m.def("arithmetic_rate", &ArithmeticRate, py::arg("arithmetic"), py::arg("level"), py::arg("seconds"));
  m.def("read_rate", &ReadRate, py::arg("buffer"), py::arg("level"), py::arg("seconds"));
  m.def("read", &Read, py::arg("buffer"));
}

}  // namespace tersetorch
