// tersetorch::bitplane_matmul and bitplane_conv2d: check, allocate, split the work, call the kernels.
#include "kernels/bitplane_matmul/bitplane_matmul.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels/bitplane_matmul/bitplane_matmul_cuda.h"
#include "torch/cuda.h"
#include "torch/images.h"
#include "torch/sign_tables.h"
#include "torch/signs.h"

namespace tersetorch {
namespace {

// What both ops share: samples of bytes, or positions of images, by a weight.
struct Inputs {
  Inputs(const char* op, Place place, const Tensor& x, const Tensor& packed, std::int64_t columns, std::int64_t rows,
         std::int64_t step, std::int64_t zero, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
         const std::optional<Tensor>& thresholds)
      : epilogue(op, place, scale, bias, thresholds, CheckedRows(op, rows)) {
    CheckOn(place, op, x, "x");
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte, op, ": x must be uint8, got ",
                    torch::headeronly::toString(x.scalar_type()), "; pass 8-bit numbers");
    // Tables hold sums of four in 16 bits.
    STD_TORCH_CHECK(step >= 1 && step <= 2 && zero >= 255 * step - kBitplaneLargest && zero <= kBitplaneLargest, op,
                    ": step * x - zero must lie in [-255, 255] for x of 0 to 255 and step 1 or 2, got step ", step,
                    " and zero ", zero, "; pass zero in [0, 255] with step 1, or 255 with step 2");
    STD_TORCH_CHECK(columns >= 0 && columns <= kBitplaneMaxColumns, op, ": W must have at most ", kBitplaneMaxColumns,
                    " columns, got ", columns, "; split it");
    weight = SignsOfRows(op, place, packed, columns, rows);
    tables = {nullptr, nullptr, 0, 0, columns, static_cast<std::int32_t>(step), static_cast<std::int32_t>(zero), {}};
    args.weight = reinterpret_cast<const std::uint64_t*>(weight.const_data_ptr<std::int64_t>());
    args.words = Blocks(columns, 64);
    args.columns = columns;
    args.rows = rows;
    args.scale = epilogue.scale.Data<float>();
    args.bias = epilogue.bias.Data<float>();
    args.thresholds = epilogue.thresholds.Data<std::int32_t>();
  }

  static std::int64_t CheckedRows(const char* op, std::int64_t rows) {
    STD_TORCH_CHECK(rows >= 0, op, ": W must have at least 0 rows, got ", rows, "; pass the rows of W");
    return rows;
  }

  ScalarType Outputs() const {
    return epilogue.Bits() ? ScalarType::Long : epilogue.Floats() ? ScalarType::Float : ScalarType::Int;
  }

  // Makes the args say that y is theirs.
  void WriteTo(const Tensor& y) {
    if (epilogue.Bits()) {
      args.bits = reinterpret_cast<std::uint64_t*>(y.mutable_data_ptr<std::int64_t>());
    } else if (epilogue.Floats()) {
      args.floats = y.mutable_data_ptr<float>();
    } else {
      args.dots = y.mutable_data_ptr<std::int32_t>();
    }
  }

  void Multiply(std::int64_t samples) const {
    if (samples == 0 || args.rows == 0) return;
    const auto make = [&](std::int64_t first, std::int64_t count, char* to, std::int64_t begin, std::int64_t end) {
      BitplaneTablesArgs part = tables;
      part.first = first;
      part.samples = count;
      part.tables = reinterpret_cast<std::int16_t*>(to);
      BitplaneTables(part, begin, end);
    };
    const auto multiply = [&](std::int64_t first, std::int64_t count, const char* from, std::int64_t begin,
                              std::int64_t end) {
      BitplaneMatmulArgs part = args;
      part.tables = reinterpret_cast<const std::int16_t*>(from);
      part.samples = count;
      if (args.dots != nullptr) part.dots += first * args.rows;
      if (args.floats != nullptr) part.floats += first * args.rows;
      if (args.bits != nullptr) part.bits += first * SignWords(args.rows);
      BitplaneMatmul(part, begin, end);
    };
    // Words of bits are whole tiles of one thread.
    const std::int64_t together = epilogue.Bits() ? 2 : 1;
    ForWaves({samples, args.words, XnorTiles(args.rows), 2 * kBitplaneWordTables, together}, make, multiply);
  }

  Epilogue epilogue;
  Tensor weight;
  BitplaneTablesArgs tables{};
  BitplaneMatmulArgs args{};
};

// ---- matrices

constexpr const char* kMatmul = "bitplane_matmul";

void CheckSamples(const Tensor& x, std::int64_t in_features) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) == in_features, kMatmul, ": x must be [..., ", in_features, "], got ",
                  x.dim(), "-D; pass x with as many features as W has columns");
}

Tensor Rows(Inputs& inputs, const Tensor& x) {
  std::vector<std::int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = inputs.epilogue.Bits() ? SignWords(inputs.args.rows) : inputs.args.rows;
  const Tensor y = torch::stable::new_empty(x, shape, inputs.Outputs());
  inputs.WriteTo(y);
  return y;
}

Tensor BitplaneMatmulOnCpu(const Tensor& x, const Tensor& weight, std::int64_t in_features, std::int64_t out_features,
                           std::int64_t step, std::int64_t zero, const std::optional<Tensor>& scale,
                           const std::optional<Tensor>& bias, const std::optional<Tensor>& thresholds) {
  Inputs inputs(kMatmul, kCpu, x, weight, in_features, out_features, step, zero, scale, bias, thresholds);
  CheckSamples(x, in_features);
  const Tensor usable = Usable(kCpu, x), y = Rows(inputs, x);
  inputs.tables.x = usable.const_data_ptr<std::uint8_t>();
  inputs.Multiply(LeadingSize(x));
  return y;
}

// ---- images

constexpr const char* kConv = "bitplane_conv2d";

// The positions of images [N, C, H, W], any strides.
struct Positions {
  Positions(Place place, const Tensor& x, std::int64_t out_channels, const Ints& kernel_size, const Ints& stride,
            const Ints& padding, const Ints& dilation) {
    CheckImages(kConv, x, place);
    const ConvShape s = ConvShapeOf(kConv, x.size(1), out_channels, kernel_size, stride, dilation, 1);
    const OutputSize size(kConv, x.size(2), x.size(3), s, padding);
    images = {x.size(2),  x.size(3),  size.height, size.width, x.stride(0), x.stride(1), x.stride(2),  x.stride(3),
              s.kernel_h, s.kernel_w, s.stride_h,  s.stride_w, padding[0],  padding[1],  s.dilation_h, s.dilation_w};
    constexpr std::int64_t kMost = kBitplaneMaxColumns;
    STD_TORCH_CHECK(
        s.kernel_h <= kMost && s.kernel_w <= kMost / s.kernel_h && x.size(1) <= kMost / (s.kernel_h * s.kernel_w),
        kConv, ": a filter must have at most ", kMost, " signs, got ", x.size(1), " channels of ", s.kernel_h, " x ",
        s.kernel_w, " taps; split the convolution");
    columns = x.size(1) * s.kernel_h * s.kernel_w;
    count = x.size(0) * size.height * size.width;
  }

  BitplaneImages images;
  std::int64_t columns, count;
};

// [N, rows, H', W'] whose numbers lie as those of samples [N * H' * W', rows], or packed images.
Tensor Filtered(Inputs& inputs, const Tensor& x, const Positions& positions) {
  const BitplaneImages& i = positions.images;
  const std::int64_t rows = inputs.args.rows;
  const Tensor y =
      inputs.epilogue.Bits()
          ? torch::stable::new_empty(x, {x.size(0), i.out_height, i.out_width, SignWords(rows)}, ScalarType::Long)
          : torch::stable::empty({x.size(0), rows, i.out_height, i.out_width}, inputs.Outputs(), std::nullopt,
                                 x.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  inputs.WriteTo(y);
  return y;
}

Tensor BitplaneConv2dOnCpu(const Tensor& x, const Tensor& weight, std::int64_t out_channels, const Ints& kernel_size,
                           const Ints& stride, const Ints& padding, const Ints& dilation, std::int64_t step,
                           std::int64_t zero, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& thresholds) {
  const Positions positions(kCpu, x, out_channels, kernel_size, stride, padding, dilation);
  Inputs inputs(kConv, kCpu, x, weight, positions.columns, out_channels, step, zero, scale, bias, thresholds);
  const Tensor y = Filtered(inputs, x, positions);
  inputs.tables.x = x.const_data_ptr<std::uint8_t>();
  inputs.tables.images = &positions.images;
  inputs.Multiply(positions.count);
  return y;
}

#ifdef TERSETORCH_CUDA

Tensor BitplaneMatmulOnCuda(const Tensor& x, const Tensor& weight, std::int64_t in_features, std::int64_t out_features,
                            std::int64_t step, std::int64_t zero, const std::optional<Tensor>& scale,
                            const std::optional<Tensor>& bias, const std::optional<Tensor>& thresholds) {
  const CudaCall call(kMatmul, x, "x");
  Inputs inputs(kMatmul, call.place(), x, weight, in_features, out_features, step, zero, scale, bias, thresholds);
  CheckSamples(x, in_features);
  const Tensor usable = Usable(call.place(), x), y = Rows(inputs, x);
  inputs.tables.x = usable.const_data_ptr<std::uint8_t>();
  inputs.tables.samples = inputs.args.samples = LeadingSize(x);
  call.Check(BitplaneMatmulCuda(inputs.tables, inputs.args, call.Stream()));
  return y;
}

Tensor BitplaneConv2dOnCuda(const Tensor& x, const Tensor& weight, std::int64_t out_channels, const Ints& kernel_size,
                            const Ints& stride, const Ints& padding, const Ints& dilation, std::int64_t step,
                            std::int64_t zero, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& thresholds) {
  const CudaCall call(kConv, x, "x");
  const Positions positions(call.place(), x, out_channels, kernel_size, stride, padding, dilation);
  Inputs inputs(kConv, call.place(), x, weight, positions.columns, out_channels, step, zero, scale, bias, thresholds);
  const Tensor y = Filtered(inputs, x, positions);
  inputs.tables.x = x.const_data_ptr<std::uint8_t>();
  inputs.tables.images = &positions.images;
  inputs.tables.samples = inputs.args.samples = positions.count;
  call.Check(BitplaneMatmulCuda(inputs.tables, inputs.args, call.Stream()));
  return y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("bitplane_matmul", TORCH_BOX(&BitplaneMatmulOnCpu));
  m.impl("bitplane_conv2d", TORCH_BOX(&BitplaneConv2dOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("bitplane_matmul", TORCH_BOX(&BitplaneMatmulOnCuda));
  m.impl("bitplane_conv2d", TORCH_BOX(&BitplaneConv2dOnCuda));
#else
  m.impl("bitplane_matmul", &NotBuiltForCuda);
  m.impl("bitplane_conv2d", &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
