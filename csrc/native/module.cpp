// tersetorch._native: what Python needs of the native code where no tensor is involved.
#include <pybind11/pybind11.h>

#include "kernels/common/cpu_isa.h"
#include "native/codec.h"
#include "native/line_kmeans.h"
#include "native/rates.h"
#include "native/vector_kmeans.h"

namespace py = pybind11;

namespace tersetorch {
namespace {

py::list CpuLevels() {
  py::list names;
  for (int level = 0; level <= static_cast<int>(ProcessCpuIsa().detected); ++level) {
    names.append(CpuIsaName(static_cast<CpuIsa>(level)));
  }
  return names;
}

py::dict BuildFacts() {
  py::dict facts;
#ifdef __clang__
  facts["compiler"] = __VERSION__;  // names itself
#else
  facts["compiler"] = "GCC " __VERSION__;
#endif
  facts["build_type"] = TERSETORCH_BUILD_TYPE;
  facts["torch"] = TERSETORCH_BUILD_TORCH;
  // The oldest torch that has everything the ops call.
  facts["torch_abi"] = TERSETORCH_BUILD_TORCH_ABI;
  // Both empty where the CUDA kernels were not built.
  facts["cuda_compiler"] = TERSETORCH_BUILD_CUDA_COMPILER;
  facts["cuda_architectures"] = py::str(TERSETORCH_BUILD_CUDA_ARCHITECTURES).attr("split")();
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
  BindCodec(m);
  BindLineKmeans(m);
  BindRates(m);
  BindVectorKmeans(m);
}
