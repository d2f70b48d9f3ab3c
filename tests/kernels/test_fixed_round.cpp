// The generator against published numbers, the reference against the formula, and every variant against the reference,
// bit by bit, on parts of blocks and unaligned memory.
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/common/philox.h"
#include "kernels/fixed_round/fixed_round.h"
#include "kernels/fixed_round_problem.h"
#include "kernels/parts.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  FixedRoundVariant round;
};

constexpr FixedAs kAll[] = {FixedAs::kFloats, FixedAs::kInt8, FixedAs::kInt16, FixedAs::kInt32};

void TestPhilox() {
  // The first of the generator's published test vectors.
  const PhiloxWords zero = Philox(0, 0);
  const std::uint32_t want[] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  for (int i = 0; i < 4; ++i) Expect(zero.word[i] == want[i], "philox: word %d of counter 0", i);
  Expect(RandomBits(0, 0) == 0xe8d5 && RandomBits(0, 16) == 0x6627 && RandomBits(0, 1) == 0xc58d &&
             RandomBits(0, 32) == 0xac4c && RandomBits(0, 49) == 0x9b00,
         "philox: bits of values");
}

// One value, as whole numbers.
std::int32_t RoundOne(float x, FixedFormat format, bool stochastic, std::uint64_t seed, std::uint64_t n) {
  std::int32_t k = 0;
  kFixedRoundScalar(
      {&x, FloatDtype::kFloat32, format.integer_bits, format.fraction_bits, stochastic, seed, n, &k, FixedAs::kInt32},
      0, 1);
  return k;
}

void TestReference() {
  const FixedFormat f{2, 2};  // steps of 1/4 in [-2, 1.75]
  const float of[] = {0.125f, -0.125f, 0.124f, -0.126f, 1.75f, 1.9f, 3e38f, INFINITY, -2.0f, -2.2f, -INFINITY, 1e-40f};
  const std::int32_t want[] = {1, 0, 0, -1, 7, 7, 7, 7, -8, -8, -8, 0};
  for (std::size_t i = 0; i < std::size(of); ++i) {
    Expect(RoundOne(of[i], f, false, 0, 0) == want[i], "nearest: %g", static_cast<double>(of[i]));
  }
  // Up as often as the fraction says; numbers of the format and those a tiny bit away stay.
  for (const float x : {0.3f, -0.3f, 1.1f, -1.9f, 0.25f, -0.5f, 1e-40f, -1e-40f, 1.75f, -2.0f}) {
    const int draws = 20000;
    double sum = 0;
    bool near = true;
    for (int n = 0; n < draws; ++n) {
      const std::int32_t k = RoundOne(x, f, true, 7, static_cast<std::uint64_t>(n));
      near = near && std::fabs(k - 4 * x) < 1;
      sum += k;
    }
    const double fraction = 4 * x - std::floor(4 * x), deviation = std::sqrt(fraction * (1 - fraction) / draws);
    Expect(near && std::fabs(sum / draws - 4 * x) <= 4 * deviation + 1e-5, "stochastic: %g has mean %g",
           static_cast<double>(x), sum / draws / 4);
  }
}

void TestOne(const Variant& variant, Index size, FixedFormat format, FloatDtype stored_as, FixedAs as, bool stochastic,
             std::uint64_t offset, std::mt19937& rng) {
  const auto numbers = FixedNumbers(size, format, stored_as, rng);
  Unaligned<float> floats(numbers);
  Unaligned<std::uint16_t> halves(HalvesOf(numbers));
  const void* x = stored_as == FloatDtype::kFloat32 ? static_cast<void*>(floats.data()) : halves.data();
  const Index bytes = size * BytesOf(as, stored_as), part = size / 3;
  Unaligned<unsigned char> got(std::vector<unsigned char>(bytes, 0xa5)), want(std::vector<unsigned char>(bytes, 0x5a));
  FixedRoundArgs args{
      x, stored_as, format.integer_bits, format.fraction_bits, stochastic, 0x123456789abcdef0, offset, got.data(), as};
  bool late = false, early = false;
  AtOnce([&] { early = variant.round(args, 0, part); }, [&] { late = variant.round(args, part, size); });
  args.y = want.data();
  const bool undefined = kFixedRoundScalar(args, 0, size);
  Expect(got.Values() == want.Values() && (early || late) == undefined,
         "%s: %ld values to <%d,%d>, floats %d, as %d, stochastic %d, offset %ld", variant.name, long{size},
         format.integer_bits, format.fraction_bits, static_cast<int>(stored_as), static_cast<int>(as), stochastic,
         static_cast<long>(offset));
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  TestPhilox();
  TestReference();
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kFixedRoundScalar},
                              {"avx2", CpuIsa::kAvx2, kFixedRoundAvx2},
                              {"avx512", CpuIsa::kAvx512, kFixedRoundAvx512}};
  for (const Variant& variant : variants) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    for (const FixedFormat format : kFixedFormats) {
      for (const FloatDtype stored_as : kFloats) {
        for (const FixedAs as : kAll) {
          if (!Holds(as, format)) continue;
          for (const bool stochastic : {false, true}) {
            for (const Index size : {0, 1, 15, 63, 64, 65, 131, 1000}) {
              for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{37}, (std::uint64_t{1} << 35) - 7}) {
                TestOne(variant, size, format, stored_as, as, stochastic, offset, rng);
              }
            }
          }
        }
      }
    }
  }
  return Failures() != 0;
}
