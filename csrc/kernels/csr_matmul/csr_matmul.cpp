#include "kernels/csr_matmul/csr_matmul.h"

#include "kernels/common/cpu_isa.h"
#include "kernels/common/scalars.h"

namespace tersetorch {
namespace {

const CsrKernels& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kCsrAvx512;
    case CpuIsa::kAvx2:
      return kCsrAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kCsrScalar;
}

// The bits of a number but for its sign; 0 for 0.0 and -0.0 alone.
template <typename Bits>
Bits Magnitude(const void* array, std::int64_t i) {
  return static_cast<Bits>(At<Bits>(array, i) << 1);
}

template <typename Bits>
std::int64_t Count(const CsrPackArgs& a, std::int64_t row) {
  std::int64_t count = 0;
  for (std::int64_t c = 0; c < a.columns; ++c) count += Magnitude<Bits>(a.dense, row * a.columns + c) != 0;
  return count;
}

template <typename Bits>
void Pack(const CsrPackArgs& a, std::int64_t row) {
  std::int64_t k = a.row_offsets[row];
  const std::int64_t end = a.row_offsets[row + 1];
  // Without a branch on the numbers, which no processor could foresee: a zero is overwritten by what follows it.
  for (std::int64_t c = 0; k < end; ++c) {
    a.col_indices[k] = static_cast<std::int32_t>(c);
    Put(a.values, k, At<Bits>(a.dense, row * a.columns + c));
    k += Magnitude<Bits>(a.dense, row * a.columns + c) != 0;
  }
}

}  // namespace

CsrStatus CsrMatmul(const CsrMatmulArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept {
  return Active().matmul(args, row_begin, row_end);
}

CsrStatus CsrMatmulGradX(const CsrGradXArgs& args) noexcept { return Active().grad_x(args); }

CsrStatus CsrMatmulGradValues(const CsrGradValuesArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept {
  return Active().grad_values(args, row_begin, row_end);
}

std::int64_t CsrCount(const CsrPackArgs& args, std::int64_t row) noexcept {
  return args.stored_as == FloatDtype::kFloat32 ? Count<std::uint32_t>(args, row) : Count<std::uint16_t>(args, row);
}

void CsrPack(const CsrPackArgs& args, std::int64_t row) noexcept {
  return args.stored_as == FloatDtype::kFloat32 ? Pack<std::uint32_t>(args, row) : Pack<std::uint16_t>(args, row);
}

}  // namespace tersetorch
