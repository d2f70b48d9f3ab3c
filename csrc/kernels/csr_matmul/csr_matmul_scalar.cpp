#include "kernels/common/scalars.h"
#include "kernels/csr_matmul/csr_matmul.h"

namespace tersetorch {
namespace {

struct Row {
  std::int64_t begin, end;  // its non-zeros
};

Row RowAt(const CsrWeight& w, std::int64_t r) {
  return {At<std::int32_t>(w.row_offsets, r), At<std::int32_t>(w.row_offsets, r + 1)};
}

std::int64_t Column(const CsrWeight& w, std::int64_t k) {
  if (w.indexed_by == CsrIndices::kInt32) return At<std::int32_t>(w.col_indices, k);
  return At<std::uint16_t>(w.col_indices, k);
}

float Value(const CsrWeight& w, std::int64_t k) {
  switch (w.stored_as) {
    case CsrValues::kFloat32:
      return At<float>(w.values, k);
    case CsrValues::kBFloat16:
      return FromBFloat16(At<std::uint16_t>(w.values, k));
    case CsrValues::kCodes:
      break;
  }
  return At<float>(w.codebook, At<std::uint8_t>(w.values, k));
}

CsrStatus Check(const CsrWeight& w, Row row, bool with_values) {
  if (row.begin < 0 || row.end < row.begin || row.end > w.nnz) return CsrStatus::kBadRowOffsets;
  for (std::int64_t k = row.begin; k < row.end; ++k) {
    if (Column(w, k) < 0 || Column(w, k) >= w.columns) return CsrStatus::kBadColumn;
    if (with_values && w.stored_as == CsrValues::kCodes && At<std::uint8_t>(w.values, k) >= w.entries) {
      return CsrStatus::kBadCode;
    }
  }
  return CsrStatus::kOk;
}

CsrStatus Matmul(const CsrMatmulArgs& a, std::int64_t row_begin, std::int64_t row_end) noexcept {
  const CsrWeight& w = a.weight;
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    const Row row = RowAt(w, r);
    if (const CsrStatus status = Check(w, row, true); status != CsrStatus::kOk) return status;
    for (std::int64_t n = 0; n < a.samples; ++n) {
      float sum = 0;
      for (std::int64_t k = row.begin; k < row.end; ++k) {
        sum += Value(w, k) * At<float>(a.panel, Column(w, k) * a.width + n);
      }
      if (a.bias != nullptr) sum += At<float>(a.bias, r);
      Store(a.y, a.y_stored_as, n * w.rows + r, a.relu && sum < 0 ? 0.0f : sum);
    }
  }
  return CsrStatus::kOk;
}

CsrStatus GradX(const CsrGradXArgs& a) noexcept {
  const CsrWeight& w = a.weight;
  for (std::int64_t i = 0; i < w.columns * a.width; ++i) a.sums[i] = 0;
  for (std::int64_t r = 0; r < w.rows; ++r) {
    const Row row = RowAt(w, r);
    if (const CsrStatus status = Check(w, row, true); status != CsrStatus::kOk) return status;
    for (std::int64_t k = row.begin; k < row.end; ++k) {
      for (std::int64_t n = 0; n < a.samples; ++n) {
        a.sums[Column(w, k) * a.width + n] += Value(w, k) * At<float>(a.grad_panel, r * a.width + n);
      }
    }
  }
  for (std::int64_t n = 0; n < a.samples; ++n) {
    for (std::int64_t c = 0; c < w.columns; ++c) {
      Store(a.grad_x, a.grad_x_stored_as, n * w.columns + c, a.sums[c * a.width + n]);
    }
  }
  return CsrStatus::kOk;
}

CsrStatus GradValues(const CsrGradValuesArgs& a, std::int64_t row_begin, std::int64_t row_end) noexcept {
  const CsrWeight& w = a.weight;
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    const Row row = RowAt(w, r);
    if (const CsrStatus status = Check(w, row, false); status != CsrStatus::kOk) return status;
    for (std::int64_t k = row.begin; k < row.end; ++k) {
      float sum = 0;
      for (std::int64_t n = 0; n < a.width; ++n) {
        sum += At<float>(a.grad_panel, r * a.width + n) * At<float>(a.x_panel, Column(w, k) * a.width + n);
      }
      a.grad_values[k] = a.add ? a.grad_values[k] + sum : sum;
    }
  }
  return CsrStatus::kOk;
}

}  // namespace

const CsrKernels kCsrScalar{Matmul, GradX, GradValues};

}  // namespace tersetorch
