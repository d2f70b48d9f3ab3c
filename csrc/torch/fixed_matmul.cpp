// tersetorch::fixed_matmul and the packing of its weight: checks, allocates, splits the work, calls the kernels.
#include "kernels/fixed_matmul/fixed_matmul.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "kernels/fixed_matmul/fixed_matmul_cuda.h"
#include "torch/cuda.h"
#include "torch/fixed.h"
#include "torch/fixed_product.h"

namespace tersetorch {
namespace {

constexpr const char* kOp = "fixed_matmul";

struct Inputs {
  Inputs(Place place, const Tensor& x_of, const Tensor& packed_of, const std::optional<Tensor>& bias_of,
         std::int64_t rows, std::int64_t sum_fraction_bits, std::int64_t integer_bits, std::int64_t fraction_bits,
         const std::string& rounding, std::int64_t seed, std::int64_t offset, ScalarType dtype, bool relu) {
    CheckWhole(kOp, place, x_of, "x");
    STD_TORCH_CHECK(x_of.dim() >= 1, kOp, ": x must be [..., in], got a scalar; reshape it");
    const std::int64_t columns = x_of.size(-1);
    weight = FixedWeightOf(kOp, place, packed_of, rows, columns, 1);
    x = Usable(place, x_of);
    CheckFits(kOp, *x, weight.wide);
    samples = LeadingSize(*x);
    std::vector<std::int64_t> shape(x_of.sizes().begin(), x_of.sizes().end());
    shape.back() = rows;
    y = torch::stable::new_empty(*x, shape, dtype);
    conversion =
        FixedConversionOf(kOp, place, bias_of, rows, sum_fraction_bits, integer_bits, fraction_bits, dtype, relu);
    conversion.args.stochastic = IsStochastic(kOp, rounding);
    conversion.args.seed = static_cast<std::uint64_t>(seed);
    conversion.args.offset = CheckedOffset(kOp, offset);
    conversion.args.y = y->mutable_data_ptr();
    conversion.args.y_stride = rows;
  }

  bool x_wide() const { return x->scalar_type() == ScalarType::Short; }

  std::optional<Tensor> x, y;
  FixedWeightArgs weight;
  FixedConversionArgs conversion;
  std::int64_t samples = 0;
};

Tensor FixedMatmulOnCpu(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, std::int64_t rows,
                        std::int64_t sum_fraction_bits, std::int64_t integer_bits, std::int64_t fraction_bits,
                        ScalarType dtype, std::string rounding, std::int64_t seed, std::int64_t offset, bool relu) {
  Inputs inputs(kCpu, x, packed, bias, rows, sum_fraction_bits, integer_bits, fraction_bits, rounding, seed, offset,
                dtype, relu);
  if (inputs.y->numel() == 0) return *inputs.y;
  const FixedWeightArgs& weight = inputs.weight;
  const std::int64_t columns = inputs.x->size(-1), item = inputs.x_wide() ? 2 : 1;
  const auto* from = static_cast<const char*>(inputs.x->const_data_ptr());
  const std::int64_t largest = inputs.x_wide() ? FixedLargest(from, inputs.samples * columns) : 128;
  FixedProduct product(weight, largest);
  const std::int64_t of_sample = product.Copies() * weight.words * kFixedWord;
  // So many samples at once that they stay in the second cache level.
  constexpr std::int64_t kBytes = 1 << 20;
  const std::int64_t wave = std::clamp<std::int64_t>(kBytes / std::max<std::int64_t>(1, of_sample), kFixedBlock,
                                                     std::max(kFixedBlock, inputs.samples));
  const std::int64_t most = std::min(wave, inputs.samples);
  Scratch scratch(most * (of_sample + 8 * product.Copies()));
  auto* sample_at = scratch.Data<std::int64_t>();
  for (std::int64_t n = 0; n < product.Copies() * most; ++n) sample_at[n] = n * weight.words * kFixedWord;
  char* to = scratch.Data<char>() + 8 * product.Copies() * most;
  for (std::int64_t n = 0; n < inputs.samples; n += wave) {
    const std::int64_t count = std::min(wave, inputs.samples - n);
    const FixedSamplesArgs own{from + n * columns * item, inputs.x_wide(), weight.wide, product.split, columns, to};
    ParallelFor(count, GrainItems(1 + columns / 16),
                [&](std::int64_t begin, std::int64_t end) { FixedSamples(own, begin, end); });
    constexpr std::int64_t kWhole = 0;
    product.Run(to, sample_at, &kWhole, 0, count, inputs.conversion,
                [&](std::int64_t first, std::int64_t samples, std::int64_t row, const FixedConvertArgs& convert) {
                  ConvertFrom(convert, (n + first) * rows + row, samples);
                });
  }
  return *inputs.y;
}

#ifdef TERSETORCH_CUDA

Tensor FixedMatmulOnCuda(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, std::int64_t rows,
                         std::int64_t sum_fraction_bits, std::int64_t integer_bits, std::int64_t fraction_bits,
                         ScalarType dtype, std::string rounding, std::int64_t seed, std::int64_t offset, bool relu) {
  const CudaCall call(kOp, x, "x");
  Inputs inputs(call.place(), x, packed, bias, rows, sum_fraction_bits, integer_bits, fraction_bits, rounding, seed,
                offset, dtype, relu);
  const Tensor sums = torch::stable::new_empty(*inputs.x, {inputs.samples, rows}, ScalarType::Long);
  const FixedCudaArgs args{inputs.x->const_data_ptr(),
                           inputs.x_wide(),
                           inputs.weight.packed,
                           inputs.weight.wide,
                           inputs.samples,
                           inputs.x->size(-1),
                           rows,
                           sums.mutable_data_ptr<std::int64_t>(),
                           {}};
  FixedConvertArgs& conversion = inputs.conversion.args;
  conversion.sums = args.sums;
  conversion.sums_stride = rows;
  conversion.added = inputs.conversion.bias;
  call.Check(FixedMatmulCuda(args, call.Stream()));
  call.Check(FixedConvertCuda(conversion, inputs.samples, 1, call.Stream()));
  return *inputs.y;
}

#endif

Tensor FixedPackOnCpu(const Tensor& weight_of, std::int64_t segments) {
  constexpr const char* kPack = "fixed_pack";
  CheckWhole(kPack, kCpu, weight_of, "weight");
  STD_TORCH_CHECK(weight_of.dim() == 2 && weight_of.size(1) <= kFixedMaxColumns, kPack,
                  ": weight must be [out, in] with fewer than 2^24 columns, got ", weight_of.dim(),
                  "-D with a last dimension of ", weight_of.dim() > 0 ? weight_of.size(-1) : 0,
                  "; reshape or split it");
  STD_TORCH_CHECK(segments >= 1 && weight_of.size(1) % segments == 0, kPack,
                  ": segments must be at least 1 and divide the columns of weight, ", weight_of.size(1), ", got ",
                  segments, "; pass the taps of the kernel");
  const Tensor weight = Contiguous(weight_of);
  const bool wide = weight.scalar_type() == ScalarType::Short;
  const std::int64_t rows = weight.size(0), columns = weight.size(1);
  const std::int64_t panels = Blocks(rows, kFixedPanel), of_word = FixedNumbersOfWord(wide);
  const std::int64_t words = segments * Blocks(columns / segments, of_word);
  Tensor packed = torch::stable::new_empty(weight, {panels, words + 1, kFixedPanel, of_word});
  const FixedPackArgs args{weight.const_data_ptr(), wide, rows, columns, segments, packed.mutable_data_ptr()};
  ParallelFor(panels, GrainItems(16 * words),
              [&](std::int64_t begin, std::int64_t end) { FixedPack(args, begin, end); });
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("fixed_matmul", TORCH_BOX(&FixedMatmulOnCpu));
  m.impl("fixed_pack", TORCH_BOX(&FixedPackOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("fixed_matmul", TORCH_BOX(&FixedMatmulOnCuda));
#else
  m.impl("fixed_matmul", &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
