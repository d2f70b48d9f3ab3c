// One bit at a time at a probability of its own, and probabilities that learn.
//
// A message is a number in an interval: each bit keeps the part of [low, high] that is as wide as the bit is probable.
// Bytes that low and high share are written. The end is as short as can be: 0 to 4 bytes, so that the number, zeros
// following it, lies in the interval.
// Witten, Neal and Cleary, "Arithmetic coding for data compression", CACM 30 (1987); without carries as in Mahoney,
// "Adaptive weighing of context models for lossless data compression" (2005). All arithmetic is of integers, so that a
// file reads the same everywhere.
//
// A model is written once for both directions: coder.Code(bit, probability) returns the bit, which an encoder is given
// and a decoder finds out.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/common/export.h"

namespace tersetorch {

// Of 1; probabilities lie in (0, kCertain).
inline constexpr std::uint32_t kCertain = 65536;

class TERSETORCH_API RangeEncoder {
 public:
  std::uint32_t Code(std::uint32_t bit, std::uint32_t probability_of_1) {
    const std::uint32_t middle =
        low_ + static_cast<std::uint32_t>(std::uint64_t{high_ - low_} * probability_of_1 >> 16);
    bit ? high_ = middle : low_ = middle + 1;
    for (; (low_ ^ high_) >> 24 == 0; low_ <<= 8, high_ = high_ << 8 | 255) {
      bytes_.push_back(static_cast<std::uint8_t>(high_ >> 24));
    }
    return bit;
  }

  // The message; the encoder is of no use afterwards.
  std::vector<std::uint8_t> Finish();

 private:
  std::uint32_t low_ = 0;
  std::uint32_t high_ = ~std::uint32_t{0};
  std::vector<std::uint8_t> bytes_;
};

class TERSETORCH_API RangeDecoder {
 public:
  // Reads from memory that the caller keeps alive.
  explicit RangeDecoder(std::span<const std::uint8_t> bytes);

  // The next bit; the first argument is for an encoder. Throws std::invalid_argument when the message has ended.
  std::uint32_t Code(std::uint32_t, std::uint32_t probability_of_1) {
    const std::uint32_t middle =
        low_ + static_cast<std::uint32_t>(std::uint64_t{high_ - low_} * probability_of_1 >> 16);
    const std::uint32_t bit = number_ <= middle;
    // Nobody can guess a branch here.
    high_ = bit ? middle : high_;
    low_ = bit ? low_ : middle + 1;
    for (; (low_ ^ high_) >> 24 == 0; low_ <<= 8, high_ = high_ << 8 | 255) Shift();
    return bit;
  }

  // Throws std::invalid_argument when bytes are left.
  void Finish() const;

 private:
  void Shift() {
    if (next_ >= bytes_.size() + 4) RefuseEnd();
    number_ = number_ << 8 | (next_ < bytes_.size() ? bytes_[next_] : 0u);
    ++next_;
  }
  [[noreturn]] static void RefuseEnd();

  std::span<const std::uint8_t> bytes_;
  std::size_t next_ = 0;  // bytes taken, up to four of them beyond the end
  std::uint32_t low_ = 0;
  std::uint32_t high_ = ~std::uint32_t{0};
  std::uint32_t number_ = 0;
};

// The probability of 1 after what was seen: an average over at most about kMemory bits, which begins at a half.
class AdaptiveBit {
 public:
  static constexpr std::uint32_t kMemory = 255;

  // In (0, kCertain).
  std::uint32_t Probability() const { return (state_ >> 16) | 1; }

  // Bits seen, up to kMemory.
  std::uint32_t Seen() const { return state_ & 1023; }

  void Update(std::uint32_t bit) {
    const std::uint32_t seen = Seen();
    const auto distance = static_cast<std::int64_t>(bit << 22) - static_cast<std::int64_t>(state_ >> 10);
    // 1 / (seen + 1.6): after one bit the probability is near a fifth or four fifths.
    const auto step = static_cast<std::int32_t>(distance * kRates[seen] >> 16);
    state_ += static_cast<std::uint32_t>(step) << 10;
    state_ += seen < kMemory;
  }

  template <typename Coder>
  std::uint32_t Code(Coder& coder, std::uint32_t bit) {
    bit = coder.Code(bit, Probability());
    Update(bit);
    return bit;
  }

 private:
  static constexpr std::array<std::int32_t, kMemory + 1> kRates = [] {
    std::array<std::int32_t, kMemory + 1> rates{};
    for (std::size_t seen = 0; seen < rates.size(); ++seen) {
      rates[seen] = static_cast<std::int32_t>(655360 / (10 * seen + 16));
    }
    return rates;
  }();

  std::uint32_t state_ = std::uint32_t{1} << 31;  // probability in 22 bits, bits seen in 10
};

// Numbers of Bits bits, the highest first, each bit with the probability that it has after those above it.
template <int Bits>
class AdaptiveTree {
 public:
  template <typename Coder>
  std::uint32_t Code(Coder& coder, std::uint32_t number) {
    std::uint32_t node = 1;
    for (int bit = Bits - 1; bit >= 0; --bit) node = node << 1 | nodes_[node].Code(coder, number >> bit & 1);
    return node - (std::uint32_t{1} << Bits);
  }

 private:
  std::array<AdaptiveBit, std::size_t{1} << Bits> nodes_;
};

// Codes the low `width` bits as they are, width <= 64.
template <typename Coder>
std::uint64_t CodePlainBits(Coder& coder, std::uint64_t number, int width) {
  std::uint64_t found = 0;
  for (int bit = width - 1; bit >= 0; --bit) {
    found = found << 1 | coder.Code(static_cast<std::uint32_t>(number >> bit & 1), kCertain / 2);
  }
  return found;
}

}  // namespace tersetorch
