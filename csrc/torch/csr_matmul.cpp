// tersetorch::csr_matmul and its gradients: checks, allocates, splits the work, calls the kernels. No arithmetic here.
#include "kernels/csr_matmul/csr_matmul.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/csr_matmul/csr_matmul_cuda.h"
#include "kernels/panels/panels.h"
#include "torch/common.h"
#include "torch/cuda.h"
#include "torch/samples.h"

namespace tersetorch {
namespace {

// ---- checks

void CheckIndices(const char* op, const Tensor& t, const char* name, Place place) {
  CheckOn(place, op, t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 1, op, ": ", name, " must be int32 and 1-D, got ",
                  torch::headeronly::toString(t.scalar_type()), " and ", t.dim(), "-D; convert it");
}

// A weight whose tensors live as long as this.
struct Weight {
  Weight(const char* op, const Tensor& offsets, const Tensor& indices, std::int64_t columns, Place place)
      : place(place) {
    CheckIndices(op, offsets, "row_offsets", place);
    CheckOn(place, op, indices, "col_indices");
    const bool narrow = indices.scalar_type() == ScalarType::Short;
    STD_TORCH_CHECK((narrow || indices.scalar_type() == ScalarType::Int) && indices.dim() == 1, op,
                    ": col_indices must be int32 or int16 and 1-D, got ",
                    torch::headeronly::toString(indices.scalar_type()), " and ", indices.dim(), "-D; convert it");
    STD_TORCH_CHECK(offsets.numel() >= 1, op, ": row_offsets must have one entry more than rows, got none; pass [0]");
    STD_TORCH_CHECK(0 <= columns && columns <= std::numeric_limits<std::int32_t>::max(), op,
                    ": the number of columns must fit int32, got ", columns, "; split the layer");
    row_offsets = Usable(place, offsets);
    col_indices = Usable(place, indices);
    args.row_offsets = row_offsets.const_data_ptr<std::int32_t>();
    args.col_indices = col_indices.const_data_ptr();
    args.indexed_by = narrow ? CsrIndices::kUInt16 : CsrIndices::kInt32;
    args.rows = offsets.numel() - 1;
    args.columns = columns;
    args.nnz = indices.numel();
    if (place != kCpu) return;  // the kernels look themselves: reading a GPU's memory would wait for it
    std::int32_t first, last;
    std::memcpy(&first, args.row_offsets, sizeof first);
    std::memcpy(&last, args.row_offsets + args.rows, sizeof last);
    STD_TORCH_CHECK(first == 0 && last == args.nnz, op, ": row_offsets must run from 0 to ", args.nnz,
                    " (the length of col_indices), got ", first, " to ", last, "; rebuild the weight");
  }

  void SetValues(const char* op, const Tensor& t, const std::optional<Tensor>& codes_of) {
    CheckOn(place, op, t, "values");
    STD_TORCH_CHECK(t.dim() == 1 && t.numel() == args.nnz, op, ": values must be [", args.nnz, "], got ", t.dim(),
                    "-D with ", t.numel(), " elements; pass one for each column index");
    values = Usable(place, t);
    args.values = values.const_data_ptr();
    if (!codes_of.has_value()) {
      args.stored_as = DtypeOf(op, t, "values") == FloatDtype::kFloat32 ? CsrValues::kFloat32 : CsrValues::kBFloat16;
      return;
    }
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte, op, ": values must be uint8 codes beside a codebook, got ",
                    torch::headeronly::toString(t.scalar_type()), "; pass codes, or no codebook");
    CheckCodebook(op, *codes_of, kCsrMaxEntries, place);
    codebook = Usable(place, *codes_of);
    args.stored_as = CsrValues::kCodes;
    args.codebook = codebook->const_data_ptr<float>();
    args.entries = codebook->numel();
  }

  // Vector operations of one row with one panel, on average.
  std::int64_t Work(std::int64_t width) const {
    return args.nnz / std::max<std::int64_t>(1, args.rows) * std::max<std::int64_t>(1, width / 8);
  }

  Place place;
  Tensor row_offsets, col_indices, values;
  std::optional<Tensor> codebook;
  CsrWeight args{};
};

// The arguments of each op, checked.
struct MatmulInputs {
  MatmulInputs(const char* op, Place place, const Tensor& x, const Tensor& row_offsets, const Tensor& col_indices,
               const Tensor& values, const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook)
      : samples(op, x, "x", place),
        weight(op, row_offsets, col_indices, samples.features, place),
        bias(op, bias, weight.args.rows, place) {
    weight.SetValues(op, values, codebook);
  }

  Samples samples;
  Weight weight;
  Bias bias;
};

struct GradXInputs {
  GradXInputs(const char* op, Place place, const Tensor& grad_y, const Tensor& row_offsets, const Tensor& col_indices,
              const Tensor& values, std::int64_t in_features, const std::optional<Tensor>& codebook)
      : samples(op, grad_y, "grad_y", place), weight(op, row_offsets, col_indices, in_features, place) {
    weight.SetValues(op, values, codebook);
    STD_TORCH_CHECK(samples.features == weight.args.rows, op, ": grad_y must be [..., ", weight.args.rows, "], got ",
                    samples.features, " features; pass the gradient of y");
  }

  Samples samples;
  Weight weight;
};

struct GradValuesInputs {
  GradValuesInputs(const char* op, Place place, const Tensor& grad_y, const Tensor& x, const Tensor& row_offsets,
                   const Tensor& col_indices)
      : grads(op, grad_y, "grad_y", place),
        samples(op, x, "x", place),
        weight(op, row_offsets, col_indices, samples.features, place) {
    STD_TORCH_CHECK(grads.features == weight.args.rows && grads.count == samples.count, op, ": grad_y must be [",
                    samples.count, ", ", weight.args.rows, "] like x and row_offsets say, got [", grads.count, ", ",
                    grads.features, "]; pass the gradient of y");
  }

  Samples grads, samples;
  Weight weight;
};

// A problem that some thread met.
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

  // Calls run(first, count) for each wave: so many panels are in memory at the same time.
  template <typename Run>
  void ForWaves(const Run& run) const {
    for (std::int64_t first = 0; first < Count(); first += Wave()) run(first, std::min(Wave(), Count() - first));
  }
  std::int64_t WaveFloats(std::int64_t features) const { return std::min(Wave(), Count()) * width_ * features; }

 private:
  // Measured on a CPU with 512 KiB of second-level cache: up to here 32 samples a panel are faster than 16, although
  // the panel spills, because they share the decoding of a weight.
  static constexpr std::int64_t kPanelBytes = 1280 * 1024;
  static constexpr std::int64_t kLineWidth = 16;  // narrower, each non-zero would fetch a cache line for a part of it

  // Enough for every thread, and few enough to come back from the last cache level.
  static std::int64_t Wave() { return std::max<std::int64_t>(16, torch::stable::get_num_threads()); }

  // The narrowest width that holds the samples, at most `limit`.
  static std::int64_t WidthFor(std::int64_t samples, std::int64_t limit) {
    if (samples == 1) return 1;
    std::int64_t width = 8;
    while (width < samples && width < limit) width *= 2;
    return width;
  }

  std::int64_t samples_, width_;
};

// The panels of some samples, packed one wave at a time, so that a large batch needs little memory beside itself.
class Panels {
 public:
  Panels(const Samples& samples, const PanelPlan& plan) : samples_(samples), plan_(plan) {
    if (OwnPanel()) return;
    memory_ = torch::stable::new_empty(samples.tensor, {plan.WaveFloats(samples.features)}, ScalarType::Float);
    data_ = memory_.mutable_data_ptr<float>();
  }

  // Packs panels [first, first + count).
  void Load(std::int64_t first, std::int64_t count) {
    first_ = first;
    if (OwnPanel()) return;
    ParallelRanges(count, samples_.features, GrainItems(plan_.Width() / 4),
                   [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
                     const std::int64_t panel = first + i;
                     const PanelPackArgs args{samples_.At(plan_.Begin(panel)), samples_.stored_as,
                                              plan_.SamplesIn(panel),          samples_.features,
                                              data_ + Offset(panel),           plan_.Width(panel)};
                     PackPanel(args, begin, end);
                   });
  }

  // A loaded panel.
  const float* At(std::int64_t panel) const {
    return OwnPanel() ? static_cast<const float*>(samples_.At(0)) : data_ + Offset(panel);
  }

 private:
  // One float32 sample lies as its panel would.
  bool OwnPanel() const { return plan_.Width() == 1 && samples_.stored_as == FloatDtype::kFloat32; }
  std::int64_t Offset(std::int64_t panel) const { return (panel - first_) * plan_.Width() * samples_.features; }

  const Samples& samples_;
  const PanelPlan& plan_;
  Tensor memory_;
  float* data_ = nullptr;
  std::int64_t first_ = 0;
};

// ---- ops

Tensor CsrMatmulOnCpu(const Tensor& x, const Tensor& row_offsets, const Tensor& col_indices, const Tensor& values,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook, bool relu) {
  constexpr const char* kOp = "csr_matmul";
  const MatmulInputs inputs(kOp, kCpu, x, row_offsets, col_indices, values, bias, codebook);
  const Samples& samples = inputs.samples;
  const Weight& weight = inputs.weight;
  const std::int64_t rows = weight.args.rows;

  const PanelPlan plan(samples.count, samples.features);
  Panels panels(samples, plan);
  const Tensor y = EmptyWithLastDim(x, rows);
  char* y_data = static_cast<char*>(y.mutable_data_ptr());
  SharedStatus status;
  plan.ForWaves([&](std::int64_t first, std::int64_t count) {
    panels.Load(first, count);
    ParallelRanges(count, rows, GrainItems(weight.Work(plan.Width())),
                   [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
                     const std::int64_t panel = first + i;
                     char* y_of_panel = y_data + plan.Begin(panel) * rows * samples.item_bytes;
                     const CsrMatmulArgs args{weight.args, panels.At(panel), plan.Width(panel), inputs.bias.data,
                                              relu,        y_of_panel,       samples.stored_as, plan.SamplesIn(panel)};
                     status.Report(CsrMatmul(args, begin, end));
                   });
  });
  status.Raise(kOp, weight.args);
  return y;
}

Tensor CsrMatmulGradXOnCpu(const Tensor& grad_y, const Tensor& row_offsets, const Tensor& col_indices,
                           const Tensor& values, std::int64_t in_features, const std::optional<Tensor>& codebook) {
  constexpr const char* kOp = "csr_matmul_grad_x";
  const GradXInputs inputs(kOp, kCpu, grad_y, row_offsets, col_indices, values, in_features, codebook);
  const Samples& samples = inputs.samples;
  const Weight& weight = inputs.weight;

  const Tensor grad_x = EmptyWithLastDim(grad_y, in_features);
  // The threads share out the panels; a sample's sum does not depend on the panel that holds it.
  const PanelPlan plan(samples.count, in_features, torch::stable::get_num_threads());
  Panels panels(samples, plan);
  const Tensor sums = torch::stable::new_empty(grad_y, {plan.WaveFloats(in_features)}, ScalarType::Float);
  float* sums_data = sums.mutable_data_ptr<float>();
  char* grad_x_data = static_cast<char*>(grad_x.mutable_data_ptr());
  SharedStatus status;
  plan.ForWaves([&](std::int64_t first, std::int64_t count) {
    panels.Load(first, count);
    torch::stable::parallel_for(
        first, first + count, GrainItems(weight.args.rows * weight.Work(plan.Width())),
        [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t panel = begin; panel < end; ++panel) {
            float* sums_of_panel = sums_data + (panel - first) * plan.Width() * in_features;
            char* grad_x_of_panel = grad_x_data + plan.Begin(panel) * in_features * samples.item_bytes;
            const CsrGradXArgs args{weight.args,     panels.At(panel),  plan.Width(panel),    sums_of_panel,
                                    grad_x_of_panel, samples.stored_as, plan.SamplesIn(panel)};
            status.Report(CsrMatmulGradX(args));
          }
        });
  });
  status.Raise(kOp, weight.args);
  return grad_x;
}

Tensor CsrMatmulGradValuesOnCpu(const Tensor& grad_y, const Tensor& x, const Tensor& row_offsets,
                                const Tensor& col_indices) {
  constexpr const char* kOp = "csr_matmul_grad_values";
  const GradValuesInputs inputs(kOp, kCpu, grad_y, x, row_offsets, col_indices);
  const Samples &grads = inputs.grads, &samples = inputs.samples;
  const Weight& weight = inputs.weight;

  if (samples.count == 0) return torch::stable::new_zeros(x, {weight.args.nnz}, ScalarType::Float);
  const Tensor grad_values = torch::stable::new_empty(x, {weight.args.nnz}, ScalarType::Float);
  float* grad_values_data = grad_values.mutable_data_ptr<float>();
  const PanelPlan plan(samples.count, samples.features);
  Panels x_panels(samples, plan), grad_panels(grads, plan);
  SharedStatus status;
  plan.ForWaves([&](std::int64_t first, std::int64_t count) {
    x_panels.Load(first, count);
    grad_panels.Load(first, count);
    // Panel after panel, so that every sum over the batch has one order.
    torch::stable::parallel_for(
        0, weight.args.rows, GrainItems(count * weight.Work(plan.Width())), [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t panel = first; panel < first + count; ++panel) {
            const CsrGradValuesArgs args{weight.args, grad_panels.At(panel), x_panels.At(panel), plan.Width(panel),
                                         panel > 0,   grad_values_data};
            status.Report(CsrMatmulGradValues(args, begin, end));
          }
        });
  });
  status.Raise(kOp, weight.args);
  return grad_values;
}

std::tuple<Tensor, Tensor, Tensor> CsrPackOnCpu(const Tensor& dense) {
  constexpr const char* kOp = "csr_pack";
  CheckOnCpu(kOp, dense, "dense");
  STD_TORCH_CHECK(dense.dim() == 2, kOp, ": dense must be [rows, columns], got ", dense.dim(), "-D; reshape it");
  const Tensor source = Contiguous(dense);
  const std::int64_t rows = dense.size(0), columns = dense.size(1);
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  Tensor row_offsets = torch::stable::new_empty(dense, {rows + 1}, ScalarType::Int);
  CsrPackArgs args{source.const_data_ptr(), DtypeOf(kOp, dense, "dense", true), columns, nullptr, nullptr, nullptr};
  std::vector<std::int64_t> counts(rows);
  ParallelRanges(1, rows, GrainItems(columns / 8), [&](std::int64_t, std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) counts[r] = CsrCount(args, r);
  });
  std::int32_t* offsets = row_offsets.mutable_data_ptr<std::int32_t>();
  std::int64_t nnz = 0;
  for (std::int64_t r = 0; r < rows; nnz += counts[r++]) {
    STD_TORCH_CHECK(std::max(nnz, columns) <= kMax, kOp,
                    ": dense must have fewer than 2**31 non-zeros and columns, got more; split it by rows");
    offsets[r] = static_cast<std::int32_t>(nnz);
  }
  STD_TORCH_CHECK(nnz <= kMax, kOp, ": dense must have fewer than 2**31 non-zeros, got ", nnz, "; split it by rows");
  offsets[rows] = static_cast<std::int32_t>(nnz);
  Tensor col_indices = torch::stable::new_empty(dense, {nnz}, ScalarType::Int);
  Tensor values = torch::stable::new_empty(dense, {nnz}, dense.scalar_type());
  args.row_offsets = offsets;
  args.col_indices = col_indices.mutable_data_ptr<std::int32_t>();
  args.values = values.mutable_data_ptr();
  ParallelRanges(1, rows, GrainItems(columns / 2), [&](std::int64_t, std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) CsrPack(args, r);
  });
  return {row_offsets, col_indices, values};
}

#ifdef TERSETORCH_CUDA

Tensor CsrMatmulOnCuda(const Tensor& x, const Tensor& row_offsets, const Tensor& col_indices, const Tensor& values,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook, bool relu) {
  constexpr const char* kOp = "csr_matmul";
  const CudaCall call(kOp, x, "x");
  const MatmulInputs inputs(kOp, call.place(), x, row_offsets, col_indices, values, bias, codebook);
  const Samples& samples = inputs.samples;
  const Tensor y = EmptyWithLastDim(x, inputs.weight.args.rows);
  const std::int64_t panel_bytes = PanelBytes(samples.count, samples.features, samples.item_bytes);
  const Tensor panels = torch::stable::new_empty(x, {panel_bytes}, ScalarType::Byte);
  call.Check(CsrMatmulCuda({inputs.weight.args, samples.At(0), samples.stored_as, inputs.bias.data, relu,
                            y.mutable_data_ptr(), samples.count, panels.mutable_data_ptr()},
                           call.Stream()));
  return y;
}

Tensor CsrMatmulGradXOnCuda(const Tensor& grad_y, const Tensor& row_offsets, const Tensor& col_indices,
                            const Tensor& values, std::int64_t in_features, const std::optional<Tensor>& codebook) {
  constexpr const char* kOp = "csr_matmul_grad_x";
  const CudaCall call(kOp, grad_y, "grad_y");
  const GradXInputs inputs(kOp, call.place(), grad_y, row_offsets, col_indices, values, in_features, codebook);
  const Samples& samples = inputs.samples;
  const Tensor grad_x = EmptyWithLastDim(grad_y, in_features);
  const Tensor sums = samples.stored_as == FloatDtype::kFloat32
                          ? grad_x
                          : torch::stable::new_empty(grad_y, {samples.count * in_features}, ScalarType::Float);
  call.Check(CsrMatmulGradXCuda({inputs.weight.args, samples.At(0), samples.stored_as, sums.mutable_data_ptr<float>(),
                                 grad_x.mutable_data_ptr(), samples.count},
                                call.Stream()));
  return grad_x;
}

Tensor CsrMatmulGradValuesOnCuda(const Tensor& grad_y, const Tensor& x, const Tensor& row_offsets,
                                 const Tensor& col_indices) {
  constexpr const char* kOp = "csr_matmul_grad_values";
  const CudaCall call(kOp, grad_y, "grad_y");
  const GradValuesInputs inputs(kOp, call.place(), grad_y, x, row_offsets, col_indices);
  const Tensor grad_values = torch::stable::new_empty(x, {inputs.weight.args.nnz}, ScalarType::Float);
  call.Check(
      CsrMatmulGradValuesCuda({inputs.weight.args, inputs.grads.At(0), inputs.grads.stored_as, inputs.samples.At(0),
                               inputs.samples.stored_as, grad_values.mutable_data_ptr<float>(), inputs.samples.count},
                              call.Stream()));
  return grad_values;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("csr_matmul", TORCH_BOX(&CsrMatmulOnCpu));
  m.impl("csr_matmul_inference", TORCH_BOX(&CsrMatmulOnCpu));
  m.impl("csr_matmul_grad_x", TORCH_BOX(&CsrMatmulGradXOnCpu));
  m.impl("csr_matmul_grad_values", TORCH_BOX(&CsrMatmulGradValuesOnCpu));
  m.impl("csr_pack", TORCH_BOX(&CsrPackOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("csr_matmul", TORCH_BOX(&CsrMatmulOnCuda));
  m.impl("csr_matmul_inference", TORCH_BOX(&CsrMatmulOnCuda));
  m.impl("csr_matmul_grad_x", TORCH_BOX(&CsrMatmulGradXOnCuda));
  m.impl("csr_matmul_grad_values", TORCH_BOX(&CsrMatmulGradValuesOnCuda));
#else
  for (const char* op : {"csr_matmul", "csr_matmul_inference", "csr_matmul_grad_x", "csr_matmul_grad_values"}) {
    m.impl(op, &NotBuiltForCuda);
  }
#endif
}

}  // namespace tersetorch
