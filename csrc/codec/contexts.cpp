#include "codec/contexts.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "codec/range_coder.h"

namespace tersetorch {
namespace {

constexpr std::size_t kContexts = 4;

// The logistic function and its inverse in integers: log odds in 256ths, probabilities in 65536ths.
constexpr std::int32_t kMostOdds = 2815;  // 11: a probability of 0.99998

class Logistic {
 public:
  constexpr Logistic() {
    // exp(-d / 256) by repeated multiplication, 2^32 being 1.
    std::uint64_t power = std::uint64_t{1} << 32;
    for (std::int32_t odds = 0; odds <= kMostOdds; ++odds) {
      const auto upper =
          static_cast<std::uint32_t>((std::uint64_t{kCertain} << 32) / ((std::uint64_t{1} << 32) + power));
      probability_[static_cast<std::size_t>(kMostOdds + odds)] = static_cast<std::uint16_t>(std::min(upper, 65535u));
      probability_[static_cast<std::size_t>(kMostOdds - odds)] = static_cast<std::uint16_t>(kCertain - upper);
      power = power * 4278222805u >> 32;  // 2^32 exp(-1 / 256)
    }
    std::int32_t odds = -kMostOdds;
    for (std::size_t step = 0; step < odds_.size(); ++step) {
      while (odds < kMostOdds && Probability(odds) < step * 16 + 8) ++odds;
      odds_[step] = static_cast<std::int16_t>(odds);
    }
  }

  // In (0, kCertain).
  constexpr std::uint32_t Probability(std::int32_t odds) const {
    return probability_[static_cast<std::size_t>(kMostOdds + std::clamp(odds, -kMostOdds, kMostOdds))];
  }

  constexpr std::int32_t Odds(std::uint32_t probability) const { return odds_[probability >> 4]; }

 private:
  std::array<std::uint16_t, 2 * kMostOdds + 1> probability_{};
  std::array<std::int16_t, 4096> odds_{};
};

constexpr Logistic kLogistic;

// 256 (n + 0.3) / (n + 1.5) after n bits.
constexpr auto kConfidence = [] {
  std::array<std::int32_t, AdaptiveBit::kMemory + 1> confidence{};
  for (std::size_t n = 0; n < confidence.size(); ++n) {
    confidence[n] = static_cast<std::int32_t>(256 * (10 * n + 3) / (10 * n + 15));
  }
  return confidence;
}();

// A context's bit and what it tells the mixer, which is kept, since it is wanted at once when the bit comes up again.
class Slot {
 public:
  std::int32_t Input() const { return input_; }

  void Update(std::uint32_t bit) {
    bit_.Update(bit);
    input_ = kLogistic.Odds(bit_.Probability()) * kConfidence[bit_.Seen()] / 256;
  }

 private:
  AdaptiveBit bit_;
  std::int32_t input_ = kLogistic.Odds(kCertain / 2) * kConfidence[0] / 256;
};

using Slots = std::array<Slot*, kContexts>;

class Mixer {
 public:
  template <typename Coder>
  std::uint32_t Code(Coder& coder, const Slots& slots, std::uint32_t bit) {
    std::array<std::int32_t, kContexts> inputs;
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < kContexts; ++i) {
      inputs[i] = slots[i]->Input();
      sum += std::int64_t{weights_[i]} * inputs[i];
    }
    // Four weights of at most 2^20 times inputs of at most 2815, by 2^16: within 32 bits.
    const std::uint32_t probability = kLogistic.Probability(static_cast<std::int32_t>(sum >> 16));
    bit = coder.Code(bit, probability);
    const std::int32_t error = (bit ? 65536 : 0) - static_cast<std::int32_t>(probability);
    for (std::size_t i = 0; i < kContexts; ++i) {
      const std::int32_t step = inputs[i] * error >> 16;  // a rate of 1 / 256
      weights_[i] = std::clamp(weights_[i] + step, -kMostWeight, kMostWeight);
      slots[i]->Update(bit);
    }
    return bit;
  }

 private:
  static constexpr std::int32_t kMostWeight = std::int32_t{1} << 20;
  std::array<std::int32_t, kContexts> weights_ = {22000, 22000, 22000, 22000};  // 2^16 is 1
};

// Steps of a quarter of an octave: 0 for 0, below 128 for any number.
std::uint32_t Quarters(std::uint32_t number) {
  if (number < 4) return number;
  const int shift = static_cast<int>(std::bit_width(number)) - 3;
  return static_cast<std::uint32_t>(4 * shift) + (number >> shift);
}

// For every number in [kFirst, kLast] how many of the rising edges it has reached, by kEvery numbers.
template <std::int32_t kFirst, std::int32_t kLast, std::int32_t kEvery, std::size_t kEdges>
class StepTable {
 public:
  constexpr explicit StepTable(const std::array<std::int32_t, kEdges>& edges) {
    std::size_t reached = 0;
    for (std::int32_t number = kFirst; number <= kLast; number += kEvery) {
      while (reached < kEdges && number >= edges[reached]) ++reached;
      steps_[static_cast<std::size_t>((number - kFirst) / kEvery)] = static_cast<std::uint8_t>(reached);
    }
  }

  constexpr std::uint32_t operator()(std::int32_t number) const {
    return steps_[static_cast<std::size_t>((number - kFirst) / kEvery)];
  }

 private:
  std::array<std::uint8_t, (kLast - kFirst) / kEvery + 1> steps_{};
};

// A signed size in 11 steps; symbols of fewer than 8 bits are scaled up to these.
constexpr StepTable<-256, 255, 1, 10> Steps({-60, -40, -25, -12, 0, 1, 12, 25, 40, 60});

// A share that follows what it is shown: 65536 is 1.
void Follow(std::int32_t& share, std::int32_t shown, int slowness) { share += (shown - share) >> slowness; }

// A share of stored weights in 12 steps; the edges are multiples of 4.
constexpr StepTable<0, kCertain, 4, 11> ShareSteps({800, 3300, 6600, 9800, 13100, 16400, 19700, 24500, 31000, 39000,
                                                    52000});

// Codes all positions: is_stored(position) for an encoder, store(position) for a decoder.
template <typename Coder, typename IsStored, typename Store>
void CodePositions(Coder& coder, const WeightGrid& grid, IsStored is_stored, Store store) {
  const auto kernel = static_cast<std::size_t>(grid.kernel);
  const auto channels = static_cast<std::size_t>(grid.channels);
  const auto line = static_cast<std::size_t>(grid.kernel_width);
  const std::size_t columns = channels * kernel;
  std::array<std::vector<Slot>, kContexts> bits = {std::vector<Slot>(12 * 12), std::vector<Slot>(8 * 16 * 4),
                                                   std::vector<Slot>(64), std::vector<Slot>(12 * 16)};
  std::array<Mixer, 16> mixers;
  // A margin of two channels before the row, so that what is left of the first is there to be read.
  const std::size_t margin = 2 * kernel;
  std::vector<std::uint8_t> row(columns + margin);
  std::vector<std::uint8_t> above(row.size());
  std::vector<std::uint8_t> before_above(row.size());
  std::int32_t usual = 19700;  // 0.3
  std::vector<std::int32_t> channel_share(channels, usual);
  std::int64_t position = 0;
  while (position < grid.size) {
    std::int32_t row_share = usual;
    for (std::size_t channel = 0; channel < channels; ++channel) {
      std::uint32_t in_kernel = 0;
      std::int32_t& share = channel_share[channel];
      for (std::size_t place = 0; place < kernel; ++place, ++position) {
        const std::size_t at = margin + channel * kernel + place;
        const std::size_t across = place % line;
        const std::uint32_t left = across > 0 ? row[at - 1] : 0;
        const std::uint32_t over = place >= line ? row[at - line] : 0;
        const auto clamped = static_cast<std::uint32_t>(std::min<std::size_t>(place, 15));
        const std::uint32_t share_step = ShareSteps(share);
        const Slots slots = {&bits[0][ShareSteps(row_share) * 12 + share_step],
                             &bits[1][(std::min(in_kernel, 7u) * 16 + clamped) * 4 + left * 2 + over],
                             &bits[2][row[at - kernel] * 32u + row[at - 2 * kernel] * 16u + above[at] * 8u +
                                      before_above[at] * 4u + left * 2 + over],
                             &bits[3][share_step * 16 + std::min(in_kernel, 15u)]};
        const std::uint32_t stored = mixers[clamped].Code(coder, slots, is_stored(position));
        if (stored) store(position);
        row[at] = static_cast<std::uint8_t>(stored);
        in_kernel += stored;
        const std::int32_t shown = stored ? 65536 : 0;
        Follow(row_share, shown, 6);
        Follow(share, shown, kernel > 1 ? 5 : 4);
        Follow(usual, shown, 10);
      }
    }
    std::swap(above, before_above);
    std::swap(row, above);
  }
}

// Codes one symbol for each position.
template <typename Coder, typename Symbol>
void CodeSymbols(Coder& coder, std::span<const std::int64_t> positions, const WeightGrid& grid, SymbolRange range,
                 std::span<Symbol> symbols) {
  const auto kernel = static_cast<std::size_t>(grid.kernel);
  const auto channels = static_cast<std::size_t>(grid.channels);
  const auto line = static_cast<std::size_t>(grid.kernel_width);
  const std::size_t columns = channels * kernel;
  const std::size_t alphabet = std::size_t{1} << range.width;
  const int scale = kMaxContextBits - range.width;
  std::array<std::vector<Slot>, kContexts> bits = {std::vector<Slot>(64 * alphabet), std::vector<Slot>(64 * alphabet),
                                                   std::vector<Slot>(121 * alphabet),
                                                   std::vector<Slot>(121 * alphabet)};
  std::array<Mixer, kMaxContextBits> mixers;
  std::vector<std::int16_t> row(columns + kernel);  // sizes, 0 where nothing is stored; a margin of one channel
  std::vector<std::int16_t> above(row.size());
  constexpr std::int32_t kUsualSize = 32 * 16;
  std::int32_t usual = kUsualSize;
  std::int32_t row_size = usual;
  std::vector<std::int32_t> channel_size(channels, usual);
  std::int32_t before = 0;
  std::int32_t before_that = 0;
  std::int64_t row_number = 0;
  std::int64_t last = -1;
  for (std::size_t item = 0; item < symbols.size(); ++item) {
    const std::int64_t position = positions.empty() ? static_cast<std::int64_t>(item) : positions[item];
    if (position <= last || position >= grid.size) {
      throw std::invalid_argument("contexts: positions must rise in [0, " + std::to_string(grid.size) + "), got " +
                                  std::to_string(position));
    }
    last = position;
    const std::int64_t number = position / static_cast<std::int64_t>(columns);
    for (std::int64_t rows = std::min<std::int64_t>(number - row_number, 2); rows > 0; --rows) {
      std::swap(row, above);
      std::fill(row.begin(), row.end(), 0);
    }
    if (number > row_number) row_size = usual;
    row_number = number;
    const std::size_t column = static_cast<std::size_t>(position - number * static_cast<std::int64_t>(columns));
    const std::size_t channel = column / kernel;
    const std::size_t place = column - channel * kernel;
    const std::size_t at = kernel + column;
    std::uint32_t near;
    if (kernel > 1) {
      near = Steps(place % line > 0 ? row[at - 1] : 0) * 11 + Steps(place >= line ? row[at - line] : 0);
    } else {
      near = Steps(before) * 11 + Steps(before_that);
    }
    std::int32_t& channel_mean = channel_size[channel];
    const std::array<std::size_t, kContexts> contexts = {Quarters(static_cast<std::uint32_t>(row_size)) * alphabet,
                                                         Quarters(static_cast<std::uint32_t>(channel_mean)) * alphabet,
                                                         near * alphabet,
                                                         (Steps(above[at]) * 11 + Steps(row[at - kernel])) * alphabet};
    const std::uint32_t given = std::is_const_v<Symbol> ? symbols[item] : 0;
    std::uint32_t node = 1;
    for (int bit = range.width - 1; bit >= 0; --bit) {
      const Slots slots = {&bits[0][contexts[0] + node], &bits[1][contexts[1] + node], &bits[2][contexts[2] + node],
                           &bits[3][contexts[3] + node]};
      node = node << 1 | mixers[static_cast<std::size_t>(bit)].Code(coder, slots, given >> bit & 1);
    }
    const auto symbol = static_cast<std::int32_t>(node - alphabet);
    if constexpr (!std::is_const_v<Symbol>) symbols[item] = static_cast<std::uint8_t>(symbol);
    const std::int32_t size = (symbol - range.center) * (1 << scale);
    row[at] = static_cast<std::int16_t>(size);
    before_that = before;
    before = size;
    const std::int32_t shown = std::abs(size) * 16;
    Follow(row_size, shown, 5);
    Follow(channel_mean, shown, 4);
    Follow(usual, shown, 10);
  }
}

}  // namespace

std::vector<std::uint8_t> EncodePositionsInContext(std::span<const std::int64_t> positions, const WeightGrid& grid) {
  RangeEncoder encoder;
  std::size_t next = 0;
  CodePositions(
      encoder, grid,
      [&](std::int64_t position) -> std::uint32_t { return next < positions.size() && positions[next] == position; },
      [&](std::int64_t) { ++next; });
  if (next != positions.size()) {
    throw std::invalid_argument("contexts: positions must rise in [0, " + std::to_string(grid.size) + "), got " +
                                std::to_string(positions[next]));
  }
  return encoder.Finish();
}

void DecodePositionsInContext(std::span<const std::uint8_t> stream, const WeightGrid& grid,
                              std::span<std::int64_t> positions) {
  RangeDecoder decoder(stream);
  std::size_t found = 0;
  CodePositions(
      decoder, grid, [](std::int64_t) { return 0u; },
      [&](std::int64_t position) {
        if (found == positions.size()) {
          throw std::invalid_argument("contexts: data must mark " + std::to_string(positions.size()) +
                                      " positions, got more");
        }
        positions[found++] = position;
      });
  if (found != positions.size()) {
    throw std::invalid_argument("contexts: data must mark " + std::to_string(positions.size()) + " positions, got " +
                                std::to_string(found));
  }
  decoder.Finish();
}

std::vector<std::uint8_t> EncodeSymbolsInContext(std::span<const std::uint8_t> symbols,
                                                 std::span<const std::int64_t> positions, const WeightGrid& grid,
                                                 SymbolRange range) {
  RangeEncoder encoder;
  CodeSymbols(encoder, positions, grid, range, symbols);
  return encoder.Finish();
}

void DecodeSymbolsInContext(std::span<const std::uint8_t> stream, std::span<const std::int64_t> positions,
                            const WeightGrid& grid, SymbolRange range, std::span<std::uint8_t> symbols) {
  RangeDecoder decoder(stream);
  CodeSymbols(decoder, positions, grid, range, symbols);
  decoder.Finish();
}

}  // namespace tersetorch
