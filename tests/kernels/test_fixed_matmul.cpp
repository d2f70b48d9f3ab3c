// Products against the formula, conversions against the reference and that against the formula, bit by bit: shapes
// around every tile, numbers that overflow 32 bits at once, unaligned memory.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/common/philox.h"
#include "kernels/fixed_matmul/fixed_images.h"
#include "kernels/fixed_matmul/fixed_matmul.h"
#include "kernels/fixed_matmul_problem.h"
#include "kernels/parts.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  const FixedMatmulKernels* kernels;
};

// A problem in segments: two parts of the columns, the second before the first, samples in turned order.
template <typename Whole>
void TestProduct(const Variant& variant, Index samples, Index rows, Index columns, int bits, bool extreme,
                 std::mt19937& rng, Index segments = 1) {
  constexpr bool kWide = sizeof(Whole) == 2;
  const auto x = WholeNumbers<Whole>(samples * columns, bits, extreme, rng);
  const auto weight = WholeNumbers<Whole>(rows * columns, bits, extreme, rng);
  std::vector<Index> want(samples * rows);
  for (Index n = 0; n < samples; ++n) {
    for (Index r = 0; r < rows; ++r) {
      for (Index c = 0; c < columns; ++c) want[n * rows + r] += Index{x[n * columns + c]} * weight[r * columns + c];
    }
  }
  const Index part = columns / segments, of_word = FixedNumbersOfWord(kWide),
              part_words = (part + of_word - 1) / of_word;
  const Index words = segments * part_words, panels = (rows + kFixedPanel - 1) / kFixedPanel;
  Unaligned<char> packed(std::vector<char>(panels * (words + 1) * kFixedPanel * kFixedWord, 77));
  FixedPack({weight.data(), kWide, rows, columns, segments, packed.data()}, panels / 2, panels);
  FixedPack({weight.data(), kWide, rows, columns, segments, packed.data()}, 0, panels / 2);
  // As FixedSamples makes them, one part after the other.
  Index largest_x = 1, largest_w = 1;
  for (const Whole one : x) largest_x = std::max<Index>(largest_x, std::abs(int{one}));
  for (const Whole one : weight) largest_w = std::max<Index>(largest_w, std::abs(int{one}));
  for (const bool split : {false, true}) {
    if (split && !kWide) continue;
    const Index copies = split ? 2 : 1, of_part = copies * samples * part_words * kFixedWord;
    std::vector<char> numbers(segments * of_part);
    for (Index s = 0; s < segments; ++s) {
      std::vector<Whole> of_segment;
      for (Index n = 0; n < samples; ++n) {
        const auto from = x.begin() + n * columns + s * part;
        of_segment.insert(of_segment.end(), from, from + part);
      }
      FixedSamples({of_segment.data(), kWide, kWide, split, part, numbers.data() + (segments - 1 - s) * of_part}, 0,
                   samples);
    }
    Unaligned<char> of_x(numbers);
    std::vector<Index> sample_at, segment_at;
    for (Index n = 0; n < copies * samples; ++n) sample_at.push_back(n * part_words * kFixedWord);
    for (Index s = 0; s < segments; ++s) segment_at.push_back((segments - 1 - s) * of_part);
    const Index chunk = kWide ? 0x7fffffff / (2 * (split ? 128 : largest_x) * largest_w) : 16384;
    if (chunk == 0) continue;  // -2^15 times itself, twice
    std::atomic<bool> right = true;
    const Index tiles = (panels + kFixedTilePanels - 1) / kFixedTilePanels;
    InParts(tiles / 2, tiles, [&](Index begin, Index end) {
      std::vector<Index> sums(copies * samples * kFixedTile);
      for (Index panel = begin * kFixedTilePanels; panel < std::min(panels, end * kFixedTilePanels);
           panel += kFixedTilePanels) {
        const Index some = std::min(kFixedTilePanels, panels - panel);
        variant.kernels->multiply({of_x.data(), kWide, copies * samples, segments, part_words, chunk, sample_at.data(),
                                   segment_at.data(), packed.data(), sums.data()},
                                  panel, some);
        for (Index n = 0; n < samples; ++n) {
          for (Index i = 0; i < some * kFixedPanel; ++i) {
            const Index* of = &sums[copies * n * kFixedTile + i];
            const Index sum = split ? 256 * of[0] + of[kFixedTile] : of[0], r = panel * kFixedPanel + i;
            if (sum != (r < rows ? want[n * rows + r] : 0)) right = false;
          }
        }
      }
    });
    Expect(right, "%s: int%d, %ld samples, %ld rows, %ld columns in %ld segments, %d bits, extreme %d, split %d",
           variant.name, static_cast<int>(8 * sizeof(Whole)), long{samples}, long{rows}, long{columns}, long{segments},
           bits, extreme, split);
  }
}

void TestProducts(const Variant& variant, std::mt19937& rng) {
  for (const Index columns : {0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 131}) {
    for (const Index samples : {0, 1, 2, 3, 4, 5, 6, 7, 13}) {
      for (const Index rows : {0, 1, 15, 16, 17, 33, 48, 65}) {
        TestProduct<std::int8_t>(variant, samples, rows, columns, 8, rows == 33, rng);
        TestProduct<std::int16_t>(variant, samples, rows, columns, 13, false, rng);
      }
    }
    for (const bool extreme : {false, true}) {
      for (const Index samples : {1, 8}) TestProduct<std::int16_t>(variant, samples, 20, columns, 16, extreme, rng);
    }
  }
  // Several chunks of words, and segments.
  for (const Index columns : {1026, 2052}) {
    for (const Index samples : {1, 8}) {
      for (const Index segments : {1, 3, 9}) {
        TestProduct<std::int8_t>(variant, samples, 37, columns, 8, true, rng, segments);
        for (const int bits : {9, 13, 16}) {
          TestProduct<std::int16_t>(variant, samples, 37, columns, bits, bits == 16, rng, segments);
        }
      }
    }
  }
  TestProduct<std::int8_t>(variant, 1, 2, 70'000, 8, true, rng);  // beyond 32 bits
}

// Images padded, with the channels of a pixel together, as int8 raised, widened, or split.
template <typename X, typename To>
void TestImages(Index channels, Index height, Index width, bool channels_last, bool split, std::mt19937& rng) {
  FixedImages images;
  images.count = 2, images.channels = channels, images.height = height, images.width = width;
  images.pad_h = 1, images.pad_w = 2, images.channels_last = channels_last;
  const Index copies = split ? 2 : 1, pixels = height * width, high = height + 2, wide = width + 4;
  Unaligned<X> x(WholeNumbers<X>(2 * channels * pixels, 8 * sizeof(X), false, rng));
  const auto numbers = x.Values();
  std::vector<To> want(copies * 2 * high * wide * channels);
  for (std::size_t i = 0; i < want.size(); ++i) {
    const Index at = static_cast<Index>(i), c = at % channels, right = at / channels % wide - 2;
    const Index down = at / channels / wide % high - 1, copy = at / channels / wide / high % copies;
    const Index image = at / channels / wide / high / copies, pixel = down * width + right;
    int number = 0;
    if (down >= 0 && down < height && right >= 0 && right < width) {
      number = numbers[image * channels * pixels + (channels_last ? pixel * channels + c : c * pixels + pixel)];
    }
    const int low = static_cast<std::int8_t>(number);
    want[i] = static_cast<To>(sizeof(To) == 1 ? number + 128
                              : !split        ? number
                              : copy == 0     ? (number - low) / 256
                                              : low);
  }
  Unaligned<To> got(std::vector<To>(want.size(), 99));
  const FixedImageArgs args{x.data(), sizeof(X) == 2, sizeof(To) == 2, split, images, got.data()};
  InParts(1, 2 * high, [&](Index begin, Index end) { FixedImageRows(args, begin, end); });
  Expect(got.Values() == want, "int%d images of %ld x %ld x %ld, channels_last %d, split %d",
         static_cast<int>(8 * sizeof(X)), long{channels}, long{height}, long{width}, channels_last, split);
}

template <typename Value>
void TestPlanes(Index windows, Index rows, std::mt19937& rng) {
  const Index stride = rows + 3, pixels = windows + 2;
  std::vector<Value> numbers(windows * stride), want(rows * pixels, 7);
  for (Value& number : numbers) number = static_cast<Value>(rng());
  for (Index r = 0; r < rows; ++r) {
    for (Index n = 0; n < windows; ++n) want[r * pixels + n] = numbers[n * stride + r];
  }
  Unaligned<Value> values(numbers), got(std::vector<Value>(rows * pixels, 7));
  FixedPlanes(values.data(), stride, windows, rows, sizeof(Value), got.data(), pixels);
  Expect(got.Values() == want, "planes of %ld windows, %ld rows, %ld bytes", long{windows}, long{rows},
         static_cast<long>(sizeof(Value)));
}

void TestWindows(std::mt19937& rng) {
  for (const bool channels_last : {false, true}) {
    for (const Index channels : {1, 3, 8, 15, 16, 17, 24, 33}) {
      for (const Index width : {1, 7, 16, 18, 40}) {
        TestImages<std::int8_t, std::uint8_t>(channels, 3, width, channels_last, false, rng);
        TestImages<std::int8_t, std::int16_t>(channels, 3, width, channels_last, false, rng);
        for (const bool split : {false, true}) {
          TestImages<std::int16_t, std::int16_t>(channels, 3, width, channels_last, split, rng);
        }
      }
    }
  }
  for (const Index windows : {1, 3, 4, 16, 21, 64}) {
    for (const Index rows : {1, 4, 5, 15, 16, 37, 64}) {
      TestPlanes<std::int8_t>(windows, rows, rng);
      TestPlanes<std::int16_t>(windows, rows, rng);
      TestPlanes<std::int32_t>(windows, rows, rng);
    }
  }
}

Index BytesOfNumber(FixedAs as) { return as == FixedAs::kInt8 ? 1 : as == FixedAs::kInt16 ? 2 : 4; }

void TestConversion(const Variant& variant, FixedConvertArgs args, Index size, std::mt19937& rng) {
  // Three samples whose sums and values have room between them.
  args.rows = size;
  args.sums_stride = size + 3;
  args.y_stride = size + 2;
  Unaligned<Index> added(SumsOf(args, size, rng));
  for (const bool biased : {false, true}) {
    args.split = biased;
    args.added = biased ? added.data() : nullptr;
    auto of_all = SumsOf(args, 6 * args.sums_stride, rng);
    for (Index& sum : of_all) sum = biased ? sum >> 9 : sum;
    Unaligned<Index> sums(of_all);
    const Index bytes = 3 * args.y_stride * BytesOfNumber(args.as);
    Unaligned<unsigned char> got(std::vector<unsigned char>(bytes, 0xa5)),
        want(std::vector<unsigned char>(bytes, 0xa5));
    args.sums = sums.data();
    args.y = got.data();
    InParts(1, 3, [&](Index begin, Index end) { variant.kernels->convert(args, begin, end); });
    args.y = want.data();
    kFixedMatmulScalar.convert(args, 0, 3);
    Expect(got.Values() == want.Values(),
           "%s: %ld sums of %d fraction bits to <%d,%d>, stochastic %d, relu %d, as %d, biased %d", variant.name,
           long{size}, args.sum_fraction_bits, args.integer_bits, args.fraction_bits, args.stochastic, args.relu,
           static_cast<int>(args.as), biased);
  }
}

// Against the formula in long double, which has 64 bits.
void TestReference(std::mt19937& rng) {
  for (FixedConvertArgs args : Conversions()) {
    args.as = FixedAs::kInt32;
    const auto sums = SumsOf(args, 500, rng);
    std::vector<std::int32_t> got(sums.size());
    args.sums = sums.data();
    args.rows = args.sums_stride = args.y_stride = 500;
    args.y = got.data();
    kFixedMatmulScalar.convert(args, 0, 1);
    const long double high = std::ldexp(1.0L, args.integer_bits + args.fraction_bits - 1) - 1;
    bool right = true;
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const long double s = std::ldexp(static_cast<long double>(sums[i]), args.fraction_bits - args.sum_fraction_bits);
      const std::uint32_t u = RandomBits(args.seed, args.offset + i);
      const long double k =
          args.stochastic ? std::floor((std::floor(65536 * s + 0.5L) + u) / 65536) : std::floor(s + 0.5L);
      const long double low = args.relu ? 0 : -high - 1;
      // Beyond 2^62 even long double rounds, and everything saturates.
      right = right && got[i] == static_cast<std::int32_t>(k < low ? low : k > high ? high : k);
    }
    Expect(right, "reference: %d fraction bits to <%d,%d>, stochastic %d, relu %d", args.sum_fraction_bits,
           args.integer_bits, args.fraction_bits, args.stochastic, args.relu);
  }
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  TestReference(rng);
  TestWindows(rng);
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, &kFixedMatmulScalar},
                              {"avx2", CpuIsa::kAvx2, &kFixedMatmulAvx2},
                              {"avx512", CpuIsa::kAvx512, &kFixedMatmulAvx512}};
  for (const Variant& variant : variants) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    TestProducts(variant, rng);
    for (const FixedConvertArgs& args : Conversions()) {
      for (const Index size : {0, 1, 27, 64, 200}) TestConversion(variant, args, size, rng);
    }
  }
  return Failures() != 0;
}
