// tersetorch._native: what Python needs of the native code where no tensor is involved.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "codec/bit_stream.h"
#include "kernels/common/cpu_isa.h"

namespace py = pybind11;

namespace tersetorch {
namespace {

using Codes = py::array_t<std::uint32_t, py::array::c_style>;

void CheckWidth(const char* function, int width) {
  if (width < 1 || width > kMaxBitWidth) {
    throw py::value_error(std::string(function) + ": width must lie in [1, 32], got " + std::to_string(width) +
                          "; name the bits of one code");
  }
}

py::bytes WriteBits(const Codes& codes, int width) {
  CheckWidth("write_bits", width);
  BitWriter writer;
  for (py::ssize_t i = 0; i < codes.size(); ++i) {
    const std::uint32_t code = codes.data()[i];
    if (std::uint64_t{code} >> width != 0) {
      throw py::value_error("write_bits: codes must fit " + std::to_string(width) + " bits, got " +
                            std::to_string(code) + "; raise width");
    }
    writer.Write(code, width);
  }
  const std::vector<std::uint8_t> stream = writer.Finish();
  return py::bytes(reinterpret_cast<const char*>(stream.data()), stream.size());
}

Codes ReadBits(const py::bytes& data, int width, py::ssize_t count) {
  CheckWidth("read_bits", width);
  const std::string_view stream = data;
  // Compared before allocating: a damaged count must not ask for memory that the stream cannot fill.
  if (count < 0 || count > static_cast<py::ssize_t>(stream.size()) * 8 / width) {
    throw py::value_error("read_bits: data must hold count codes, got " + std::to_string(stream.size()) +
                          " bytes for " + std::to_string(count) + " codes of " + std::to_string(width) +
                          " bits; the stream is cut short");
  }
  Codes codes(count);
  BitReader reader(reinterpret_cast<const std::uint8_t*>(stream.data()), stream.size());
  for (py::ssize_t i = 0; i < count; ++i) codes.mutable_data()[i] = reader.Read(width).value();
  if (!reader.OnlyPaddingLeft()) {
    throw py::value_error("read_bits: data must end after the last code in zero bits, got " +
                          std::to_string(stream.size()) + " bytes; pass the stream alone");
  }
  return codes;
}

py::list CpuLevels() {
  py::list names;
  for (int level = 0; level <= static_cast<int>(ProcessCpuIsa().detected); ++level) {
    names.append(CpuIsaName(static_cast<CpuIsa>(level)));
  }
  return names;
}

py::dict BuildFacts() {
  py::dict facts;
  facts["compiler"] = __VERSION__;
  facts["torch"] = TERSETORCH_BUILD_TORCH;
  return facts;
}

}  // namespace
}  // namespace tersetorch

PYBIND11_MODULE(_native, m) {
  using namespace tersetorch;
  const CpuIsaChoice& isa = ProcessCpuIsa();
  if (isa.problem[0] != '\0') throw py::import_error(isa.problem);

  m.def("cpu_detected", [] { return CpuIsaName(ProcessCpuIsa().detected); });
  m.def("cpu_active", [] { return CpuIsaName(ProcessCpuIsa().active); });
  m.def("cpu_forced", [] { return ProcessCpuIsa().forced; });
  m.def("cpu_levels", &CpuLevels);
  m.def("build_facts", &BuildFacts);
  m.def("write_bits", &WriteBits, py::arg("codes").noconvert(), py::arg("width"));
  m.def("read_bits", &ReadBits, py::arg("data"), py::arg("width"), py::arg("count"));
}
