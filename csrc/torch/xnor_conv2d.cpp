// tersetorch::xnor_conv2d: checks, packs the signs of real images, allocates, splits the work, calls the kernels.
#include "kernels/xnor_conv2d/xnor_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "kernels/sign_pack/sign_pack.h"
#include "kernels/xnor_conv2d/xnor_conv2d_cuda.h"
#include "torch/cuda.h"
#include "torch/images.h"
#include "torch/signs.h"

namespace tersetorch {
namespace {

constexpr const char* kOp = "xnor_conv2d";

struct Inputs {
  Inputs(Place place, const Tensor& x, const Tensor& packed, std::int64_t in_channels, std::int64_t out_channels,
         const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation, std::int64_t groups,
         std::int64_t padding_value, const std::optional<Tensor>& scale_of, const std::optional<Tensor>& bias_of,
         const std::optional<Tensor>& thresholds_of)
      : signs(kOp, place, x, in_channels), epilogue(kOp, place, scale_of, bias_of, thresholds_of, out_channels) {
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
    STD_TORCH_CHECK(in_channels >= 0 && in_channels <= kMost && out_channels >= 0 && out_channels <= kMost, kOp,
                    ": in_channels and out_channels must lie in [0, 2^31), got ", in_channels, " and ", out_channels,
                    "; pass the sizes of the weight");
    STD_TORCH_CHECK(padding_value >= -1 && padding_value <= 1, kOp, ": padding_value must be 0, 1 or -1, got ",
                    padding_value, "; pass what x is outside the image");
    const ConvShape s = ConvShapeOf(kOp, in_channels, out_channels, kernel_size, stride, dilation, groups);
    args.images = signs.count, args.height = signs.height, args.width = signs.width;
    args.channels = in_channels / groups, args.words = SignWords(args.channels), args.filters = out_channels / groups;
    STD_TORCH_CHECK(
        s.kernel_h * s.kernel_w <= kMost && args.channels <= kMost / std::max<std::int64_t>(1, s.kernel_h * s.kernel_w),
        kOp, ": a filter must have at most ", kMost, " signs, got ", args.channels, " channels of ", s.kernel_h, " x ",
        s.kernel_w, " taps; split the convolution");
    const OutputSize size(kOp, signs.height, signs.width, s, padding);
    args.groups = groups, args.kernel_h = s.kernel_h, args.kernel_w = s.kernel_w;
    args.stride_h = s.stride_h, args.stride_w = s.stride_w, args.pad_h = padding[0], args.pad_w = padding[1];
    args.dilation_h = s.dilation_h, args.dilation_w = s.dilation_w;
    args.out_height = size.height, args.out_width = size.width;
    args.outside = static_cast<int>(padding_value);
    split = groups > 1 && args.channels % kSignBits != 0;
    args.pixel_words = split ? groups * args.words : SignWords(in_channels);

    CheckOn(place, kOp, packed, "weight");
    const std::int64_t tiles = XnorConvTiles(args.filters, groups);
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Int && packed.dim() == 5 && packed.size(0) == tiles &&
                        packed.size(1) == s.kernel_h && packed.size(2) == s.kernel_w &&
                        packed.size(3) == 2 * args.words && packed.size(4) == kXnorFilters,
                    kOp, ": weight must be int32 [", tiles, ", ", s.kernel_h, ", ", s.kernel_w, ", ", 2 * args.words,
                    ", ", kXnorFilters, "], got ", torch::headeronly::toString(packed.scalar_type()), " of ",
                    packed.dim(), "-D with ", packed.numel(), " elements; pass what xnor_conv2d_pack returns");
    weight = Usable(place, packed, 4);
    args.weight = weight.const_data_ptr<std::int32_t>();
    args.scale = epilogue.scale.Data<float>();
    args.bias = epilogue.bias.Data<float>();
    args.thresholds = epilogue.thresholds.Data<std::int32_t>();
  }

  // y, and args that say so.
  Tensor Empty(const Tensor& x) {
    const std::int64_t filters = args.groups * args.filters;
    if (epilogue.Bits()) {
      const Tensor y = EmptyOnDeviceOf(x, {args.images, args.out_height, args.out_width, SignWords(filters)},
                                       aoti_torch_dtype_int64());
      args.bits = reinterpret_cast<std::uint64_t*>(y.mutable_data_ptr<std::int64_t>());
      return y;
    }
    const Tensor y = torch::stable::empty({args.images, filters, args.out_height, args.out_width},
                                          epilogue.Floats() ? ScalarType::Float : ScalarType::Int, std::nullopt,
                                          x.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
    if (epilogue.Floats()) {
      args.floats = y.mutable_data_ptr<float>();
    } else {
      args.dots = y.mutable_data_ptr<std::int32_t>();
    }
    return y;
  }

  SignImages signs;
  Epilogue epilogue;
  bool split = false;  // whether groups begin amid words
  Tensor weight;
  XnorConv2dArgs args{};
};

// Some images, whose signs are args.x.
void Convolve(const XnorConv2dArgs& args, std::int64_t first, std::int64_t count) {
  const std::int64_t filters = args.groups * args.filters, tiles = XnorConvTiles(args.filters, args.groups);
  XnorConv2dArgs part = args;
  const std::int64_t pixels = first * args.out_height * args.out_width;
  if (args.dots != nullptr) part.dots += pixels * filters;
  if (args.floats != nullptr) part.floats += pixels * filters;
  if (args.bits != nullptr) {
    part.bits += pixels * SignWords(filters);
    std::memset(part.bits, 0, 8 * count * args.out_height * args.out_width * SignWords(filters));
  }
  // Words of bits are those of one thread: pairs of tiles, or all of them.
  const std::int64_t together = XnorWholeTiles(args) ? 2 : std::max<std::int64_t>(1, tiles);
  const std::int64_t parts = (tiles + together - 1) / together, rows = args.out_height;
  const std::int64_t of_pixel = together * (10 * args.kernel_h * args.kernel_w * args.words + 16);
  ParallelFor(count * parts * rows, GrainItems(of_pixel * args.out_width), [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const std::int64_t image = begin / (parts * rows), at = begin % (parts * rows);
      XnorConvPart piece{image, at % rows, rows, at / rows * together, tiles};
      if (at % rows != 0 || end - begin < parts * rows - at) {  // no whole image is left: some rows of a pair of tiles
        piece.row_end = std::min(rows, piece.row_begin + end - begin);
        piece.tile_end = std::min(tiles, piece.tile_begin + together);
        begin += piece.row_end - piece.row_begin;
      } else {
        begin += parts * rows - at;
      }
      XnorConv2d(part, piece);
    }
  });
}

Tensor XnorConv2dOnCpu(const Tensor& x, const Tensor& weight, std::int64_t in_channels, std::int64_t out_channels,
                       Ints kernel_size, Ints stride, Ints padding, Ints dilation, std::int64_t groups,
                       std::int64_t padding_value, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& thresholds) {
  Inputs inputs(kCpu, x, weight, in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                padding_value, scale, bias, thresholds);
  const Tensor y = inputs.Empty(x);
  XnorConv2dArgs& args = inputs.args;
  if (y.numel() == 0) return y;
  std::vector<XnorSpan> spans(args.out_height + args.out_width);
  args.row_spans = spans.data();
  args.row_span_count =
      XnorSpans(args.out_height, args.height, args.kernel_h, args.stride_h, args.pad_h, args.dilation_h, spans.data());
  args.column_spans = spans.data() + args.out_height;
  args.column_span_count = XnorSpans(args.out_width, args.width, args.kernel_w, args.stride_w, args.pad_w,
                                     args.dilation_w, spans.data() + args.out_height);

  const SignImages& signs = inputs.signs;
  const std::int64_t image_words = args.height * args.width * args.pixel_words;
  const bool ready = signs.packed_already && !inputs.split;
  // So many images at a time that their signs stay in the second cache level.
  constexpr std::int64_t kWaveWords = 64 * 1024;
  const std::int64_t fit = std::max<std::int64_t>(1, kWaveWords / std::max<std::int64_t>(1, image_words));
  const std::int64_t wave = ready ? args.images : std::min(args.images, fit);
  Scratch scratch(ready ? 0 : 8 * wave * image_words);
  for (std::int64_t first = 0; first < args.images; first += wave) {
    const std::int64_t count = std::min(wave, args.images - first);
    if (ready) {
      args.x = signs.Words();
    } else {
      signs.Pack(first, count, inputs.split ? groups : 1, scratch.Data<std::uint64_t>());
      args.x = scratch.Data<std::uint64_t>();
    }
    Convolve(args, first, count);
  }
  return y;
}

#ifdef TERSETORCH_CUDA

Tensor XnorConv2dOnCuda(const Tensor& x, const Tensor& weight, std::int64_t in_channels, std::int64_t out_channels,
                        Ints kernel_size, Ints stride, Ints padding, Ints dilation, std::int64_t groups,
                        std::int64_t padding_value, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& thresholds) {
  const CudaCall call(kOp, x, "x");
  Inputs inputs(call.place(), x, weight, in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                padding_value, scale, bias, thresholds);
  const Tensor y = inputs.Empty(x);
  XnorConv2dArgs& args = inputs.args;
  if (y.numel() == 0) return y;
  Tensor bits = x;
  if (inputs.signs.packed_already && !inputs.split) {
    args.x = inputs.signs.Words();
  } else {
    bits = torch::stable::new_empty(x, {args.images * args.height * args.width, args.pixel_words}, ScalarType::Long);
    auto* words = reinterpret_cast<std::uint64_t*>(bits.mutable_data_ptr<std::int64_t>());
    inputs.signs.PackOnCuda(call, inputs.split ? groups : 1, words);
    args.x = words;
  }
  call.Check(XnorConv2dCuda(args, call.Stream()));
  return y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) { m.impl("xnor_conv2d", TORCH_BOX(&XnorConv2dOnCpu)); }

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("xnor_conv2d", TORCH_BOX(&XnorConv2dOnCuda));
#else
  m.impl("xnor_conv2d", &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
