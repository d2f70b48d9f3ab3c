// Flattened convolutions: for each map three 1-D filters one after the other, each with its bias; in stages that follow
// each other.
//
//   lateral     l[m, h, w] = a[m] + sum_c L[m, c] * x[c, h, w]                                      m < rank * F
//   vertical    v[m, i, w] = b[m] + sum_k V[m, k] * l[m, i * stride_h - pad_h + k, w]
//   horizontal  y[f, i, j] = d[f] + sum_r sum_k H[r * F + f, k] * v[r * F + f, i, j * stride_w - pad_w + k]
//
// l and v count as 0 outside their borders, where their biases do not reach. With rank 1 and a = b = 0 this is the
// convolution with the filters L[f, c] * V[f, i] * H[f, j].
//
// Layout: the numbers of a stage are one array, in panels of 16 maps; panel r * P + p has the maps r * F + [16 p, 16 p
//         + 16), with P = ceil(F / 16), and zeros beyond F. Array after array, float32, each [rank * P][n][16]: L of
//         in_channels, a of 1, V of kernel_h, b of 1, H of kernel_w; then d [P][16].
// Method: lanes are maps. Pixels are multiplied some rows at a time, straight from an image with the channels last,
//         others after they are laid out so. The rows of l go into a ring of as many as the vertical filters reach; a
//         row of v stays in the first cache level, a panel at a time, and becomes a row of y, or of the pixels of the
//         next stage. So nothing but x and y goes through memory, and no row is computed twice but where threads meet.
// Bound:  C + kernel_h + kernel_w multiply-adds a number of y, of which L's run at the rate of registers.
// Order:  every sum has one order, whatever the threads, rows and levels; only fused multiply-adds differ from scalar.
//
// Source: Jin, Dundar, Culurciello, Flattened convolutional neural networks (2014).
#pragma once

#include <cstdint>

#include "kernels/common/everywhere.h"
#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

inline constexpr std::int64_t kFlatLanes = 16;      // maps of a panel
inline constexpr std::int64_t kFlatMaxStages = 8;   // of one chain
inline constexpr std::int64_t kFlatMaxKernel = 63;  // taps of a 1-D filter

struct FlatStage {
  const float* packed;
  std::int64_t in_channels, out_channels, rank;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  std::int64_t height, width;          // of what it takes
  std::int64_t out_height, out_width;  // of what it gives

  TERSETORCH_EVERYWHERE std::int64_t Panels() const { return (out_channels + kFlatLanes - 1) / kFlatLanes; }
  TERSETORCH_EVERYWHERE std::int64_t Vectors() const {
    return rank * Panels() * (in_channels + kernel_h + kernel_w + 2) + Panels();
  }
};

// An image: pixels of channels side by side, `step` numbers from one to the next, or channels of pixels side by side,
// `step` from one to the next.
template <typename T>
struct FlatImage {
  T* data;
  FloatDtype stored_as;
  bool channels_last;
  std::int64_t step;
};

struct FlatConvArgs {
  FlatStage stages[kFlatMaxStages];
  std::int64_t count;  // of them
  FlatImage<const void> x;
  FlatImage<void> y;
  bool relu;  // whether negative results become 0; NaN stays NaN
};

// Bytes that FlatConv2d needs beside, aligned to 64.
TERSETORCH_API std::int64_t FlatScratchBytes(const FlatConvArgs& args) noexcept;

// Rows [row_begin, row_end) of the last stage's output for one image; of the panels [panel_begin, panel_end) of maps,
// which are all unless there is one stage.
TERSETORCH_API void FlatConv2d(const FlatConvArgs& args, std::int64_t row_begin, std::int64_t row_end,
                               std::int64_t panel_begin, std::int64_t panel_end, void* scratch) noexcept;

// ---- what a level provides

// to[i * step + c] = channel c of pixel first + i, for i < count.
struct FlatLoadArgs {
  FlatImage<const void> x;
  std::int64_t channels, first, count;
  float* to;
  std::int64_t step;  // at least channels, rounded up to whole panels
};

// The lateral filters of some panels: to[p * panel_step + i * 16 + lane] for pixel i < count of x, `step` apart.
struct FlatLateralArgs {
  const float* x;
  std::int64_t step, count, channels;
  const float* weights;  // [panels][channels][16]
  const float* bias;     // [panels][16]
  std::int64_t panels;
  float* to;
  std::int64_t panel_step;
};

// Some rows of y, to[i * row_step + j * step + p * 16 + lane] for row i < count and panel p < panels.
struct FlatPlanesArgs {
  // Row k under the vertical filters of row i of y is rows[i * kernel_h + k], [rank * panels] arrays [width][16] that
  // begin panel_step apart; null stands for zeros in all of them.
  const float* const* rows;
  std::int64_t count;
  const float* zeros;  // [width][16]
  std::int64_t panel_step, panels, rank;
  std::int64_t kernel_h, kernel_w, stride_w, pad_w, width, out_width;
  // From the first panel on; those of the next rank begin rank_panels panels later.
  const float *vertical, *vertical_bias, *horizontal, *bias;
  std::int64_t rank_panels;
  bool relu;
  float* to;
  std::int64_t row_step, step;
};

// y[pixel first + i, channel] = from[i * step + channel], for i < count and channels [0, channels).
struct FlatStoreArgs {
  const float* from;
  std::int64_t step, first, count, channels;
  FlatImage<void> y;
};

struct FlatKernels {
  void (*load)(const FlatLoadArgs&) noexcept;
  void (*lateral)(const FlatLateralArgs&) noexcept;
  void (*planes)(const FlatPlanesArgs&) noexcept;
  void (*store)(const FlatStoreArgs&) noexcept;
};

extern const FlatKernels kFlatScalar, kFlatAvx2, kFlatAvx512;

void FlatConv2d(const FlatKernels& kernels, const FlatConvArgs& args, std::int64_t row_begin, std::int64_t row_end,
                std::int64_t panel_begin, std::int64_t panel_end, void* scratch) noexcept;

}  // namespace tersetorch
