// tersetorch::codebook_conv2d: checks, allocates, splits the work, calls the kernels.
#include "kernels/codebook_conv2d/codebook_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "kernels/codebook_conv2d/codebook_conv2d_cuda.h"
#include "kernels/codebook_matmul/codebook_matmul.h"
#include "kernels/panels/panels.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"
#include "torch/codebook_weight.h"
#include "torch/common.h"
#include "torch/cuda.h"
#include "torch/images.h"
#include "torch/samples.h"

namespace tersetorch {
namespace {

// Neighbouring outputs whose windows make one panel.
struct Outputs {
  std::int64_t first, count, width;
};

// Few outputs beyond whole vectors have a panel of their own, which costs less than one more vector.
std::vector<Outputs> Cut(std::int64_t outputs) {
  constexpr std::int64_t kVector = 16, kFew = 4;
  std::vector<Outputs> panels;
  std::int64_t first = 0;
  const auto add = [&](std::int64_t count, std::int64_t width) {
    panels.push_back({first, count, width});
    first += count;
  };
  while (outputs - first >= kCodebookMaxWidth) add(kCodebookMaxWidth, kCodebookMaxWidth);
  const std::int64_t whole = (outputs - first) / kVector * kVector, rest = outputs - first - whole;
  if (whole > 0 && rest <= kFew) add(whole, whole);
  const std::int64_t left = outputs - first;
  std::int64_t width = 1;
  while (width < left && width < kCodebookFewSamples) width *= 2;
  if (left > 0) add(left, left <= kCodebookFewSamples ? width : Blocks(left, kVector) * kVector);
  return panels;
}

// The weight of a convolution, a row for each filter, and the shape that it is for.
struct Filters {
  Filters(const char* op, const Tensor& x, const Tensor& codes, const Tensor& codebook, std::int64_t column_block,
          const Ints& kernel_size, const Ints& stride, const Ints& dilation, std::int64_t groups, Place place)
      : shape(ConvShapeOf(op, x.size(1), codes.dim() == 2 ? codes.size(0) : 0, kernel_size, stride, dilation, groups)),
        weight(CodedWeightOf(op, place, codes, codebook, CodedWidth(op, Columns(op, shape), column_block))) {}

  static std::int64_t Columns(const char* op, const ConvShape& s) {
    constexpr std::int64_t kMostTaps = std::numeric_limits<std::int32_t>::max();
    const std::int64_t taps = s.kernel_h * s.kernel_w, channels = s.in_channels / s.groups;
    STD_TORCH_CHECK(taps <= kMostTaps && channels <= kMostTaps, op, ": a filter must have at most ", kMostTaps,
                    " taps and channels, got ", taps, " and ", channels, "; keep this layer dense");
    return channels * taps;
  }

  ConvShape shape;
  CodedWeight weight;
};

Tensor ConvOnCpu(const Tensor& x, const Tensor& codes, const Tensor& codebook, const std::optional<Tensor>& bias,
                 std::int64_t column_block, Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                 std::int64_t groups, bool relu, std::string mode) {
  constexpr const char* kOp = "codebook_conv2d";
  CheckImages(kOp, x);
  const Filters filters(kOp, x, codes, codebook, column_block, kernel_size, stride, dilation, groups, kCpu);
  const ConvShape& s = filters.shape;
  const CodebookWeight& w = filters.weight.args;
  const CodebookMode how = CodebookModeOf(kOp, mode, w.columns);
  const Images input(kOp, x, s, padding);
  const Bias of_filters(kOp, bias, w.rows);
  const Tensor y = input.Outputs(w.rows);
  if (y.numel() == 0) return y;
  const bool integer = how == CodebookMode::kInt8;
  const int bits = CodeBits(w.entries);

  // Without neighbours an image is a line. The stride between the columns of one column is of no use, and may be huge.
  const bool line = s.kernel_h * s.kernel_w * s.stride_h * s.stride_w == 1 && padding[0] + padding[1] == 0;
  const std::int64_t height = line ? 1 : input.height, width = line ? input.height * input.width : input.width;
  const std::int64_t out_width = line ? width : input.out_width, pixels = input.out_height * input.out_width;
  const CodebookWindowShape shape{s.kernel_h,   s.kernel_w,  s.stride_h, out_width == 1 ? 1 : s.stride_w,
                                  s.dilation_h, s.dilation_w};

  // Images that windows cannot be read from are laid out anew, so many at a time as fill panels for all threads.
  const bool transposed = input.channels_last;
  const bool plain = !integer && padding[0] + padding[1] == 0 && shape.stride_w == 1;
  const bool padded = !plain || (!transposed && input.stored_as != FloatDtype::kFloat32);
  const std::int64_t phase = padded ? CodebookPhaseColumns(width, padding[1], shape.stride_w) : 0;
  const std::int64_t row = padded ? phase * shape.stride_w : width, rows = height + (padded ? 2 * padding[0] : 0);
  constexpr std::int64_t kMostNumbers = std::numeric_limits<std::int32_t>::max();
  STD_TORCH_CHECK(rows <= kMostNumbers / row / std::max<std::int64_t>(1, s.in_channels), kOp,
                  ": an image of x with its padding must have at most ", kMostNumbers, " numbers, got ", s.in_channels,
                  " x ", rows, " x ", row, "; pass less padding");
  const std::int64_t image = s.in_channels * height * width, stored_image = s.in_channels * rows * row;
  const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
  const std::int64_t enough = Blocks(8 * kCodebookMaxWidth * threads, pixels);
  const std::int64_t wave = transposed || padded ? std::min(input.count, enough) : input.count;
  Scratch planes(transposed ? wave * image * 4 : 0);
  Scratch stored(padded ? wave * stored_image * (integer ? 1 : 4) + kCodebookWindowSlack : 0);

  std::vector<float> scales(integer ? input.count : 0), inverses(scales.size());
  float table_scale = 0, table_inverse = 0;
  const std::int64_t item_bytes = input.stored_as == FloatDtype::kFloat32 ? 4 : 2;
  const auto* from = static_cast<const char*>(input.tensor.const_data_ptr());
  if (integer) {
    ParallelFor(input.count, GrainItems(image / 8), [&](std::int64_t begin, std::int64_t end) {
      SampleScales({from, input.stored_as, image, scales.data(), inverses.data()}, begin, end);
    });
    SampleScales({w.codebook, FloatDtype::kFloat32, filters.weight.codebook->numel(), &table_scale, &table_inverse}, 0,
                 w.per_row ? 0 : 1);
  }

  const std::int64_t of_group = w.rows / groups, channels = s.in_channels / groups;
  const std::int64_t chunks = filters.weight.row_bytes / kCodeChunkBytes;
  SharedCodebookStatus status;
  for (std::int64_t first = 0; first < input.count; first += wave) {
    const std::int64_t images = std::min(wave, input.count - first);
    const char* of_wave = from + first * image * item_bytes;
    FloatDtype stored_as = input.stored_as;
    if (transposed) {
      ParallelRanges(images, height * width, GrainItems(s.in_channels / 4),
                     [&](std::int64_t n, std::int64_t begin, std::int64_t end) {
                       ConvPlanes({of_wave + n * image * item_bytes, stored_as, true, s.in_channels, height * width,
                                   planes.Data<float>() + n * image},
                                  begin, end);
                     });
      of_wave = planes.Data<char>();
      stored_as = FloatDtype::kFloat32;
    }
    if (padded) {
      const std::int64_t bytes = stored_as == FloatDtype::kFloat32 ? 4 : 2;
      ParallelRanges(images, s.in_channels, GrainItems(rows * row / 4),
                     [&](std::int64_t n, std::int64_t begin, std::int64_t end) {
                       CodebookPad({of_wave + n * image * bytes, stored_as, s.in_channels, height, width, padding[0],
                                    padding[1], shape, integer, integer ? inverses[first + n] : 0.0f,
                                    stored.Data<char>() + n * stored_image * (integer ? 1 : 4)},
                                   begin, end);
                     });
      of_wave = stored.Data<char>();
    }

    const std::vector<Outputs> panels = Cut(images * pixels);
    const std::int64_t first_image = first * w.rows * pixels;
    // The outputs of one panel for the filters of one group.
    const auto run = [&](std::int64_t g, const Outputs& p, char* panel) {
      float of_sample[kCodebookMaxWidth] = {};
      std::int32_t sums[kCodebookMaxWidth] = {};
      std::int64_t places[kCodebookMaxWidth];
      for (std::int64_t n = 0; n < p.count; ++n) {
        const std::int64_t output = p.first + n;
        if (integer) of_sample[n] = scales[first + output / pixels];
        places[n] = first_image + output / pixels * w.rows * pixels + output % pixels;
      }
      const CodebookWindowsArgs windows{of_wave + g * channels * rows * row * (integer ? 1 : 4),
                                        stored_image,
                                        rows * row,
                                        row,
                                        phase,
                                        shape,
                                        channels,
                                        line ? 1 : input.out_height,
                                        out_width,
                                        p.first,
                                        p.count,
                                        w.column_block,
                                        bits,
                                        how,
                                        panel,
                                        p.width,
                                        sums};
      ParallelFor(chunks, GrainItems(512 / bits * p.width / 4),
                  [&](std::int64_t begin, std::int64_t end) { CodebookPackWindows(windows, begin, end); });
      // With the channels last an output's filters lie side by side, as codebook_matmul has it.
      const std::int64_t y_first = transposed ? first_image + p.first * w.rows : 0;
      CodebookMatmulArgs args{w,
                              how,
                              panel,
                              p.width,
                              p.count,
                              of_sample,
                              sums,
                              table_scale,
                              table_inverse,
                              of_filters.data,
                              relu,
                              static_cast<char*>(y.mutable_data_ptr()) + y_first * item_bytes,
                              input.stored_as,
                              nullptr};
      if (!transposed) args.places = places, args.place_step = pixels;
      const bool few = p.width <= kCodebookFewSamples;
      // Rows of a tile are 6, 8 or 12; threads get equally many.
      const std::int64_t parts = Blocks(of_group, kCodebookRows * threads) * threads;
      const std::int64_t block = few ? 16 : std::min(kCodebookRows, Blocks(Blocks(of_group, parts), 12) * 12);
      ParallelFor(Blocks(of_group, block), GrainItems(block * w.columns * (p.width / 2 + 1) / 16),
                  [&](std::int64_t begin, std::int64_t end) {
                    Scratch memory(few ? 0 : kCodebookSumRows * p.width * 4);
                    CodebookMatmulArgs own = args;
                    own.sums = memory.Data<float>();
                    for (std::int64_t b = begin; b < end; ++b) {
                      status.Report(CodebookMatmul(own, g * of_group + b * block,
                                                   g * of_group + std::min(of_group, (b + 1) * block)));
                    }
                  });
    };
    const auto count = static_cast<std::int64_t>(panels.size()), tasks = groups * count;
    const std::int64_t grain = tasks < 2 * threads ? tasks : 1;
    ParallelFor(tasks, grain, [&](std::int64_t begin, std::int64_t end) {
      Scratch memory(CodebookPanelBytes(filters.weight.row_bytes, bits, how, panels[0].width));
      for (std::int64_t task = begin; task < end; ++task) run(task / count, panels[task % count], memory.Data<char>());
    });
  }
  status.Raise(kOp, w.entries);
  return y;
}

#ifdef TERSETORCH_CUDA

Tensor ConvOnCuda(const Tensor& x, const Tensor& codes, const Tensor& codebook, const std::optional<Tensor>& bias,
                  std::int64_t column_block, Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                  std::int64_t groups, bool relu, std::string mode) {
  constexpr const char* kOp = "codebook_conv2d";
  const CudaCall call(kOp, x, "x");
  const Place place = call.place();
  CheckImages(kOp, x, place);
  const Filters filters(kOp, x, codes, codebook, column_block, kernel_size, stride, dilation, groups, place);
  const ConvShape& s = filters.shape;
  const CodebookWeight& w = filters.weight.args;
  const Images images(kOp, x, s, padding, place);
  const Bias of_filters(kOp, bias, w.rows, place);
  const Tensor y = images.Outputs(w.rows);

  CodebookConvCudaArgs args{};
  args.weight = w;
  args.shape = s;
  args.images = images.count;
  args.height = images.height, args.width = images.width;
  args.out_height = images.out_height, args.out_width = images.out_width;
  args.pad_h = padding[0], args.pad_w = padding[1];
  args.x = images.tensor.const_data_ptr();
  args.x_steps = StepsOf(s.in_channels, images.height, images.width, images.channels_last);
  args.stored_as = images.stored_as;
  args.bias = of_filters.data;
  args.relu = relu;
  args.y = y.mutable_data_ptr();
  args.y_steps = StepsOf(w.rows, images.out_height, images.out_width, images.channels_last);
  args.mode = CodebookModeOf(kOp, mode, w.columns);
  std::optional<RoundedRows> of_x, of_tables;
  if (args.mode == CodebookMode::kInt8) {
    const std::int64_t tables = filters.weight.codebook->size(0), image = args.x_steps.image;
    of_x.emplace(call, x, args.x, images.stored_as, images.count, image);
    of_tables.emplace(call, codebook, w.codebook, FloatDtype::kFloat32, w.per_row ? tables : 1,
                      w.per_row ? w.entries : tables * w.entries);
    args.x = of_x->bytes.const_data_ptr();
    args.x_steps.image = of_x->stride;
    args.image_scales = of_x->scales.const_data_ptr<float>();
    args.tables = of_tables->bytes.const_data_ptr<std::int8_t>();
    args.table_stride = w.per_row ? of_tables->stride : w.entries;
    args.table_scales = of_tables->scales.const_data_ptr<float>();
  }
  call.Check(CodebookConvCuda(args, call.Stream()));
  return y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("codebook_conv2d", TORCH_BOX(&ConvOnCpu));
  m.impl("codebook_conv2d_inference", TORCH_BOX(&ConvOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("codebook_conv2d", TORCH_BOX(&ConvOnCuda));
  m.impl("codebook_conv2d_inference", TORCH_BOX(&ConvOnCuda));
#else
  for (const char* op : {"codebook_conv2d", "codebook_conv2d_inference"}) m.impl(op, &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
