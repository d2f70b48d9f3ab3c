// The part of the pybind11 module that clusters numbers on a line.
#pragma once

#include <pybind11/pybind11.h>

namespace tersetorch {

void BindLineKmeans(pybind11::module_& m);

}  // namespace tersetorch
