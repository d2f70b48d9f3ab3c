// tersetorch::sign_max_pool2d: checks, allocates, splits the work, calls the kernels.
#include "kernels/sign_max_pool2d/sign_max_pool2d.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>

#include "kernels/sign_max_pool2d/sign_max_pool2d_cuda.h"
#include "torch/cuda.h"
#include "torch/images.h"

namespace tersetorch {
namespace {

constexpr const char* kOp = "sign_max_pool2d";

struct Inputs {
  Inputs(Place place, const Tensor& t, const Ints& kernel_size, const Ints& stride, const Ints& padding,
         const Ints& dilation, bool ceil_mode, const std::optional<Tensor>& flips_of) {
    CheckOn(place, kOp, t, "x");
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 4, kOp,
                    ": x must be packed images int64 [N, H, W, words], got ",
                    torch::headeronly::toString(t.scalar_type()), " of ", t.dim(),
                    "-D; pass what sign_pack_images or a product with thresholds returns");
    CheckPair(kOp, kernel_size, "kernel_size", 1);
    CheckPair(kOp, stride, "stride", 1);
    CheckPair(kOp, padding, "padding", 0);
    CheckPair(kOp, dilation, "dilation", 1);
    x = Usable(place, t);
    args.x = reinterpret_cast<const std::uint64_t*>(x->const_data_ptr<std::int64_t>());
    args.images = t.size(0), args.height = t.size(1), args.width = t.size(2), args.words = t.size(3);
    args.kernel_h = kernel_size[0], args.kernel_w = kernel_size[1], args.stride_h = stride[0];
    args.stride_w = stride[1], args.pad_h = padding[0], args.pad_w = padding[1];
    args.dilation_h = dilation[0], args.dilation_w = dilation[1];
    args.out_height = Outputs(0, args.height, kernel_size, stride, padding, dilation, ceil_mode);
    args.out_width = Outputs(1, args.width, kernel_size, stride, padding, dilation, ceil_mode);
    constexpr std::int64_t kMostPixels = std::numeric_limits<std::int32_t>::max();
    STD_TORCH_CHECK(args.out_height <= kMostPixels / std::max<std::int64_t>(1, args.out_width), kOp,
                    ": an image of y must have at most ", kMostPixels, " pixels, got ", args.out_height, " x ",
                    args.out_width, "; pass less padding");
    if (!flips_of.has_value()) return;
    CheckOn(place, kOp, *flips_of, "flips");
    STD_TORCH_CHECK(
        flips_of->scalar_type() == ScalarType::Long && flips_of->dim() == 1 && flips_of->size(0) == args.words, kOp,
        ": flips must be int64 [", args.words, "], got ", torch::headeronly::toString(flips_of->scalar_type()), " of ",
        flips_of->dim(), "-D with ", flips_of->numel(), " elements; pass a bit for each channel");
    flips = Usable(place, *flips_of);
    args.flips = reinterpret_cast<const std::uint64_t*>(flips->const_data_ptr<std::int64_t>());
  }

  static std::int64_t Outputs(int axis, std::int64_t size, const Ints& kernel, const Ints& stride, const Ints& padding,
                              const Ints& dilation, bool ceil_mode) {
    const std::int64_t reach = dilation[axis] * (kernel[axis] - 1) + 1, padded = size + 2 * padding[axis];
    STD_TORCH_CHECK(2 * padding[axis] <= kernel[axis], kOp, ": padding must be at most half of kernel_size, ",
                    kernel[axis], ", got ", padding[axis], "; pass that of the layer");
    // With ceil_mode the only window may end outside the image, as later ones may.
    const std::int64_t more = ceil_mode ? stride[axis] - 1 : 0;
    STD_TORCH_CHECK(size > 0 && padded + more >= reach, kOp, ": x must be as large as the window's ", reach,
                    ceil_mode ? ", less stride - 1 for ceil_mode, got " : ", got ", size,
                    " before padding; pass larger images");
    std::int64_t outputs = (padded - reach + more) / stride[axis] + 1;
    // The last window begins inside the image or before it.
    if (ceil_mode && (outputs - 1) * stride[axis] >= size + padding[axis]) --outputs;
    // Windows that begin before the image may step over a small one: they would have no largest sign.
    for (std::int64_t i = 0; size < dilation[axis] && i < outputs && i * stride[axis] < padding[axis]; ++i) {
      const std::int64_t before = (padding[axis] - i * stride[axis]) % dilation[axis];
      STD_TORCH_CHECK(before == 0 || dilation[axis] - before < size, kOp, ": x must be as large as dilation, ",
                      dilation[axis], ", got ", size, "; pass larger images");
    }
    return outputs;
  }

  // y, and args that say so.
  Tensor Empty(const Tensor& t) {
    const Tensor y =
        EmptyOnDeviceOf(t, {args.images, args.out_height, args.out_width, args.words}, aoti_torch_dtype_int64());
    args.y = reinterpret_cast<std::uint64_t*>(y.mutable_data_ptr<std::int64_t>());
    return y;
  }

  std::optional<Tensor> x, flips;
  SignMaxPool2dArgs args{};
};

Tensor SignMaxPool2dOnCpu(const Tensor& x, Ints kernel_size, Ints stride, Ints padding, Ints dilation, bool ceil_mode,
                          const std::optional<Tensor>& flips) {
  Inputs inputs(kCpu, x, kernel_size, stride, padding, dilation, ceil_mode, flips);
  const Tensor y = inputs.Empty(x);
  const SignMaxPool2dArgs& args = inputs.args;
  if (y.numel() == 0) return y;
  const std::int64_t of_row = args.out_width * Blocks(args.words, 8) * args.kernel_h * args.kernel_w;
  ParallelFor(args.images * args.out_height, GrainItems(of_row),
              [&](std::int64_t begin, std::int64_t end) { SignMaxPool2d(args, begin, end); });
  return y;
}

#ifdef TERSETORCH_CUDA

Tensor SignMaxPool2dOnCuda(const Tensor& x, Ints kernel_size, Ints stride, Ints padding, Ints dilation, bool ceil_mode,
                           const std::optional<Tensor>& flips) {
  const CudaCall call(kOp, x, "x");
  Inputs inputs(call.place(), x, kernel_size, stride, padding, dilation, ceil_mode, flips);
  const Tensor y = inputs.Empty(x);
  call.Check(SignMaxPool2dCuda(inputs.args, call.Stream()));
  return y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) { m.impl("sign_max_pool2d", TORCH_BOX(&SignMaxPool2dOnCpu)); }

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("sign_max_pool2d", TORCH_BOX(&SignMaxPool2dOnCuda));
#else
  m.impl("sign_max_pool2d", &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
