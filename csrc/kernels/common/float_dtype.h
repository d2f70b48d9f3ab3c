// How an array of floating point numbers is stored.
#pragma once

namespace tersetorch {

enum class FloatDtype : int { kFloat32, kBFloat16 };

}  // namespace tersetorch
