// tersetorch::fixed_matmul: checks, allocates, splits the work, calls the kernels.
#include "kernels/fixed_matmul/fixed_matmul.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "kernels/fixed_matmul/fixed_matmul_cuda.h"
#include "torch/cuda.h"
#include "torch/fixed.h"

namespace tersetorch {
namespace {

constexpr const char* kOp = "fixed_matmul";
constexpr std::int64_t kMostSumBits = 2 * 15;  // the fraction bits of two int16

void CheckWhole(Place place, const Tensor& t, const char* name) {
  CheckOn(place, kOp, t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Char || t.scalar_type() == ScalarType::Short, kOp, ": ", name,
                  " must be int8 or int16, got ", torch::headeronly::toString(t.scalar_type()),
                  "; pass what fixed_round_whole returns");
}

struct Inputs {
  Inputs(Place place, const Tensor& x_of, const Tensor& weight_of, const std::optional<Tensor>& bias_of,
         std::int64_t sum_fraction_bits, std::int64_t integer_bits, std::int64_t fraction_bits,
         const std::string& rounding, std::int64_t seed, std::int64_t offset, ScalarType dtype, bool relu) {
    CheckWhole(place, x_of, "x");
    CheckWhole(place, weight_of, "weight");
    STD_TORCH_CHECK(x_of.dim() >= 1 && weight_of.dim() == 2 && weight_of.size(1) == x_of.size(-1), kOp,
                    ": x must be [..., in] and weight [out, in], got ", x_of.dim(), "-D with a last dimension of ",
                    x_of.dim() >= 1 ? x_of.size(-1) : 0, " and ", weight_of.dim(), "-D with ",
                    weight_of.dim() == 2 ? weight_of.size(1) : 0, " columns; pass x with as many features as columns");
    STD_TORCH_CHECK(x_of.size(-1) <= kFixedMaxColumns, kOp, ": weight must have fewer than 2^24 columns, got ",
                    x_of.size(-1), "; split it");
    STD_TORCH_CHECK(sum_fraction_bits >= 0 && sum_fraction_bits <= kMostSumBits, kOp,
                    ": sum_fraction_bits must lie in [0, ", kMostSumBits, "], got ", sum_fraction_bits,
                    "; pass the fraction bits of x and of weight together");
    CheckFixed(kOp, integer_bits, fraction_bits);
    const bool wide = x_of.scalar_type() == ScalarType::Short || weight_of.scalar_type() == ScalarType::Short;
    const ScalarType whole = wide ? ScalarType::Short : ScalarType::Char;
    x = Usable(place, x_of.scalar_type() == whole ? x_of : torch::stable::to(x_of, whole));
    weight = Usable(place, weight_of.scalar_type() == whole ? weight_of : torch::stable::to(weight_of, whole));
    args.x = x->const_data_ptr();
    args.weight = weight->const_data_ptr();
    args.wide = wide;
    args.samples = LeadingSize(*x);
    args.columns = x->size(-1);
    args.rows = weight->size(0);
    if (bias_of.has_value()) {
      CheckOn(place, kOp, *bias_of, "bias");
      STD_TORCH_CHECK(
          bias_of->scalar_type() == ScalarType::Long && bias_of->dim() == 1 && bias_of->numel() == args.rows, kOp,
          ": bias must be int64 [", args.rows, "], got ", torch::headeronly::toString(bias_of->scalar_type()), " of ",
          bias_of->dim(), "-D with ", bias_of->numel(), " elements; pass one for each row, in units of the sums");
      bias = Usable(place, *bias_of);
      args.bias = bias->const_data_ptr<std::int64_t>();
    }
    std::vector<std::int64_t> shape(x_of.sizes().begin(), x_of.sizes().end());
    shape.back() = args.rows;
    y = torch::stable::new_empty(*x, shape, dtype);
    conversion.sum_fraction_bits = static_cast<int>(sum_fraction_bits);
    conversion.integer_bits = static_cast<int>(integer_bits);
    conversion.fraction_bits = static_cast<int>(fraction_bits);
    conversion.stochastic = IsStochastic(kOp, rounding);
    conversion.relu = relu;
    conversion.seed = static_cast<std::uint64_t>(seed);
    conversion.offset = CheckedOffset(kOp, offset);
    conversion.as = dtype == ScalarType::Float ? FixedAs::kFloats : WholeAs(kOp, dtype, integer_bits + fraction_bits);
    conversion.y = y->mutable_data_ptr();
  }

  std::int64_t ItemBytes() const { return args.wide ? 2 : 1; }

  std::optional<Tensor> x, weight, bias, y;
  FixedMatmulArgs args{};
  FixedConvertArgs conversion{};
};

Tensor FixedMatmulOnCpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        std::int64_t sum_fraction_bits, std::int64_t integer_bits, std::int64_t fraction_bits,
                        ScalarType dtype, std::string rounding, std::int64_t seed, std::int64_t offset, bool relu) {
  const Inputs inputs(kCpu, x, weight, bias, sum_fraction_bits, integer_bits, fraction_bits, rounding, seed, offset,
                      dtype, relu);
  const FixedMatmulArgs& all = inputs.args;
  if (inputs.y->numel() == 0) return *inputs.y;
  // So many samples at once that they and their sums stay in the second cache level.
  constexpr std::int64_t kBytes = 1 << 20;
  const std::int64_t of_sample = all.columns * inputs.ItemBytes() + 8 * all.rows;
  const std::int64_t block = std::clamp<std::int64_t>(kBytes / of_sample, 8, std::max<std::int64_t>(8, all.samples));
  Scratch scratch(8 * std::min(block, all.samples) * all.rows);
  const auto width = static_cast<std::int64_t>(inputs.y->element_size());
  for (std::int64_t n = 0; n < all.samples; n += block) {
    FixedMatmulArgs args = all;
    args.x = static_cast<const char*>(all.x) + n * all.columns * inputs.ItemBytes();
    args.samples = std::min(block, all.samples - n);
    args.sums = scratch.Data<std::int64_t>();
    const std::int64_t of_tile = args.samples * (all.columns / 16 + 4);
    ParallelFor(Blocks(all.rows, 8), GrainItems(2 * of_tile), [&](std::int64_t begin, std::int64_t end) {
      FixedMatmul(args, 8 * begin, std::min(all.rows, 8 * end));
    });
    FixedConvertArgs conversion = inputs.conversion;
    conversion.sums = args.sums;
    conversion.offset += static_cast<std::uint64_t>(n * all.rows);
    conversion.y = static_cast<char*>(conversion.y) + n * all.rows * width;
    ParallelFor(args.samples * all.rows, GrainItems(2),
                [&](std::int64_t begin, std::int64_t end) { FixedConvert(conversion, begin, end); });
  }
  return *inputs.y;
}

#ifdef TERSETORCH_CUDA

Tensor FixedMatmulOnCuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         std::int64_t sum_fraction_bits, std::int64_t integer_bits, std::int64_t fraction_bits,
                         ScalarType dtype, std::string rounding, std::int64_t seed, std::int64_t offset, bool relu) {
  const CudaCall call(kOp, x, "x");
  Inputs inputs(call.place(), x, weight, bias, sum_fraction_bits, integer_bits, fraction_bits, rounding, seed, offset,
                dtype, relu);
  const Tensor sums = torch::stable::new_empty(*inputs.x, {inputs.args.samples, inputs.args.rows}, ScalarType::Long);
  inputs.args.sums = sums.mutable_data_ptr<std::int64_t>();
  inputs.conversion.sums = inputs.args.sums;
  call.Check(FixedMatmulCuda(inputs.args, call.Stream()));
  call.Check(FixedConvertCuda(inputs.conversion, sums.numel(), call.Stream()));
  return *inputs.y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) { m.impl("fixed_matmul", TORCH_BOX(&FixedMatmulOnCpu)); }

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("fixed_matmul", TORCH_BOX(&FixedMatmulOnCuda));
#else
  m.impl("fixed_matmul", &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
