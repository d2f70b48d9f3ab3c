// tersetorch::fixed_conv2d: checks, allocates, splits the work, calls the kernels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "kernels/fixed_matmul/fixed_images.h"
#include "kernels/fixed_matmul/fixed_matmul.h"
#include "kernels/fixed_matmul/fixed_matmul_cuda.h"
#include "torch/cuda.h"
#include "torch/fixed_product.h"
#include "torch/images.h"

namespace tersetorch {
namespace {

constexpr const char* kOp = "fixed_conv2d";

struct Inputs {
  Inputs(Place place, const Tensor& x_of, const Tensor& packed_of, const std::optional<Tensor>& bias_of,
         std::int64_t rows, const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation,
         std::int64_t groups, std::int64_t sum_fraction_bits, std::int64_t integer_bits, std::int64_t fraction_bits,
         ScalarType dtype, bool relu) {
    CheckWhole(kOp, place, x_of, "x");
    CheckImages(kOp, x_of, place);
    const ConvShape shape = ConvShapeOf(kOp, x_of.size(1), rows, kernel_size, stride, dilation, groups);
    const OutputSize out(kOp, x_of.size(2), x_of.size(3), shape, padding);
    const bool channels_last = IsChannelsLast(x_of);
    x = channels_last ? x_of : Usable(place, x_of);
    images = {x_of.size(0), x_of.size(1), x_of.size(2), x_of.size(3), kernel_size[0], kernel_size[1],
              stride[0],    stride[1],    padding[0],   padding[1],   dilation[0],    dilation[1],
              groups,       out.height,   out.width,    channels_last};
    // Before what they multiply to: a padded image, and the weights of a filter.
    constexpr std::int64_t kMost = std::int64_t{1} << 32;
    const std::int64_t wide =
        std::max<std::int64_t>(1, images.PaddedWidth() * std::max<std::int64_t>(1, images.channels));
    STD_TORCH_CHECK(images.PaddedHeight() <= kMost / wide, kOp, ": a padded image must have at most 2^32 numbers, got ",
                    images.PaddedHeight(), " x ", images.PaddedWidth(), " pixels of ", images.channels,
                    "; pass less padding");
    const std::int64_t of_group = images.channels / groups;
    STD_TORCH_CHECK(kernel_size[0] * kernel_size[1] <= kFixedMaxColumns / std::max<std::int64_t>(1, of_group), kOp,
                    ": a filter must have fewer than 2^24 weights, got ", kernel_size[0], " x ", kernel_size[1], " of ",
                    of_group, " channels; pass a smaller kernel");
    weight = FixedWeightOf(kOp, place, packed_of, rows, of_group * kernel_size[0] * kernel_size[1], images.Segments(),
                           groups);
    CheckFits(kOp, *x, weight.wide);
    conversion =
        FixedConversionOf(kOp, place, bias_of, rows, sum_fraction_bits, integer_bits, fraction_bits, dtype, relu);
    y = torch::stable::empty(
        {images.count, rows, out.height, out.width}, dtype, std::nullopt, x->device(), std::nullopt,
        channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
    conversion.args.y = y->mutable_data_ptr();
    conversion.args.y_stride = rows;
  }

  bool x_wide() const { return x->scalar_type() == ScalarType::Short; }

  std::optional<Tensor> x, y;
  FixedImages images{};
  FixedWeightArgs weight;
  FixedConversionArgs conversion;
};

Tensor FixedConv2dOnCpu(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, std::int64_t rows,
                        Ints kernel_size, Ints stride, Ints padding, Ints dilation, std::int64_t groups,
                        std::int64_t sum_fraction_bits, std::int64_t integer_bits, std::int64_t fraction_bits,
                        ScalarType dtype, bool relu) {
  Inputs inputs(kCpu, x, packed, bias, rows, kernel_size, stride, padding, dilation, groups, sum_fraction_bits,
                integer_bits, fraction_bits, dtype, relu);
  if (inputs.y->numel() == 0) return *inputs.y;
  const FixedWeightArgs& weight = inputs.weight;
  const FixedImages& s = inputs.images;
  const auto* from = static_cast<const char*>(inputs.x->const_data_ptr());
  const std::int64_t item = inputs.x_wide() ? 2 : 1, of_image = s.channels * s.height * s.width;
  const FixedProduct product(weight, inputs.x_wide() ? FixedLargest(from, s.count * of_image) : 128);
  const std::int64_t pixel = s.channels * (weight.wide ? 2 : 1), row = s.PaddedWidth() * pixel;
  const std::int64_t plane = s.PaddedHeight() * row, windows = s.Windows(), copies = product.Copies();
  std::vector<std::int64_t> segment_at;
  for (std::int64_t i = 0; i < s.kernel_h; ++i) {
    for (std::int64_t j = 0; j < (s.RowsAreSegments() ? 1 : s.kernel_w); ++j) {
      segment_at.push_back(i * s.dilation_h * row + j * s.dilation_w * pixel);
    }
  }
  // So many images at once that they stay in the second cache level.
  constexpr std::int64_t kBytes = 1 << 20;
  const std::int64_t most = std::clamp<std::int64_t>(kBytes / std::max<std::int64_t>(1, copies * plane), 1, s.count);
  Scratch scratch(copies * most * (8 * windows + plane) + kFixedWord);
  auto* sample_at = scratch.Data<std::int64_t>();
  for (std::int64_t n = 0, i = 0; n < most * s.out_height; ++n) {
    const std::int64_t start = n / s.out_height * copies * plane + n % s.out_height * s.stride_h * row;
    for (std::int64_t j = 0; j < s.out_width; ++j) {
      for (std::int64_t copy = 0; copy < copies; ++copy) {
        sample_at[i++] = start + j * s.stride_w * pixel + copy * plane;
      }
    }
  }
  char* to = scratch.Data<char>() + 8 * copies * most * windows;
  __builtin_memset(to + copies * most * plane, 0, kFixedWord);  // past the last pixel, where weights are 0
  const std::int64_t bytes = FixedBytes(inputs.conversion.args.as);
  for (std::int64_t n = 0; n < s.count; n += most) {
    const std::int64_t count = std::min(most, s.count - n);
    const FixedImageArgs own{from + n * of_image * item, inputs.x_wide(), weight.wide, product.split, s, to};
    ParallelFor(count * s.PaddedHeight(), GrainItems(1 + s.PaddedWidth() * s.channels / 8),
                [&](std::int64_t begin, std::int64_t end) { FixedImageRows(own, begin, end); });
    product.Run(to, sample_at, segment_at.data(), pixel / s.groups, count * windows, inputs.conversion,
                [&](std::int64_t first, std::int64_t samples, std::int64_t row_of_y, FixedConvertArgs convert) {
                  if (s.channels_last) return ConvertFrom(convert, (n * windows + first) * rows + row_of_y, samples);
                  alignas(64) char values[4 * kFixedBlock * kFixedTile];
                  auto* y = static_cast<char*>(convert.y);
                  convert.y = values;
                  convert.y_stride = kFixedTile;
                  FixedConvert(convert, 0, samples);
                  for (std::int64_t i = 0; i < samples;) {
                    const std::int64_t image = n + (first + i) / windows, window = (first + i) % windows;
                    const std::int64_t some = std::min(samples - i, windows - window);
                    FixedPlanes(values + i * kFixedTile * bytes, kFixedTile, some, convert.rows, bytes,
                                y + ((image * rows + row_of_y) * windows + window) * bytes, windows);
                    i += some;
                  }
                });
  }
  return *inputs.y;
}

#ifdef TERSETORCH_CUDA

Tensor FixedConv2dOnCuda(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, std::int64_t rows,
                         Ints kernel_size, Ints stride, Ints padding, Ints dilation, std::int64_t groups,
                         std::int64_t sum_fraction_bits, std::int64_t integer_bits, std::int64_t fraction_bits,
                         ScalarType dtype, bool relu) {
  const CudaCall call(kOp, x, "x");
  Inputs inputs(call.place(), x, packed, bias, rows, kernel_size, stride, padding, dilation, groups, sum_fraction_bits,
                integer_bits, fraction_bits, dtype, relu);
  if (inputs.y->numel() == 0) return *inputs.y;
  const FixedImages& s = inputs.images;
  const std::int64_t samples = s.count * s.Windows();
  STD_TORCH_CHECK(
      samples <= std::numeric_limits<std::int32_t>::max() && rows <= std::numeric_limits<std::int32_t>::max(), kOp,
      ": y must have fewer than 2^31 pixels and filters on a GPU, got ", samples, " and ", rows,
      "; pass fewer images at once");
  const Tensor sums = torch::stable::new_empty(*inputs.x, {samples, rows}, ScalarType::Long);
  const FixedCudaArgs args{inputs.x->const_data_ptr(),
                           inputs.x_wide(),
                           inputs.weight.packed,
                           inputs.weight.wide,
                           samples,
                           0,
                           rows,
                           sums.mutable_data_ptr<std::int64_t>(),
                           s};
  FixedConvertArgs& conversion = inputs.conversion.args;
  conversion.sums = args.sums;
  conversion.sums_stride = rows;
  conversion.rows = rows;
  conversion.added = inputs.conversion.bias;
  call.Check(FixedConv2dCuda(args, call.Stream()));
  call.Check(FixedConvertCuda(conversion, samples, s.channels_last ? 1 : s.Windows(), call.Stream()));
  return *inputs.y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) { m.impl("fixed_conv2d", TORCH_BOX(&FixedConv2dOnCpu)); }

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("fixed_conv2d", TORCH_BOX(&FixedConv2dOnCuda));
#else
  m.impl("fixed_conv2d", &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
