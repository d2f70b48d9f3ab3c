// The machine rates' part of the pybind11 module.
#pragma once

#include <pybind11/pybind11.h>

namespace tersetorch {

void BindRates(pybind11::module_& m);

}  // namespace tersetorch
