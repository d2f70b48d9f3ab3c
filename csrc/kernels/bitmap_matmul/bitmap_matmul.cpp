#include "kernels/bitmap_matmul/bitmap_matmul.h"

#include "kernels/common/cpu_isa.h"
#include "kernels/common/scalars.h"

namespace tersetorch {
namespace {

const BitmapKernels& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kBitmapAvx512;
    case CpuIsa::kAvx2:
      return kBitmapAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kBitmapScalar;
}

// Word is the unsigned integer that a value's bits fill; shifted left by one, those of 0 and -0 vanish.
template <typename Word>
void PackBits(const BitmapPackArgs& a, std::int64_t row_begin, std::int64_t row_end) {
  const std::int64_t words = BitmapWords(a.columns);
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    std::int32_t count = 0;
    for (std::int64_t w = 0; w < words; ++w) {
      const std::int64_t begin = r * a.columns + w * 64;
      const std::int64_t left = a.columns - w * 64 < 64 ? a.columns - w * 64 : 64;
      std::uint64_t bits = 0;
      for (std::int64_t j = 0; j < left; ++j) {
        bits |= std::uint64_t{static_cast<Word>(At<Word>(a.weight, begin + j) << 1) != 0} << j;
      }
      a.bitmap[r * words + w] = bits;
      count += __builtin_popcountll(bits);
    }
    a.row_offsets[r + 1] = count;
  }
}

template <typename Word>
void PackValues(const BitmapPackArgs& a, std::int64_t row_begin, std::int64_t row_end) {
  const std::int64_t words = BitmapWords(a.columns);
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    std::int64_t k = a.row_offsets[r];
    for (std::int64_t w = 0; w < words; ++w) {
      for (std::uint64_t bits = a.bitmap[r * words + w]; bits != 0; bits &= bits - 1) {
        Put(a.values, k++, At<Word>(a.weight, r * a.columns + w * 64 + __builtin_ctzll(bits)));
      }
    }
  }
}

}  // namespace

bool BitmapPackSamples(const BitmapSamplesArgs& args) noexcept { return Active().pack_samples(args); }

BitmapStatus BitmapMatmul(const BitmapMatmulArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept {
  return Active().matmul(args, row_begin, row_end);
}

void BitmapPackBits(const BitmapPackArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept {
  if (args.stored_as == FloatDtype::kFloat32) return PackBits<std::uint32_t>(args, row_begin, row_end);
  PackBits<std::uint16_t>(args, row_begin, row_end);
}

void BitmapPackValues(const BitmapPackArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept {
  if (args.stored_as == FloatDtype::kFloat32) return PackValues<std::uint32_t>(args, row_begin, row_end);
  PackValues<std::uint16_t>(args, row_begin, row_end);
}

void BitmapFromColumns(const std::int32_t* row_offsets, const std::int32_t* col_indices, std::int64_t columns,
                       std::uint64_t* bitmap, std::int64_t row_begin, std::int64_t row_end) noexcept {
  const std::int64_t words = BitmapWords(columns);
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    for (std::int64_t w = 0; w < words; ++w) bitmap[r * words + w] = 0;
    for (std::int64_t k = row_offsets[r]; k < row_offsets[r + 1]; ++k) {
      bitmap[r * words + col_indices[k] / 64] |= std::uint64_t{1} << col_indices[k] % 64;
    }
  }
}

BitmapStatus BitmapToColumns(const std::uint64_t* bitmap, const std::int32_t* row_offsets, std::int64_t columns,
                             std::int64_t nnz, std::int32_t* col_indices, std::int64_t row_begin,
                             std::int64_t row_end) noexcept {
  const std::int64_t words = BitmapWords(columns);
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    std::int64_t k = At<std::int32_t>(row_offsets, r);
    const std::int64_t end = At<std::int32_t>(row_offsets, r + 1);
    if (k < 0 || end < k || end > nnz) return BitmapStatus::kBadRowOffsets;
    for (std::int64_t w = 0; w < words; ++w) {
      for (auto bits = At<std::uint64_t>(bitmap, r * words + w); bits != 0; bits &= bits - 1) {
        const std::int64_t column = w * 64 + __builtin_ctzll(bits);
        if (k == end || column >= columns) return BitmapStatus::kBadBitmap;
        col_indices[k++] = static_cast<std::int32_t>(column);
      }
    }
    if (k != end) return BitmapStatus::kBadBitmap;
  }
  return BitmapStatus::kOk;
}

}  // namespace tersetorch
