#include "kernels/fixed_matmul/fixed_matmul.h"

#include "kernels/common/cpu_isa.h"
#include "kernels/common/scalars.h"
#include "kernels/fixed_matmul/fixed_numbers.h"

namespace tersetorch {
namespace {

const FixedMatmulKernels& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kFixedMatmulAvx512;
    case CpuIsa::kAvx2:
      return kFixedMatmulAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kFixedMatmulScalar;
}

template <typename Whole>
void Pack(const FixedPackArgs& a, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kOfWord = kFixedWord / static_cast<std::int64_t>(sizeof(Whole));
  const std::int64_t segment = a.segments == 0 ? 0 : a.columns / a.segments;
  const std::int64_t segment_words = (segment + kOfWord - 1) / kOfWord, words = a.segments * segment_words;
  for (std::int64_t panel = begin; panel < end; ++panel) {
    char* to = static_cast<char*>(a.packed) + panel * (words + 1) * kFixedPanel * kFixedWord;
    for (std::int64_t i = 0; i < kFixedPanel; ++i) {
      const std::int64_t r = panel * kFixedPanel + i;
      std::int32_t sum = 0, largest = 0;
      for (std::int64_t word = 0; word < words; ++word) {
        for (std::int64_t k = 0; k < kOfWord; ++k) {
          const std::int64_t within = word % segment_words * kOfWord + k;
          const std::int64_t c = word / segment_words * segment + within;
          const auto w = r < a.rows && within < segment ? At<Whole>(a.weight, r * a.columns + c) : Whole{0};
          Put(to, (word * kFixedPanel + i) * kOfWord + k, w);
          sum += w;
          largest = w > largest ? w : -w > largest ? -w : largest;
        }
      }
      Put(to, words * kFixedPanel + i, sizeof(Whole) == 1 ? sum : largest);
    }
  }
}

}  // namespace

void FixedPack(const FixedPackArgs& args, std::int64_t begin, std::int64_t end) noexcept {
  args.wide ? Pack<std::int16_t>(args, begin, end) : Pack<std::int8_t>(args, begin, end);
}

void FixedSamples(const FixedSamplesArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  const std::int64_t of_word = FixedNumbersOfWord(a.wide), words = (a.columns + of_word - 1) / of_word;
  WithNumbers(a.x_wide, a.wide, a.split, [&](auto from, auto into, const auto& change, int copy) {
    for (std::int64_t n = begin; n < end; ++n) {
      char* to = static_cast<char*>(a.to) + (a.split ? 2 * n + copy : n) * words * kFixedWord;
      if (words > 0) Put(to, words - 1, std::int32_t{0});  // past the last column, where weights are 0
      CopyNumbers<decltype(from), decltype(into)>(a.x, n * a.columns, a.columns, to, change);
    }
  });
}

std::int64_t FixedLargest(const void* numbers, std::int64_t count) noexcept {
  std::int16_t least = 0, most = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto x = At<std::int16_t>(numbers, i);
    least = x < least ? x : least;
    most = x > most ? x : most;
  }
  return -least > most ? -least : most;
}

void FixedMatmul(const FixedMatmulArgs& args, std::int64_t panel, std::int64_t panels) noexcept {
  Active().multiply(args, panel, panels);
}

void FixedConvert(const FixedConvertArgs& args, std::int64_t begin, std::int64_t end) noexcept {
  Active().convert(args, begin, end);
}

}  // namespace tersetorch
