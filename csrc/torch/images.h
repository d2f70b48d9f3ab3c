// Images [N, C, H, W], as convolutions take them: checks, and their memory formats.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/sparse_conv2d/sparse_conv2d.h"
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"
#include "torch/samples.h"

namespace tersetorch {

using Ints = std::vector<std::int64_t>;

inline void CheckPair(const char* op, const Ints& pair, const char* name, std::int64_t least) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();  // so that products of them fit int64
  const auto fits = [&](std::int64_t n) { return least <= n && n <= kMost; };
  STD_TORCH_CHECK(pair.size() == 2 && fits(pair[0]) && fits(pair[1]), op, ": ", name, " must be two numbers from ",
                  least, " to ", kMost, ", got ", pair.size(),
                  " of them or one outside; pass one for the height and one for the width");
}

inline ConvShape ConvShapeOf(const char* op, std::int64_t in_channels, std::int64_t out_channels,
                             const Ints& kernel_size, const Ints& stride, const Ints& dilation, std::int64_t groups) {
  CheckPair(op, kernel_size, "kernel_size", 1);
  CheckPair(op, stride, "stride", 1);
  CheckPair(op, dilation, "dilation", 1);
  STD_TORCH_CHECK(groups >= 1 && in_channels % groups == 0 && out_channels % groups == 0, op,
                  ": groups must divide the channels, got ", groups, " groups of ", in_channels, " channels in and ",
                  out_channels, " out; pass the groups of the weight");
  return {in_channels, out_channels, groups,      kernel_size[0], kernel_size[1],
          stride[0],   stride[1],    dilation[0], dilation[1]};
}

// The dimensions of an image's planes follow each other as channels_last has them, and not as the default has them.
inline bool IsChannelsLast(const Tensor& t) {
  if (t.is_contiguous()) return false;
  std::int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// The size of what a convolution makes of an image.
struct OutputSize {
  OutputSize(const char* op, std::int64_t in_height, std::int64_t in_width, const ConvShape& s, const Ints& padding) {
    CheckPair(op, padding, "padding", 0);
    STD_TORCH_CHECK(in_height + 2 * padding[0] > s.dilation_h * (s.kernel_h - 1) &&
                        in_width + 2 * padding[1] > s.dilation_w * (s.kernel_w - 1),
                    op, ": x must be as large as the kernel, got ", in_height, " x ", in_width,
                    " before padding; pass larger images or more padding");
    height = (in_height + 2 * padding[0] - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
    width = (in_width + 2 * padding[1] - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
    // So that the products of what the caller allocates fit.
    constexpr std::int64_t kMostPixels = std::numeric_limits<std::int32_t>::max();
    STD_TORCH_CHECK(height <= kMostPixels && width <= kMostPixels / std::max<std::int64_t>(1, height), op,
                    ": an image of y must have at most ", kMostPixels, " pixels, got ", height, " x ", width,
                    "; pass less padding");
  }
  std::int64_t height, width;
};

// Images [N, C, H, W], checked, and the sizes of what a convolution makes of them.
struct Images {
  Images(const char* op, const Tensor& x, const ConvShape& s, const Ints& padding, Place place = kCpu)
      : stored_as(DtypeOf(op, x, "x")), count(x.size(0)), height(x.size(2)), width(x.size(3)) {
    const OutputSize out(op, height, width, s, padding);
    out_height = out.height;
    out_width = out.width;
    channels_last = IsChannelsLast(x);
    tensor = channels_last ? x : Contiguous(x);
    // As Usable does, which knows contiguous tensors only.
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
    if (place != kCpu && address % tensor.element_size() != 0) tensor = torch::stable::clone(tensor);
  }

  // Outputs, uninitialised, in the memory format of the images.
  Tensor Outputs(std::int64_t channels) const {
    return torch::stable::empty(
        {count, channels, out_height, out_width}, tensor.scalar_type(), std::nullopt, tensor.device(), std::nullopt,
        channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
  }

  FloatDtype stored_as;
  std::int64_t count, height, width, out_height = 0, out_width = 0;
  bool channels_last = false;
  Tensor tensor;
};

inline void CheckImages(const char* op, const Tensor& x, Place place = kCpu) {
  CheckOn(place, op, x, "x");
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must be [N, C, H, W], got ", x.dim(), "-D; reshape it");
}

inline ConvSteps StepsOf(std::int64_t channels, std::int64_t height, std::int64_t width, bool channels_last) {
  const std::int64_t image = channels * height * width;
  if (channels_last) return {image, 1, width * channels, channels};
  return {image, height * width, width, 1};
}

}  // namespace tersetorch
