// The kernels among which CodebookMatmulCuda chooses; shared by their .cu files.
#pragma once

#include <type_traits>

#include "kernels/codebook_matmul/codebook_matmul_cuda.h"

namespace tersetorch {

// Up to so many samples each code is looked up by one lane for all of them.
inline constexpr std::int64_t kCodebookFewExact = 32, kCodebookFewFragments = 32;

// a.packed and, for int8, a.sample_scales from a.x. For exact products that is x in float32, rows aligned to 16 bytes.
int CodebookPackCuda(const CodebookMatmulCudaArgs& a, void* stream) noexcept;
int CodebookFewCuda(const CodebookMatmulCudaArgs& a, void* stream) noexcept;
// Parts of the columns for a call on the current device; a.parts holds their sums where there are several.
int CodebookTilePartsCuda(const CodebookMatmulCudaArgs& a) noexcept;
int CodebookTilesCuda(const CodebookMatmulCudaArgs& a, void* stream) noexcept;

namespace {

// Codes of 2 bits are multiplied as codes of 4, in whose registers they fit.
TERSETORCH_EVERYWHERE constexpr int KernelBits(std::int64_t entries) { return CodeBits(entries) == 8 ? 8 : 4; }

// Whether tables fit the shared memory of a block, as those of the fast kernels must, and columns an int with room.
inline bool HasFewTables(const CodebookWeight& w) {
  return w.column_block >= w.columns && w.columns < 1 << 30 && (!w.per_row || KernelBits(w.entries) == 4);
}

inline bool IsAligned(const void* p, std::uintptr_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; }
// Whether four numbers of x can be read at once, wherever a group of four columns begins, by kernels that take x as it
// lies: float16 is always packed.
inline bool TakesFourNumbers(const CodebookMatmulCudaArgs& a) {
  return a.stored_as != FloatDtype::kFloat16 && a.weight.columns % 4 == 0 &&
         IsAligned(a.x, a.stored_as == FloatDtype::kFloat32 ? 16 : 8);
}

// Calls run with the bits of a code in kernels and whether rows have their own tables, as types.
template <typename Run>
int WithCodes(const CodebookWeight& w, const Run& run) {
  using One = std::false_type;
  if (KernelBits(w.entries) == 8) return run(std::integral_constant<int, 8>{}, One{});
  if (w.per_row) return run(std::integral_constant<int, 4>{}, std::true_type{});
  return run(std::integral_constant<int, 4>{}, One{});
}

}  // namespace
}  // namespace tersetorch
