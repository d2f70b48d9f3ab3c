#include "kernels/common/fixed_sums.h"
#include "kernels/common/scalars.h"
#include "kernels/fixed_matmul/fixed_matmul.h"

namespace tersetorch {
namespace {

void Multiply(const FixedMatmulArgs& a, std::int64_t panel, std::int64_t panels) noexcept {
  const std::int64_t words = a.segments * a.segment_words, of_word = FixedNumbersOfWord(a.wide);
  for (std::int64_t n = 0; n < a.samples; ++n) {
    for (std::int64_t row = 0; row < panels * kFixedPanel; ++row) {
      const char* w =
          static_cast<const char*>(a.packed) + (panel + row / kFixedPanel) * (words + 1) * kFixedPanel * kFixedWord;
      std::int64_t sum = 0;
      for (std::int64_t word = 0; word < words; ++word) {
        const char* x = static_cast<const char*>(a.x) + a.sample_at[n] + a.segment_at[word / a.segment_words];
        for (std::int64_t k = 0; k < of_word; ++k) {
          const std::int64_t i = word % a.segment_words * of_word + k;
          const std::int64_t j = (word * kFixedPanel + row % kFixedPanel) * of_word + k;
          sum += a.wide ? std::int64_t{At<std::int16_t>(x, i)} * At<std::int16_t>(w, j)
                        : std::int64_t{At<std::uint8_t>(x, i)} * At<std::int8_t>(w, j);
        }
      }
      Put(a.sums, n * kFixedTile + row,
          sum - (a.wide ? 0 : 128 * std::int64_t{At<std::int32_t>(w, words * kFixedPanel + row % kFixedPanel)}));
    }
  }
}

void Convert(const FixedConvertArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  const FixedConversion conversion(a.sum_fraction_bits, a.integer_bits, a.fraction_bits, a.stochastic, a.relu);
  for (std::int64_t n = begin; n < end; ++n) {
    for (std::int64_t r = 0; r < a.rows; ++r) {
      const auto sums = [&](std::int64_t m) { return At<std::int64_t>(a.sums, m * a.sums_stride + r); };
      const std::int64_t sum = a.split ? 256 * sums(2 * n) + sums(2 * n + 1) : sums(n);
      const std::int64_t i = n * a.y_stride + r;
      const std::uint32_t u = conversion.random ? RandomBits(a.seed, a.offset + static_cast<std::uint64_t>(i)) : 0;
      const std::int32_t k = conversion.Of(sum + (a.added == nullptr ? 0 : At<std::int64_t>(a.added, r)), u);
      PutFixed(a.y, i, k, a.fraction_bits, a.as);
    }
  }
}

}  // namespace

const FixedMatmulKernels kFixedMatmulScalar = {&Multiply, &Convert};

}  // namespace tersetorch
