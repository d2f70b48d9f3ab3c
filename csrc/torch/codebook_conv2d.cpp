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
  // Windows are rounded to bfloat16 as float32, as they then multiply a rounded codebook at every level.
  const bool rounded = mode == "bfloat16" && codebook.scalar_type() == ScalarType::Float;
  const Tensor table =
      rounded ? torch::stable::to(torch::stable::to(codebook, ScalarType::BFloat16), ScalarType::Float) : codebook;
  const Filters filters(kOp, x, codes, table, column_block, kernel_size, stride, dilation, groups, kCpu);
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

  // Pixels with the channels last are samples of codebook_matmul, where a window is a pixel. Other images that windows
  // cannot be read from are laid out anew, so many at a time as fill panels for all threads.
  const bool last = input.channels_last, samples = last && line && groups == 1 && how != CodebookMode::kBFloat16;
  const bool transposed = last && !samples;
  const bool plain = !integer && padding[0] + padding[1] == 0 && shape.stride_w == 1;
  const bool padded = !samples && (!plain || (!transposed && input.stored_as != FloatDtype::kFloat32));
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
  // In one piece: of several, the C library gives some back to the system at every call.
  const std::int64_t planes_bytes = transposed ? Blocks(wave * image * 4, 64) * 64 : 0;
  Scratch memory(planes_bytes + (padded ? wave * stored_image * (integer ? 1 : 4) + kCodebookWindowSlack : 0));
  char* const planes = memory.Data<char>();
  char* const stored = planes + planes_bytes;

  // With a stride of 1 windows need not be made: outputs count as if rows of y were as long as stored rows of x, and a
  // column of W multiplies what follows one number. That pays where the outputs that nobody wants cost less than
  // windows do, 32 cycles for 64 outputs beside 2 for each filter; unless rows that a tile of weights reads share the
  // sets of the first cache level.
  const std::int64_t positions = ((line ? 1 : input.out_height) - 1) * row + out_width;
  const std::int64_t unwanted = Blocks(positions, kCodebookMaxWidth) * kCodebookMaxWidth - pixels;
  const bool apart = how == CodebookMode::kExact && !last && shape.stride_w * s.stride_h == 1 &&
                     positions >= kCodebookMaxWidth && unwanted * w.rows / groups < 14 * pixels &&
                     rows * row % 256 != 0;
  std::vector<std::int64_t> offsets;
  for (std::int64_t c = 0; apart && c < s.in_channels / groups; ++c) {
    for (std::int64_t kh = 0; kh < s.kernel_h; ++kh) {
      for (std::int64_t kw = 0; kw < s.kernel_w; ++kw) {
        offsets.push_back((c * rows + kh * s.dilation_h) * row + kw * s.dilation_w);
      }
    }
  }

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
                                   reinterpret_cast<float*>(planes) + n * image},
                                  begin, end);
                     });
      of_wave = planes;
      stored_as = FloatDtype::kFloat32;
    }
    if (padded) {
      const std::int64_t bytes = stored_as == FloatDtype::kFloat32 ? 4 : 2;
      ParallelRanges(
          images, s.in_channels, GrainItems(rows * row / 4), [&](std::int64_t n, std::int64_t begin, std::int64_t end) {
            CodebookPad(
                {of_wave + n * image * bytes, stored_as, s.in_channels, height, width, padding[0], padding[1], shape,
                 integer, integer ? inverses[first + n] : 0.0f, stored + n * stored_image * (integer ? 1 : 4)},
                begin, end);
          });
      of_wave = stored;
    }

    const std::int64_t first_image = first * w.rows * pixels;
    const std::int64_t number_bytes = integer ? 1 : samples ? item_bytes : 4;
    CodebookMatmulArgs common{};
    common.weight = w;
    common.mode = rounded ? CodebookMode::kExact : how;
    common.table_scale = table_scale, common.table_inverse = table_inverse;
    common.bias = of_filters.data;
    common.relu = relu;
    common.y = y.mutable_data_ptr();
    common.y_stored_as = input.stored_as;
    // The filters of group g for one panel.
    const auto multiply = [&](const CodebookMatmulArgs& args, std::int64_t g) {
      const bool few = args.width <= kCodebookFewSamples;
      // Rows of a tile are 6, 8 or 12; threads get equally many.
      const std::int64_t parts = Blocks(of_group, kCodebookRows * threads) * threads;
      const std::int64_t block = few ? 16 : std::min(kCodebookRows, Blocks(Blocks(of_group, parts), 12) * 12);
      ParallelFor(Blocks(of_group, block), GrainItems(block * w.columns * (args.width / 2 + 1) / 16),
                  [&](std::int64_t begin, std::int64_t end) {
                    Scratch sums(few ? 0 : CodebookScratchBytes(args.width, w.per_row));
                    CodebookMatmulArgs own = args;
                    own.sums = sums.Data<float>();
                    for (std::int64_t b = begin; b < end; ++b) {
                      status.Report(CodebookMatmul(own, g * of_group + b * block,
                                                   g * of_group + std::min(of_group, (b + 1) * block)));
                    }
                  });
    };

    if (apart) {
      // The last panel of an image begins early enough to end with it.
      const std::int64_t of_image = Blocks(positions, kCodebookMaxWidth), tasks = groups * images * of_image;
      ParallelFor(tasks, tasks < 2 * threads ? tasks : 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t task = begin; task < end; ++task) {
          const std::int64_t g = task / of_image / images, n = task / of_image % images;
          const std::int64_t own = task % of_image * kCodebookMaxWidth;
          const std::int64_t from_position = std::min(own, positions - kCodebookMaxWidth);
          std::int64_t places[kCodebookMaxWidth];
          for (std::int64_t lane = 0; lane < kCodebookMaxWidth; ++lane) {
            const std::int64_t position = from_position + lane, i = position / row, j = position % row;
            const bool wanted = position >= own && j < out_width;
            places[lane] = wanted ? first_image + n * w.rows * pixels + i * out_width + j : -1;
          }
          CodebookMatmulArgs args = common;
          args.panel = of_wave + 4 * (n * stored_image + g * channels * rows * row + from_position);
          args.width = args.samples = kCodebookMaxWidth;
          args.places = places, args.place_step = pixels;
          args.offsets = offsets.data();
          multiply(args, g);
        }
      });
      continue;
    }

    const std::vector<Outputs> panels = Cut(images * pixels);
    const auto count = static_cast<std::int64_t>(panels.size()), tasks = groups * count;
    ParallelFor(tasks, tasks < 2 * threads ? tasks : 1, [&](std::int64_t begin, std::int64_t end) {
      Scratch windows(CodebookPanelBytes(filters.weight.row_bytes, bits, how, panels[0].width));
      char* const panel = windows.Data<char>();
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t g = task / count;
        const Outputs& p = panels[task % count];
        float of_sample[kCodebookMaxWidth] = {}, inverse_of_sample[kCodebookMaxWidth] = {};
        std::int32_t sums[kCodebookMaxWidth] = {};
        std::int64_t places[kCodebookMaxWidth];
        for (std::int64_t n = 0; n < p.count; ++n) {
          const std::int64_t output = p.first + n, image_of = output / pixels;
          places[n] = first_image + image_of * w.rows * pixels + output % pixels;
          if (!integer) continue;
          of_sample[n] = scales[first + image_of];
          inverse_of_sample[n] = inverses[first + image_of];
        }
        const char* from_group = of_wave + g * channels * rows * row * number_bytes;
        ParallelFor(chunks, GrainItems(512 / bits * p.width / 4), [&](std::int64_t from_chunk, std::int64_t to_chunk) {
          if (samples) {
            const void* pixels_from = of_wave + p.first * w.columns * item_bytes;
            return CodebookPackSamples({pixels_from, input.stored_as, p.count, w.columns, w.column_block, bits, how,
                                        inverse_of_sample, panel, p.width, sums},
                                       from_chunk, to_chunk);
          }
          CodebookPackWindows(
              {from_group, stored_image, rows * row, row, phase, shape, channels, line ? 1 : input.out_height,
               out_width, p.first, p.count, w.column_block, bits, how, panel, p.width, sums},
              from_chunk, to_chunk);
        });
        CodebookMatmulArgs args = common;
        args.panel = panel;
        args.width = p.width, args.samples = p.count;
        args.sample_scales = of_sample, args.sample_sums = sums;
        if (last) {  // an output's filters lie side by side, as codebook_matmul has it
          args.y = static_cast<char*>(args.y) + (first_image + p.first * w.rows) * item_bytes;
        } else {
          args.places = places, args.place_step = pixels;
        }
        multiply(args, g);
      }
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
  args.plan = CodebookConvPlanCuda(args);
  std::optional<RoundedRows> of_x, of_tables;
  if (args.mode == CodebookMode::kInt8) {
    const std::int64_t tables = filters.weight.codebook->size(0), image = args.x_steps.image;
    of_x.emplace(call, x, args.x, images.stored_as, images.count, image);
    args.x = of_x->bytes.const_data_ptr();
    args.x_steps.image = of_x->stride;
    args.image_scales = of_x->scales.const_data_ptr<float>();
    if (args.plan.outputs == 0) {
      of_tables.emplace(call, codebook, w.codebook, FloatDtype::kFloat32, w.per_row ? tables : 1,
                        w.per_row ? w.entries : tables * w.entries);
      args.tables = of_tables->bytes.const_data_ptr<std::int8_t>();
      args.table_stride = w.per_row ? of_tables->stride : w.entries;
      args.table_scales = of_tables->scales.const_data_ptr<float>();
    }
  }
  std::optional<Tensor> windows, scales, parts;
  if (const CodebookConvPlan& plan = args.plan; plan.outputs > 0) {
    windows = torch::stable::new_empty(x, {plan.outputs, plan.window_stride}, ScalarType::Byte);
    args.windows = windows->mutable_data_ptr();
    if (args.mode == CodebookMode::kInt8) {
      scales = torch::stable::new_empty(x, {plan.outputs}, ScalarType::Float);
      args.window_scales = scales->mutable_data_ptr<float>();
    }
    if (plan.part_count > 1) {
      parts = torch::stable::new_empty(x, {plan.part_count, plan.outputs, w.rows / groups}, ScalarType::Float);
      args.parts = parts->mutable_data_ptr();
    }
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
