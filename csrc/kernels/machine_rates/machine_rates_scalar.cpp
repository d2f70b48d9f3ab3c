#include "kernels/machine_rates/machine_rates.h"

namespace tersetorch {
namespace {

constexpr int kSums = 16;

void Float32(std::int64_t passes) noexcept {
  volatile float unknown = 1;
  const float a = unknown, b = unknown;
  float sums[kSums] = {};
  for (; passes > 0; --passes) {
    for (float& sum : sums) sum = sum * a + b;
  }
  for (const float sum : sums) unknown = sum;
}

void Binary(std::int64_t passes) noexcept {
  volatile std::uint64_t unknown = 0x123456789abcdef;
  const std::uint64_t w = unknown;
  std::uint64_t counts[kSums] = {};
  for (; passes > 0; --passes) {
    for (std::uint64_t& count : counts) count += static_cast<std::uint64_t>(__builtin_popcountll(w ^ count));
  }
  for (const std::uint64_t count : counts) unknown = count;
}

void Read(const void* buffer, std::int64_t blocks, std::int64_t passes) noexcept {
  constexpr int kWords = kRatesReadBlock / 8;
  std::uint64_t bits = 0;
  for (; passes > 0; --passes) {
    for (std::int64_t i = 0; i < blocks; ++i) {
      std::uint64_t words[kWords];
      __builtin_memcpy(words, static_cast<const char*>(buffer) + i * kRatesReadBlock, sizeof words);
      for (const std::uint64_t word : words) bits |= word;
    }
  }
  volatile std::uint64_t used = bits;
  static_cast<void>(used);
}

}  // namespace

const MachineRateLoops kMachineRatesScalar = {
    {2 * kSums, 0, 0, 2 * 64 * kSums}, {Float32, nullptr, nullptr, Binary}, Read};

}  // namespace tersetorch
