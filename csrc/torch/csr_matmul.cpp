// tersetorch::csr_matmul and its gradients: checks, allocates, splits the work, calls the kernels. No arithmetic here.
#include "kernels/csr_matmul/csr_matmul.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstring>
#include <limits>
#include <optional>

#include "torch/common.h"

namespace tersetorch {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- checks

void CheckOnCpu(const char* op, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name,
                  " must be on the CPU like the other tensors, got another device; move it");
}

CsrFloat FloatKind(const char* op, const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", name,
                  " must be float32 or bfloat16, got ", torch::headeronly::toString(dtype), "; convert it");
  return dtype == ScalarType::Float ? CsrFloat::kFloat32 : CsrFloat::kBFloat16;
}

void CheckIndices(const char* op, const Tensor& t, const char* name) {
  CheckOnCpu(op, t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 1, op, ": ", name, " must be int32 and 1-D, got ",
                  torch::headeronly::toString(t.scalar_type()), " and ", t.dim(), "-D; convert it");
}

// Samples [..., features] of a floating point dtype.
struct Samples {
  Samples(const char* op, const Tensor& t, const char* name) : stored_as(FloatKind(op, t, name)) {
    CheckOnCpu(op, t, name);
    STD_TORCH_CHECK(t.dim() >= 1, op, ": ", name, " must be [..., features], got a scalar; reshape it");
    tensor = Contiguous(t);
    count = LeadingSize(t);
    features = t.size(-1);
    item_bytes = stored_as == CsrFloat::kFloat32 ? 4 : 2;
  }

  // Sample n.
  const void* At(std::int64_t n) const {
    return static_cast<const char*>(tensor.const_data_ptr()) + n * features * item_bytes;
  }

  CsrFloat stored_as;
  Tensor tensor;
  std::int64_t count = 0, features = 0, item_bytes = 0;
};

// A weight whose tensors live as long as this.
struct Weight {
  Weight(const char* op, const Tensor& offsets, const Tensor& indices, std::int64_t columns) {
    CheckIndices(op, offsets, "row_offsets");
    CheckIndices(op, indices, "col_indices");
    STD_TORCH_CHECK(offsets.numel() >= 1, op, ": row_offsets must have one entry more than rows, got none; pass [0]");
    STD_TORCH_CHECK(0 <= columns && columns <= std::numeric_limits<std::int32_t>::max(), op,
                    ": the number of columns must fit int32, got ", columns, "; split the layer");
    row_offsets = Contiguous(offsets);
    col_indices = Contiguous(indices);
    args.row_offsets = row_offsets.const_data_ptr<std::int32_t>();
    args.col_indices = col_indices.const_data_ptr<std::int32_t>();
    args.rows = offsets.numel() - 1;
    args.columns = columns;
    args.nnz = indices.numel();
    std::int32_t first, last;
    std::memcpy(&first, args.row_offsets, sizeof first);
    std::memcpy(&last, args.row_offsets + args.rows, sizeof last);
    STD_TORCH_CHECK(first == 0 && last == args.nnz, op, ": row_offsets must run from 0 to ", args.nnz,
                    " (the length of col_indices), got ", first, " to ", last, "; rebuild the weight");
  }

  void SetValues(const char* op, const Tensor& t, const std::optional<Tensor>& codes_of) {
    CheckOnCpu(op, t, "values");
    STD_TORCH_CHECK(t.dim() == 1 && t.numel() == args.nnz, op, ": values must be [", args.nnz, "], got ", t.dim(),
                    "-D with ", t.numel(), " elements; pass one for each column index");
    values = Contiguous(t);
    args.values = values.const_data_ptr();
    if (!codes_of.has_value()) {
      args.stored_as = FloatKind(op, t, "values") == CsrFloat::kFloat32 ? CsrValues::kFloat32 : CsrValues::kBFloat16;
      return;
    }
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte, op, ": values must be uint8 codes beside a codebook, got ",
                    torch::headeronly::toString(t.scalar_type()), "; pass codes, or no codebook");
    CheckOnCpu(op, *codes_of, "codebook");
    STD_TORCH_CHECK(
        codes_of->scalar_type() == ScalarType::Float && codes_of->dim() == 1 && codes_of->numel() <= kCsrMaxEntries, op,
        ": codebook must be float32 [entries] with at most ", kCsrMaxEntries, " entries, got ",
        torch::headeronly::toString(codes_of->scalar_type()), " with ", codes_of->numel(), "; convert it");
    codebook = Contiguous(*codes_of);
    args.stored_as = CsrValues::kCodes;
    args.codebook = codebook->const_data_ptr<float>();
    args.entries = codebook->numel();
  }

  // Vector operations of one row with one panel, on average.
  std::int64_t Work(std::int64_t width) const {
    return args.nnz / std::max<std::int64_t>(1, args.rows) * std::max<std::int64_t>(1, width / 8);
  }

  Tensor row_offsets, col_indices, values;
  std::optional<Tensor> codebook;
  CsrWeight args{};
};

// The first problem that any thread met.
class SharedStatus {
 public:
  void Report(CsrStatus status) {
    if (status != CsrStatus::kOk) status_.store(status, std::memory_order_relaxed);
  }

  void Raise(const char* op, const CsrWeight& w) const {
    switch (status_.load(std::memory_order_relaxed)) {
      case CsrStatus::kOk:
        return;
      case CsrStatus::kBadRowOffsets:
        STD_TORCH_CHECK(false, op, ": row_offsets must never fall and stay in [0, ", w.nnz,
                        "], got a row that breaks this; rebuild the weight");
      case CsrStatus::kBadColumn:
        STD_TORCH_CHECK(false, op, ": col_indices must lie in [0, ", w.columns,
                        "), got one outside; rebuild the weight or pass x with its number of features");
      case CsrStatus::kBadCode:
        STD_TORCH_CHECK(false, op, ": codes must lie in [0, ", w.entries,
                        "), got one outside; pass the codebook that the codes were made with");
    }
  }

 private:
  std::atomic<CsrStatus> status_{CsrStatus::kOk};
};

// ---- panels

// How samples are cut into panels: all of one width, but for the last where fewer samples fit a narrower one.
class PanelPlan {
 public:
  // Narrows the panels as far as that makes at least `min_count` of them.
  PanelPlan(std::int64_t samples, std::int64_t features, std::int64_t min_count = 1)
      : samples_(samples), width_(WidthFor(samples, kCsrMaxWidth)) {
    while (width_ > kLineWidth && width_ * features * std::int64_t{sizeof(float)} > kPanelBytes) width_ /= 2;
    while (width_ > 8 && Count() < min_count) width_ /= 2;
  }

  std::int64_t Count() const { return (samples_ + width_ - 1) / width_; }
  std::int64_t Width() const { return width_; }
  std::int64_t Width(std::int64_t panel) const { return WidthFor(SamplesIn(panel), width_); }
  std::int64_t Begin(std::int64_t panel) const { return panel * width_; }
  std::int64_t SamplesIn(std::int64_t panel) const { return std::min(width_, samples_ - Begin(panel)); }

  // Floats before a panel, and of all panels.
  std::int64_t Offset(std::int64_t panel, std::int64_t features) const { return panel * width_ * features; }
  std::int64_t Floats(std::int64_t features) const {
    return samples_ == 0 ? 0 : Offset(Count() - 1, features) + Width(Count() - 1) * features;
  }

 private:
  // Measured on a CPU with 512 KiB of second-level cache: up to here 32 samples a panel are faster than 16, although
  // the panel spills, because they share the decoding of a weight.
  static constexpr std::int64_t kPanelBytes = 1280 * 1024;
  static constexpr std::int64_t kLineWidth = 16;  // narrower, each non-zero would fetch a cache line for a part of it

  // The narrowest width that holds the samples, at most `limit`.
  static std::int64_t WidthFor(std::int64_t samples, std::int64_t limit) {
    if (samples == 1) return 1;
    std::int64_t width = 8;
    while (width < samples && width < limit) width *= 2;
    return width;
  }

  std::int64_t samples_, width_;
};

// Splits `outer` times `inner` items over the threads; run(o, begin, end) gets a range of the inner items of one o.
template <typename Run>
void ParallelRanges(std::int64_t outer, std::int64_t inner, std::int64_t grain, const Run& run) {
  if (inner == 0) return;
  torch::stable::parallel_for(0, outer * inner, grain, [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const std::int64_t o = begin / inner;
      const std::int64_t stop = std::min(end, (o + 1) * inner);
      run(o, begin - o * inner, stop - o * inner);
      begin = stop;
    }
  });
}

// All panels of some samples.
class Panels {
 public:
  Panels(const Samples& samples, const PanelPlan& plan) : plan_(plan), features_(samples.features) {
    if (plan.Width() == 1 && samples.stored_as == CsrFloat::kFloat32) {
      memory_ = samples.tensor;  // a float32 sample is its own panel
    } else {
      memory_ = torch::stable::new_empty(samples.tensor, {plan.Floats(features_)}, ScalarType::Float);
      Pack(samples, memory_.mutable_data_ptr<float>());
    }
    data_ = memory_.const_data_ptr<float>();
  }

  const float* At(std::int64_t panel) const { return data_ + plan_.Offset(panel, features_); }

 private:
  void Pack(const Samples& samples, float* data) const {
    ParallelRanges(plan_.Count(), features_, GrainItems(plan_.Width() / 4),
                   [&](std::int64_t panel, std::int64_t begin, std::int64_t end) {
                     const CsrPackArgs args{
                         samples.At(plan_.Begin(panel)),        samples.stored_as, plan_.SamplesIn(panel), features_,
                         data + plan_.Offset(panel, features_), plan_.Width(panel)};
                     CsrPack(args, begin, end);
                   });
  }

  PanelPlan plan_;
  std::int64_t features_;
  Tensor memory_;
  const float* data_;
};

// ---- ops

Tensor CsrMatmulOnCpu(const Tensor& x, const Tensor& row_offsets, const Tensor& col_indices, const Tensor& values,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook) {
  constexpr const char* kOp = "csr_matmul";
  const Samples samples(kOp, x, "x");
  Weight weight(kOp, row_offsets, col_indices, samples.features);
  weight.SetValues(kOp, values, codebook);
  const std::int64_t rows = weight.args.rows;

  Tensor bias_float;
  const float* bias_data = nullptr;
  if (bias.has_value()) {
    CheckOnCpu(kOp, *bias, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == rows, kOp, ": bias must be [", rows, "], got ", bias->dim(),
                    "-D with ", bias->numel(), " elements; pass one for each row");
    bias_float = FloatKind(kOp, *bias, "bias") == CsrFloat::kFloat32 ? Contiguous(*bias)
                                                                     : torch::stable::to(*bias, ScalarType::Float);
    bias_data = bias_float.const_data_ptr<float>();
  }

  const PanelPlan plan(samples.count, samples.features);
  const Panels panels(samples, plan);
  const Tensor y = torch::stable::new_empty(x, WithLastDim(x, rows));
  char* y_data = static_cast<char*>(y.mutable_data_ptr());
  SharedStatus status;
  ParallelRanges(plan.Count(), rows, GrainItems(weight.Work(plan.Width())),
                 [&](std::int64_t panel, std::int64_t begin, std::int64_t end) {
                   const CsrMatmulArgs args{weight.args,
                                            panels.At(panel),
                                            plan.Width(panel),
                                            bias_data,
                                            y_data + plan.Begin(panel) * rows * samples.item_bytes,
                                            samples.stored_as,
                                            plan.SamplesIn(panel)};
                   status.Report(CsrMatmul(args, begin, end));
                 });
  status.Raise(kOp, weight.args);
  return y;
}

Tensor CsrMatmulGradXOnCpu(const Tensor& grad_y, const Tensor& row_offsets, const Tensor& col_indices,
                           const Tensor& values, std::int64_t in_features, const std::optional<Tensor>& codebook) {
  constexpr const char* kOp = "csr_matmul_grad_x";
  const Samples samples(kOp, grad_y, "grad_y");
  Weight weight(kOp, row_offsets, col_indices, in_features);
  weight.SetValues(kOp, values, codebook);
  STD_TORCH_CHECK(samples.features == weight.args.rows, kOp, ": grad_y must be [..., ", weight.args.rows, "], got ",
                  samples.features, " features; pass the gradient of y");

  const Tensor grad_x = torch::stable::new_empty(grad_y, WithLastDim(grad_y, in_features));
  // The threads share out the panels; a sample's sum does not depend on the panel that holds it.
  const PanelPlan plan(samples.count, in_features, torch::stable::get_num_threads());
  const Panels panels(samples, plan);
  const Tensor sums = torch::stable::new_empty(grad_y, {plan.Floats(in_features)}, ScalarType::Float);
  float* sums_data = sums.mutable_data_ptr<float>();
  char* grad_x_data = static_cast<char*>(grad_x.mutable_data_ptr());
  SharedStatus status;
  torch::stable::parallel_for(0, plan.Count(), GrainItems(weight.args.rows * weight.Work(plan.Width())),
                              [&](std::int64_t begin, std::int64_t end) {
                                for (std::int64_t panel = begin; panel < end; ++panel) {
                                  const CsrGradXArgs args{
                                      weight.args,
                                      panels.At(panel),
                                      plan.Width(panel),
                                      sums_data + plan.Offset(panel, in_features),
                                      grad_x_data + plan.Begin(panel) * in_features * samples.item_bytes,
                                      samples.stored_as,
                                      plan.SamplesIn(panel)};
                                  status.Report(CsrMatmulGradX(args));
                                }
                              });
  status.Raise(kOp, weight.args);
  return grad_x;
}

Tensor CsrMatmulGradValuesOnCpu(const Tensor& grad_y, const Tensor& x, const Tensor& row_offsets,
                                const Tensor& col_indices) {
  constexpr const char* kOp = "csr_matmul_grad_values";
  const Samples grads(kOp, grad_y, "grad_y");
  const Samples samples(kOp, x, "x");
  const Weight weight(kOp, row_offsets, col_indices, samples.features);
  STD_TORCH_CHECK(grads.features == weight.args.rows && grads.count == samples.count, kOp, ": grad_y must be [",
                  samples.count, ", ", weight.args.rows, "] like x and row_offsets say, got [", grads.count, ", ",
                  grads.features, "]; pass the gradient of y");

  if (samples.count == 0) return torch::stable::new_zeros(x, {weight.args.nnz}, ScalarType::Float);
  const Tensor grad_values = torch::stable::new_empty(x, {weight.args.nnz}, ScalarType::Float);
  float* grad_values_data = grad_values.mutable_data_ptr<float>();
  const PanelPlan plan(samples.count, samples.features);
  const Panels x_panels(samples, plan);
  const Panels grad_panels(grads, plan);
  SharedStatus status;
  torch::stable::parallel_for(0, weight.args.rows, GrainItems(plan.Count() * weight.Work(plan.Width())),
                              [&](std::int64_t begin, std::int64_t end) {
                                for (std::int64_t panel = 0; panel < plan.Count(); ++panel) {
                                  const CsrGradValuesArgs args{weight.args,        grad_panels.At(panel),
                                                               x_panels.At(panel), plan.Width(panel),
                                                               panel > 0,          grad_values_data};
                                  status.Report(CsrMatmulGradValues(args, begin, end));
                                }
                              });
  status.Raise(kOp, weight.args);
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("csr_matmul", TORCH_BOX(&CsrMatmulOnCpu));
  m.impl("csr_matmul_inference", TORCH_BOX(&CsrMatmulOnCpu));
  m.impl("csr_matmul_grad_x", TORCH_BOX(&CsrMatmulGradXOnCpu));
  m.impl("csr_matmul_grad_values", TORCH_BOX(&CsrMatmulGradValuesOnCpu));
}

}  // namespace tersetorch
