// tersetorch::fixed_round and fixed_round_whole: check, allocate, split the work, call the kernels.
#include "kernels/fixed_round/fixed_round.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>
#include <string>

#include "kernels/fixed_round/fixed_round_cuda.h"
#include "torch/cuda.h"
#include "torch/fixed.h"

namespace tersetorch {
namespace {

constexpr const char* kOp = "fixed_round";
constexpr const char* kWhole = "fixed_round_whole";

struct Call {
  Call(const char* op, Place place, const Tensor& t, std::int64_t integer_bits, std::int64_t fraction_bits,
       const std::string& rounding, std::int64_t seed, std::int64_t offset, std::optional<ScalarType> dtype) {
    CheckOn(place, op, t, "x");
    const FloatDtype stored_as = DtypeOf(op, t, "x");
    CheckFixed(op, integer_bits, fraction_bits);
    x = Usable(place, t);
    const FixedAs as = dtype.has_value() ? WholeAs(op, *dtype, integer_bits + fraction_bits) : FixedAs::kFloats;
    y = torch::stable::new_empty(*x, std::vector<std::int64_t>(t.sizes().begin(), t.sizes().end()),
                                 dtype.value_or(t.scalar_type()));
    args = {x->const_data_ptr(),
            stored_as,
            static_cast<int>(integer_bits),
            static_cast<int>(fraction_bits),
            IsStochastic(op, rounding),
            static_cast<std::uint64_t>(seed),
            CheckedOffset(op, offset),
            y->mutable_data_ptr(),
            as};
  }

  // Whether a value is NaN.
  bool OnCpu() const {
    std::atomic<bool> undefined = false;
    ParallelFor(y->numel(), GrainItems(2), [&](std::int64_t begin, std::int64_t end) {
      if (FixedRound(args, begin, end)) undefined = true;
    });
    return undefined;
  }

  std::optional<Tensor> x, y;
  FixedRoundArgs args{};
};

Tensor FixedRoundOnCpu(const Tensor& x, std::int64_t integer_bits, std::int64_t fraction_bits, std::string rounding,
                       std::int64_t seed, std::int64_t offset) {
  const Call call(kOp, kCpu, x, integer_bits, fraction_bits, rounding, seed, offset, std::nullopt);
  call.OnCpu();
  return *call.y;
}

Tensor FixedRoundWholeOnCpu(const Tensor& x, std::int64_t integer_bits, std::int64_t fraction_bits, ScalarType dtype,
                            std::string rounding, std::int64_t seed, std::int64_t offset) {
  const Call call(kWhole, kCpu, x, integer_bits, fraction_bits, rounding, seed, offset, dtype);
  STD_TORCH_CHECK(!call.OnCpu(), kWhole,
                  ": x must not hold NaN, which is no whole number, got some; repair it, or use fixed_round");
  return *call.y;
}

#ifdef TERSETORCH_CUDA

Tensor FixedRoundOnCuda(const Tensor& x, std::int64_t integer_bits, std::int64_t fraction_bits, std::string rounding,
                        std::int64_t seed, std::int64_t offset) {
  const CudaCall cuda(kOp, x, "x");
  const Call call(kOp, cuda.place(), x, integer_bits, fraction_bits, rounding, seed, offset, std::nullopt);
  cuda.Check(FixedRoundCuda(call.args, call.y->numel(), cuda.Stream()));
  return *call.y;
}

Tensor FixedRoundWholeOnCuda(const Tensor& x, std::int64_t integer_bits, std::int64_t fraction_bits, ScalarType dtype,
                             std::string rounding, std::int64_t seed, std::int64_t offset) {
  const CudaCall cuda(kWhole, x, "x");
  const Call call(kWhole, cuda.place(), x, integer_bits, fraction_bits, rounding, seed, offset, dtype);
  cuda.Check(FixedRoundCuda(call.args, call.y->numel(), cuda.Stream()));
  return *call.y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("fixed_round", TORCH_BOX(&FixedRoundOnCpu));
  m.impl("fixed_round_inference", TORCH_BOX(&FixedRoundOnCpu));
  m.impl("fixed_round_whole", TORCH_BOX(&FixedRoundWholeOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("fixed_round", TORCH_BOX(&FixedRoundOnCuda));
  m.impl("fixed_round_inference", TORCH_BOX(&FixedRoundOnCuda));
  m.impl("fixed_round_whole", TORCH_BOX(&FixedRoundWholeOnCuda));
#else
  for (const char* op : {"fixed_round", "fixed_round_inference", "fixed_round_whole"}) m.impl(op, &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
