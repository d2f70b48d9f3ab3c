// tersetorch::sign_matmul: checks, allocates, splits the work, calls the kernels.
#include "kernels/sign_matmul/sign_matmul.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "kernels/sign_matmul/sign_matmul_cuda.h"
#include "torch/cuda.h"
#include "torch/sign_tables.h"
#include "torch/signs.h"

namespace tersetorch {
namespace {

constexpr const char* kOp = "sign_matmul";

struct Inputs {
  Inputs(Place place, const Tensor& x, const Tensor& packed, std::int64_t out_features,
         const std::optional<Tensor>& scale_of, const std::optional<Tensor>& bias_of)
      : samples(kOp, x, "x", place),
        rows(CheckedRows(out_features)),
        weight(SignsOfRows(kOp, place, packed, samples.features, rows)),
        scale(kOp, place, scale_of, "scale", ScalarType::Float, rows),
        bias(kOp, bias_of, rows, place) {}

  static std::int64_t CheckedRows(std::int64_t rows) {
    STD_TORCH_CHECK(rows >= 0, kOp, ": out_features must be at least 0, got ", rows, "; pass the rows of W");
    return rows;
  }
  const std::uint64_t* Weight() const {
    return reinterpret_cast<const std::uint64_t*>(weight.const_data_ptr<std::int64_t>());
  }

  Samples samples;
  std::int64_t rows;
  Tensor weight;
  OfRows scale;
  Bias bias;
};

Tensor SignMatmulOnCpu(const Tensor& x, const Tensor& weight, std::int64_t out_features,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& bias, bool relu) {
  const Inputs inputs(kCpu, x, weight, out_features, scale, bias);
  const Tensor y = EmptyWithLastDim(x, out_features);
  const Samples& samples = inputs.samples;
  if (samples.count == 0 || out_features == 0) return y;
  const std::int64_t words = Blocks(samples.features, 64);
  char* const to = static_cast<char*>(y.mutable_data_ptr());
  const auto make = [&](std::int64_t first, std::int64_t count, char* tables, std::int64_t begin, std::int64_t end) {
    SignMatmulTables({samples.At(first), samples.stored_as, count, samples.features, reinterpret_cast<float*>(tables)},
                     begin, end);
  };
  const auto multiply = [&](std::int64_t first, std::int64_t count, const char* tables, std::int64_t begin,
                            std::int64_t end) {
    SignMatmul({inputs.Weight(), reinterpret_cast<const float*>(tables), count, words, out_features,
                inputs.scale.Data<float>(), inputs.bias.data, relu, to + first * out_features * samples.item_bytes,
                samples.stored_as},
               begin, end);
  };
  ForWaves({samples.count, words, XnorTiles(out_features), 4 * kSignMatmulTableFloats, 1}, make, multiply);
  return y;
}

#ifdef TERSETORCH_CUDA

Tensor SignMatmulOnCuda(const Tensor& x, const Tensor& weight, std::int64_t out_features,
                        const std::optional<Tensor>& scale, const std::optional<Tensor>& bias, bool relu) {
  const CudaCall call(kOp, x, "x");
  const Inputs inputs(call.place(), x, weight, out_features, scale, bias);
  const Tensor y = EmptyWithLastDim(x, out_features);
  const Samples& samples = inputs.samples;
  const SignMatmulCudaArgs args{
      samples.At(0), samples.stored_as,          inputs.Weight(),  samples.count, samples.features,
      out_features,  inputs.scale.Data<float>(), inputs.bias.data, relu,          y.mutable_data_ptr()};
  call.Check(SignMatmulCuda(args, call.Stream()));
  return y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("sign_matmul", TORCH_BOX(&SignMatmulOnCpu));
  m.impl("sign_matmul_inference", TORCH_BOX(&SignMatmulOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("sign_matmul", TORCH_BOX(&SignMatmulOnCuda));
  m.impl("sign_matmul_inference", TORCH_BOX(&SignMatmulOnCuda));
#else
  m.impl("sign_matmul", &NotBuiltForCuda);
  m.impl("sign_matmul_inference", &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
