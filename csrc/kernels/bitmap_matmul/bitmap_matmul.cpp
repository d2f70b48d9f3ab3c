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

// Which of `count` <= 64 values from element `begin` on are not 0. Word is the unsigned integer that a value's bits
// fill; shifted left by one, those of 0 and -0 vanish. First as bytes, which the compiler does several at a time.
template <typename Word>
std::uint64_t BitsOf(const void* array, std::int64_t begin, std::int64_t count) {
  Word words[64] = {};
  __builtin_memcpy(words, static_cast<const char*>(array) + begin * static_cast<std::int64_t>(sizeof(Word)),
                   count * sizeof(Word));
  std::uint8_t set[64];
  for (int j = 0; j < 64; ++j) set[j] = static_cast<Word>(words[j] << 1) != 0;
  std::uint64_t bits = 0;
  for (int j = 0; j < 64; j += 8) {
    // Byte i of eight, times 2^(56 - 7 i), has its lowest bit at 56 + i, and no two products meet.
    bits |= At<std::uint64_t>(set, j / 8) * 0x0102040810204080 >> 56 << j;
  }
  return bits;
}

template <typename Word>
void PackBits(const BitmapPackArgs& a, std::int64_t row_begin, std::int64_t row_end) {
  const std::int64_t words = BitmapWords(a.columns);
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    std::int32_t count = 0;
    for (std::int64_t w = 0; w < words; ++w) {
      const std::int64_t left = a.columns - w * 64 < 64 ? a.columns - w * 64 : 64;
      const std::uint64_t bits = BitsOf<Word>(a.weight, r * a.columns + w * 64, left);
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

std::int64_t BitmapFindActive(const void* x, FloatDtype x_stored_as, std::int64_t features, std::int32_t* active,
                              float* values, bool* finite) noexcept {
  std::int64_t count = 0;
  std::uint32_t largest = 0;
  for (std::int64_t c = 0; c < features; ++c) {
    const float value = Load(x, x_stored_as, c);
    active[count] = static_cast<std::int32_t>(c);
    values[count] = value;
    count += value != 0;
    const auto bits = __builtin_bit_cast(std::uint32_t, value) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  *finite = largest < 0x7f800000;
  return count;
}

BitmapStatus BitmapColumns(const BitmapColumnsArgs& args, std::int64_t word_begin, std::int64_t word_end) noexcept {
  return Active().columns(args, word_begin, word_end);
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
