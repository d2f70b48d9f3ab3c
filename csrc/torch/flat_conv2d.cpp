// tersetorch::flat_conv2d: checks, allocates, splits the work, calls the kernels.
#include "kernels/flat_conv2d/flat_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "kernels/flat_conv2d/flat_conv2d_cuda.h"
#include "torch/common.h"
#include "torch/cuda.h"
#include "torch/images.h"
#include "torch/samples.h"

namespace tersetorch {
namespace {

constexpr const char* kOp = "flat_conv2d";
// Of a stage in `sizes`.
constexpr std::int64_t kNumbers = 8;

// The stages of a call, checked, and what they take and give.
struct Stages {
  Stages(const Tensor& x, const std::vector<Tensor>& tensors, const Ints& sizes, Place place) : in_channels(x.size(1)) {
    count = static_cast<std::int64_t>(tensors.size());
    STD_TORCH_CHECK(1 <= count && count <= kFlatMaxStages, kOp, ": stages must be 1 to ", kFlatMaxStages, ", got ",
                    count, "; call several times");
    STD_TORCH_CHECK(static_cast<std::int64_t>(sizes.size()) == count * kNumbers, kOp, ": sizes must be ", kNumbers,
                    " numbers for each stage, got ", sizes.size(), " for ", count,
                    "; pass out_channels, rank, kernel_size, stride and padding");
    std::int64_t channels = in_channels, height = x.size(2), width = x.size(3);
    for (std::int64_t s = 0; s < count; ++s) {
      const auto n = sizes.begin() + s * kNumbers;
      const Ints kernel(n + 2, n + 4), stride(n + 4, n + 6), padding(n + 6, n + 8);
      constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
      STD_TORCH_CHECK(0 <= n[0] && n[0] <= kMost && 1 <= n[1] && n[1] <= kMost && channels <= kMost, kOp,
                      ": out_channels and rank must be from 0 and 1 to ", kMost, ", got ", n[0], " and ", n[1],
                      "; pass those of the stage");
      CheckPair(kOp, kernel, "kernel_size", 1);
      STD_TORCH_CHECK(kernel[0] <= kFlatMaxKernel && kernel[1] <= kFlatMaxKernel, kOp, ": kernel_size must be at most ",
                      kFlatMaxKernel, ", got ", kernel[0], " x ", kernel[1], "; keep this layer as three convolutions");
      CheckPair(kOp, stride, "stride", 1);
      const ConvShape shape{channels, n[0], 1, kernel[0], kernel[1], stride[0], stride[1], 1, 1};
      const OutputSize out(kOp, height, width, shape, padding);
      FlatStage& stage = args[s];
      stage = {nullptr,   channels,   n[0],       n[1],   kernel[0], kernel[1],  stride[0],
               stride[1], padding[0], padding[1], height, width,     out.height, out.width};
      const Tensor& t = tensors[s];
      CheckOn(place, kOp, t, "stages");
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1, kOp,
                      ": stages must be float32 and 1-D, got ", torch::headeronly::toString(t.scalar_type()), " and ",
                      t.dim(), "-D; pass what flat_conv2d_pack returned");
      STD_TORCH_CHECK(n[1] * stage.Panels() <= kMost && t.numel() == stage.Vectors() * kFlatLanes, kOp, ": stage ", s,
                      " must have ", stage.Vectors() * kFlatLanes, " numbers for its sizes and ", channels,
                      " channels, got ", t.numel(), "; pass what flat_conv2d_pack returned, and its sizes");
      held.push_back(Usable(place, t));
      stage.packed = held.back().const_data_ptr<float>();
      channels = n[0], height = out.height, width = out.width;
    }
  }

  const FlatStage& Last() const { return args[count - 1]; }

  std::int64_t in_channels, count;
  FlatStage args[kFlatMaxStages];
  std::vector<Tensor> held;
};

// Multiply-adds of rows [begin, end) of what the last stage gives, those counted that another range does too.
std::int64_t WorkOf(const FlatStage* stages, std::int64_t count, std::int64_t begin, std::int64_t end) {
  std::int64_t work = 0;
  for (std::int64_t s = count; s-- > 0;) {
    const FlatStage& of = stages[s];
    const std::int64_t maps = of.rank * of.out_channels;
    work += (end - begin) * of.out_width * maps * (of.kernel_h + of.kernel_w);
    begin = std::max<std::int64_t>(0, begin * of.stride_h - of.pad_h);
    end = std::min(of.height, (end - 1) * of.stride_h - of.pad_h + of.kernel_h);
    end = std::max(begin, end);
    work += (end - begin) * of.width * maps * of.in_channels;
  }
  return work;
}

// The images, laid out as the kernels take them; the sizes of what comes out are those of the first stage.
Images ImagesOf(const Tensor& x, const FlatStage& s, Place place) {
  return {kOp,
          x,
          {s.in_channels, s.out_channels, 1, s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, 1, 1},
          {s.pad_h, s.pad_w},
          place};
}

Tensor Outputs(const Tensor& x, const Images& images, const FlatStage& last) {
  return torch::stable::empty({images.count, last.out_channels, last.out_height, last.out_width}, x.scalar_type(),
                              std::nullopt, x.device(), std::nullopt,
                              images.channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                   : torch::headeronly::MemoryFormat::Contiguous);
}

FlatImage<const void> At(const FlatImage<const void>& x, std::int64_t offset) {
  const std::int64_t bytes = x.stored_as == FloatDtype::kFloat32 ? 4 : 2;
  return {static_cast<const char*>(x.data) + offset * bytes, x.stored_as, x.channels_last, x.step};
}
FlatImage<void> At(const FlatImage<void>& y, std::int64_t offset) {
  const std::int64_t bytes = y.stored_as == FloatDtype::kFloat32 ? 4 : 2;
  return {static_cast<char*>(y.data) + offset * bytes, y.stored_as, y.channels_last, y.step};
}

Tensor ConvOnCpu(const Tensor& x, std::vector<Tensor> tensors, Ints sizes, bool relu) {
  CheckImages(kOp, x);
  const Stages stages(x, tensors, sizes, kCpu);
  const FlatStage& first = stages.args[0];
  const FlatStage& last = stages.Last();
  const Images input = ImagesOf(x, first, kCpu);
  const bool channels_last = input.channels_last;
  const Tensor y = Outputs(x, input, last);
  if (y.numel() == 0) return y;

  FlatConvArgs args{};
  std::copy(stages.args, stages.args + stages.count, args.stages);
  args.count = stages.count;
  args.relu = relu;
  args.x = {input.tensor.const_data_ptr(), input.stored_as, channels_last,
            channels_last ? first.in_channels : first.height * first.width};
  args.y = {y.mutable_data_ptr(), input.stored_as, channels_last,
            channels_last ? last.out_channels : last.out_height * last.out_width};
  const std::int64_t x_image = first.in_channels * first.height * first.width;
  const std::int64_t y_image = last.out_channels * last.out_height * last.out_width;
  const auto of_image = [&](std::int64_t n) {
    FlatConvArgs own = args;
    own.x = At(args.x, n * x_image);
    own.y = At(args.y, n * y_image);
    return own;
  };

  // Images to threads; few of them are cut into bands of rows, which repeat the rows that they share.
  const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
  const std::int64_t whole = WorkOf(args.stages, args.count, 0, last.out_height);
  constexpr std::int64_t kWorkPerTask = 512 * 1024;  // some 10 microseconds
  std::int64_t bands = input.count >= threads ? 1 : Blocks(threads, input.count);
  bands = std::min({bands, last.out_height, std::max<std::int64_t>(1, whole * input.count / kWorkPerTask)});
  const std::int64_t tasks = input.count * bands;
  const auto row = [&](std::int64_t band) { return last.out_height * band / bands; };

  ParallelFor(tasks, bands > 1 ? 1 : std::max<std::int64_t>(1, kWorkPerTask / std::max<std::int64_t>(1, whole)),
              [&](std::int64_t begin, std::int64_t end) {
                Scratch scratch(FlatScratchBytes(args));
                for (std::int64_t task = begin; task < end; ++task) {
                  const std::int64_t band = task % bands;
                  FlatConv2d(of_image(task / bands), row(band), row(band + 1), 0, last.Panels(), scratch.Data<char>());
                }
              });
  return y;
}

#ifdef TERSETORCH_CUDA

Tensor ConvOnCuda(const Tensor& x, std::vector<Tensor> tensors, Ints sizes, bool relu) {
  const CudaCall call(kOp, x, "x");
  const Place place = call.place();
  CheckImages(kOp, x, place);
  const Stages stages(x, tensors, sizes, place);
  const FlatStage& last = stages.Last();
  const Images images = ImagesOf(x, stages.args[0], place);
  const Tensor y = Outputs(x, images, last);

  FlatConvCudaArgs args{};
  args.images = images.count;
  args.x = images.tensor.const_data_ptr();
  args.x_steps = StepsOf(stages.in_channels, images.height, images.width, images.channels_last);
  args.x_stored_as = images.stored_as;
  std::optional<Tensor> before;  // alive while the next stage reads it
  for (std::int64_t s = 0; s < stages.count; ++s) {
    const FlatStage& stage = stages.args[s];
    const bool end = s + 1 == stages.count;
    const Tensor lateral = EmptyOnDeviceOf(x, {FlatLateralFloats(stage, args.images)}, aoti_torch_dtype_float32());
    const Tensor to = end ? y
                          : EmptyOnDeviceOf(x, {args.images, stage.out_channels, stage.out_height, stage.out_width},
                                            aoti_torch_dtype_float32());
    args.stage = stage;
    args.l = lateral.mutable_data_ptr<float>();
    args.relu = end && relu;
    args.y = to.mutable_data_ptr();
    args.y_steps = StepsOf(stage.out_channels, stage.out_height, stage.out_width, end && images.channels_last);
    args.y_stored_as = end ? images.stored_as : FloatDtype::kFloat32;
    call.Check(FlatConvCuda(args, call.Stream()));
    before = to;
    args.x = args.y, args.x_steps = args.y_steps, args.x_stored_as = FloatDtype::kFloat32;
  }
  return y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("flat_conv2d", TORCH_BOX(&ConvOnCpu));
  m.impl("flat_conv2d_inference", TORCH_BOX(&ConvOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("flat_conv2d", TORCH_BOX(&ConvOnCuda));
  m.impl("flat_conv2d_inference", TORCH_BOX(&ConvOnCuda));
#else
  for (const char* op : {"flat_conv2d", "flat_conv2d_inference"}) m.impl(op, &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
