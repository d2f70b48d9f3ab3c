// The part of the pybind11 module that clusters short vectors.
#pragma once

#include <pybind11/pybind11.h>

namespace tersetorch {

void BindVectorKmeans(pybind11::module_& m);

}  // namespace tersetorch
