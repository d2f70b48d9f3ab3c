// The codec's part of the pybind11 module.
#pragma once

#include <pybind11/pybind11.h>

namespace tersetorch {

void BindCodec(pybind11::module_& m);

}  // namespace tersetorch
