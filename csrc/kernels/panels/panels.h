// Samples transposed in panels, so that one weight multiplies consecutive numbers.
//
// Math:   panel[c][n] = x[n][c] for n < samples, and zero for samples <= n < width. A copy: nothing is rounded.
// Layout: x row-major [samples, features], float32 or bfloat16; panel float32 [features][width], width 1, 8, 16, 32
//         or 64.
// Source: Elsen et al., Fast Sparse ConvNets (2019), section 3, with samples in place of pixels.
//
// Single-threaded; the caller may split the features. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

struct PanelPackArgs {
  const void* x;  // [samples, features]
  FloatDtype stored_as;
  std::int64_t samples, features;  // samples <= width
  float* panel;                    // [features, width]
  std::int64_t width;
};

// Features [feature_begin, feature_end) of the panel.
TERSETORCH_API void PackPanel(const PanelPackArgs& args, std::int64_t feature_begin, std::int64_t feature_end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
using PackPanelFunction = void (*)(const PanelPackArgs&, std::int64_t, std::int64_t) noexcept;
extern const PackPanelFunction kPackPanelScalar;
extern const PackPanelFunction kPackPanelAvx2;
extern const PackPanelFunction kPackPanelAvx512;

}  // namespace tersetorch
