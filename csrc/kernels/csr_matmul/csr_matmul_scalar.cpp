#include "kernels/csr_matmul/csr_matmul.h"

namespace tersetorch {
namespace {

// Element i of an array that may be unaligned.
template <typename T>
T At(const void* array, std::int64_t i) {
  T value;
  __builtin_memcpy(&value, static_cast<const char*>(array) + i * static_cast<std::int64_t>(sizeof(T)), sizeof value);
  return value;
}

template <typename T>
void Put(void* array, std::int64_t i, T value) {
  __builtin_memcpy(static_cast<char*>(array) + i * static_cast<std::int64_t>(sizeof(T)), &value, sizeof value);
}

float FromBFloat16(std::uint16_t high_half) { return __builtin_bit_cast(float, std::uint32_t{high_half} << 16); }

// Nearest, ties to even; NaN stays NaN.
std::uint16_t ToBFloat16(float value) {
  const auto bits = __builtin_bit_cast(std::uint32_t, value);
  if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float Load(const void* array, CsrFloat stored_as, std::int64_t i) {
  return stored_as == CsrFloat::kFloat32 ? At<float>(array, i) : FromBFloat16(At<std::uint16_t>(array, i));
}

void Store(void* array, CsrFloat stored_as, std::int64_t i, float value) {
  if (stored_as == CsrFloat::kFloat32) {
    Put(array, i, value);
  } else {
    Put(array, i, ToBFloat16(value));
  }
}

struct Row {
  std::int64_t begin, end;  // its non-zeros
};

Row RowAt(const CsrWeight& w, std::int64_t r) {
  return {At<std::int32_t>(w.row_offsets, r), At<std::int32_t>(w.row_offsets, r + 1)};
}

std::int64_t Column(const CsrWeight& w, std::int64_t k) { return At<std::int32_t>(w.col_indices, k); }

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

void Pack(const CsrPackArgs& a, std::int64_t feature_begin, std::int64_t feature_end) noexcept {
  for (std::int64_t c = feature_begin; c < feature_end; ++c) {
    for (std::int64_t n = 0; n < a.width; ++n) {
      a.panel[c * a.width + n] = n < a.samples ? Load(a.x, a.stored_as, n * a.features + c) : 0.0f;
    }
  }
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
      Store(a.y, a.y_stored_as, n * w.rows + r, a.bias == nullptr ? sum : sum + At<float>(a.bias, r));
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

const CsrKernels kCsrScalar{Pack, Matmul, GradX, GradValues};

}  // namespace tersetorch
