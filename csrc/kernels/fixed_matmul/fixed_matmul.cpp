#include "kernels/fixed_matmul/fixed_matmul.h"

#include "kernels/common/cpu_isa.h"
#include "kernels/common/scalars.h"

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

template <typename From, typename To, typename Change>
void Copy(const void* from, std::int64_t first, std::int64_t count, void* to, const Change& change) {
  for (std::int64_t i = 0; i < count; ++i) Put(to, i, static_cast<To>(change(int{At<From>(from, first + i)})));
}

int High(int x) { return (x + 128) >> 8; }
int Low(int x) { return x - 256 * High(x); }

}  // namespace

void FixedPack(const FixedPackArgs& args, std::int64_t begin, std::int64_t end) noexcept {
  args.wide ? Pack<std::int16_t>(args, begin, end) : Pack<std::int8_t>(args, begin, end);
}

void FixedSamples(const FixedSamplesArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  const std::int64_t of_word = FixedNumbersOfWord(a.wide), words = (a.columns + of_word - 1) / of_word;
  const std::int64_t size = words * kFixedWord;
  const auto same = [](int x) { return x; };
  for (std::int64_t n = begin; n < end; ++n) {
    char* to = static_cast<char*>(a.to) + n * size * (a.split ? 2 : 1);
    const std::int64_t first = n * a.columns;
    // Their weights are 0.
    for (std::int64_t i = 0; i < (a.split ? 2 : 1); ++i) {
      if (words > 0) Put(to + i * size, words - 1, std::int32_t{0});
    }
    if (!a.wide) {
      Copy<std::int8_t, std::uint8_t>(a.x, first, a.columns, to, [](int x) { return x + 128; });
    } else if (!a.x_wide) {
      Copy<std::int8_t, std::int16_t>(a.x, first, a.columns, to, same);
    } else if (!a.split) {
      Copy<std::int16_t, std::int16_t>(a.x, first, a.columns, to, same);
    } else {
      Copy<std::int16_t, std::int16_t>(a.x, first, a.columns, to, High);
      Copy<std::int16_t, std::int16_t>(a.x, first, a.columns, to + size, Low);
    }
  }
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
