#include "codec/rans.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "codec/range_coder.h"

namespace tersetorch {
namespace {

constexpr int kMinScaleBits = 12;
constexpr int kMaxScaleBits = 15;
constexpr int kFinest = 3;  // levels an octave, as a power of two
constexpr std::uint32_t kLowest = std::uint32_t{1} << 16;
constexpr std::size_t kManySymbols = 2048;  // from here on states are cheap

// 2^15 2^(i / 8)
constexpr std::array<std::uint64_t, 8> kEighths = {32768, 35734, 38968, 42495, 46341, 50535, 55109, 60097};

int MaxLevel(int levels_an_octave) { return kMaxScaleBits << levels_an_octave | 1; }

// Calls nothing but coder.Code: the table in either direction.
template <typename Coder>
class LevelCoder {
 public:
  std::uint32_t Code(Coder& coder, std::uint32_t level) {
    const std::uint32_t used = used_[(before_ > 0) * 2 + (before_that_ > 0)].Code(coder, level > 0);
    before_that_ = before_;
    before_ = used;
    if (!used) return 0;
    const auto expected = static_cast<std::int32_t>((last_ + last_but_one_) / 2);
    const std::int32_t found = expected + Signed(coder, static_cast<std::int32_t>(level) - expected);
    last_but_one_ = last_;
    last_ = found & 0xffff;
    return static_cast<std::uint32_t>(found);
  }

 private:
  std::int32_t Signed(Coder& coder, std::int32_t number) {
    const auto folded = static_cast<std::uint32_t>(number < 0 ? -2 * number : 2 * number + 1);  // >= 1
    const std::uint32_t width = widths_.Code(coder, static_cast<std::uint32_t>(std::bit_width(folded)));
    std::uint32_t found = width > 0;
    for (int bit = static_cast<int>(width) - 2; bit >= 0; --bit) {
      found = found << 1 | bits_[width * 16 + static_cast<std::uint32_t>(bit)].Code(coder, folded >> bit & 1);
    }
    return found & 1 ? static_cast<std::int32_t>(found >> 1) : -static_cast<std::int32_t>(found >> 1);
  }

  std::uint32_t before_ = 1;
  std::uint32_t before_that_ = 1;
  std::int32_t last_ = 0;
  std::int32_t last_but_one_ = 0;
  std::array<AdaptiveBit, 4> used_;
  AdaptiveTree<4> widths_;
  std::array<AdaptiveBit, 256> bits_;
};

std::vector<std::uint8_t> EncodeTable(std::span<const std::uint16_t> levels) {
  RangeEncoder encoder;
  LevelCoder<RangeEncoder> coder;
  for (const std::uint16_t level : levels) coder.Code(encoder, level);
  return encoder.Finish();
}

std::vector<std::uint16_t> DecodeTable(std::span<const std::uint8_t> table, std::size_t alphabet, int max_level) {
  RangeDecoder decoder(table);
  LevelCoder<RangeDecoder> coder;
  std::vector<std::uint16_t> levels(alphabet);
  for (std::uint16_t& slot : levels) {
    const std::uint32_t level = coder.Code(decoder, 0);
    if (level > static_cast<std::uint32_t>(max_level)) {
      throw std::invalid_argument("rans: levels must lie in [0, " + std::to_string(max_level) + "], got another");
    }
    slot = static_cast<std::uint16_t>(level);
  }
  decoder.Finish();
  return levels;
}

// Frequencies that sum to 2^scale_bits; there are at most half as many used symbols, and at least one.
std::vector<std::uint32_t> Frequencies(std::span<const std::uint16_t> levels, int levels_an_octave, int scale_bits) {
  const auto weight = [&](std::uint16_t level) -> std::uint64_t {
    const int steps = (level - 1) << (kFinest - levels_an_octave);  // eighths of an octave
    return level == 0 ? 0 : kEighths[static_cast<std::size_t>(steps % 8)] << (steps / 8);
  };
  std::uint64_t total = 0;
  for (const std::uint16_t level : levels) total += weight(level);
  std::vector<std::uint32_t> frequencies(levels.size());
  std::uint64_t sum = 0;
  std::int64_t given = 0;
  for (std::size_t symbol = 0; symbol < levels.size(); ++symbol) {
    if (levels[symbol] == 0) continue;
    sum += weight(levels[symbol]);
    const auto due = static_cast<std::int64_t>(((sum << scale_bits) + total / 2) / total) - given;
    frequencies[symbol] = static_cast<std::uint32_t>(std::max<std::int64_t>(1, due));
    given += frequencies[symbol];
  }
  // The last symbols may have got more than was left.
  for (std::int64_t over = given - (std::int64_t{1} << scale_bits); over > 0;) {
    std::uint32_t& most = *std::max_element(frequencies.begin(), frequencies.end());
    const std::uint32_t taken = static_cast<std::uint32_t>(std::min<std::int64_t>(over, most / 2));
    most -= taken;
    over -= taken;
  }
  return frequencies;
}

[[noreturn]] void Refuse(const char* rule) { throw std::invalid_argument(std::string("rans: data must ") + rule); }

}  // namespace

RansCoding BestRansCoding(std::span<const std::uint64_t> counts) {
  const auto used = static_cast<std::size_t>(std::count_if(counts.begin(), counts.end(), [](auto n) { return n > 0; }));
  if (used > kMaxRansSymbols) {
    throw std::invalid_argument("rans: at most 8192 symbols may be used, got " + std::to_string(used) +
                                "; write them in Huffman code");
  }
  RansCoding best;
  if (used == 0) return best;
  const auto total = static_cast<double>(std::accumulate(counts.begin(), counts.end(), std::uint64_t{0}));
  // Sixteen slots for each symbol on average.
  const int scale_bits = std::clamp<int>(static_cast<int>(std::bit_width(used - 1)) + 4, kMinScaleBits, kMaxScaleBits);
  for (int levels_an_octave = 0; levels_an_octave <= kFinest; ++levels_an_octave) {
    RansCoding coding{std::vector<std::uint16_t>(counts.size()), levels_an_octave, scale_bits, 0};
    for (std::size_t symbol = 0; symbol < counts.size(); ++symbol) {
      if (counts[symbol] == 0) continue;
      const double octaves = std::log2(static_cast<double>(counts[symbol]) / total) + scale_bits;
      const long level = 1 + std::lround(octaves * (1 << levels_an_octave));
      coding.levels[symbol] = static_cast<std::uint16_t>(std::clamp<long>(level, 1, MaxLevel(levels_an_octave)));
    }
    const std::vector<std::uint32_t> frequencies = Frequencies(coding.levels, levels_an_octave, scale_bits);
    double bits = 0;
    for (std::size_t symbol = 0; symbol < counts.size(); ++symbol) {
      if (counts[symbol] == 0) continue;
      bits += static_cast<double>(counts[symbol]) * (scale_bits - std::log2(static_cast<double>(frequencies[symbol])));
    }
    const std::size_t states = total >= static_cast<double>(kManySymbols) ? 4 : 1;
    coding.bytes = EncodeTable(coding.levels).size() + 2 + 3 * states + static_cast<std::uint64_t>(bits / 8);
    if (levels_an_octave == 0 || coding.bytes < best.bytes) best = std::move(coding);
  }
  return best;
}

std::vector<std::uint8_t> RansEncode(std::span<const std::uint16_t> symbols, const RansCoding& coding) {
  const bool many = symbols.size() >= kManySymbols;
  std::vector<std::uint8_t> stream;
  if (symbols.empty()) return stream;
  const std::vector<std::uint8_t> table = EncodeTable(coding.levels);
  stream.push_back(static_cast<std::uint8_t>(coding.levels_an_octave | many << 2 | coding.scale_bits << 4));
  for (std::size_t size = table.size();; size >>= 7) {
    stream.push_back(static_cast<std::uint8_t>(size < 128 ? size : (size & 127) | 128));
    if (size < 128) break;
  }
  stream.insert(stream.end(), table.begin(), table.end());

  const std::vector<std::uint32_t> frequencies = Frequencies(coding.levels, coding.levels_an_octave, coding.scale_bits);
  std::vector<std::uint32_t> starts(frequencies.size());
  std::exclusive_scan(frequencies.begin(), frequencies.end(), starts.begin(), std::uint32_t{0});
  const std::size_t states = many ? 4 : 1;
  std::array<std::uint32_t, 4> state = {kLowest, kLowest, kLowest, kLowest};
  std::vector<std::uint16_t> words;  // last first
  words.reserve(symbols.size() / 2);
  for (std::size_t i = symbols.size(); i-- > 0;) {
    std::uint32_t& x = state[i % states];
    const std::uint32_t frequency = frequencies[symbols[i]];
    if (x >> (32 - coding.scale_bits) >= frequency) {
      words.push_back(static_cast<std::uint16_t>(x));
      x >>= 16;
    }
    x = (x / frequency << coding.scale_bits) + x % frequency + starts[symbols[i]];
  }
  for (std::size_t i = 0; i < states; ++i) {
    for (int byte = 0; byte < 4; ++byte) stream.push_back(static_cast<std::uint8_t>(state[i] >> 8 * byte));
  }
  stream.reserve(stream.size() + 2 * words.size());
  for (auto word = words.rbegin(); word != words.rend(); ++word) {
    stream.push_back(static_cast<std::uint8_t>(*word));
    stream.push_back(static_cast<std::uint8_t>(*word >> 8));
  }
  return stream;
}

RansDecoder::RansDecoder(std::size_t alphabet, std::span<const std::uint8_t> stream) : stream_(stream) {
  state_.fill(kLowest);
  if (stream.empty()) return;
  const int head = stream[0];
  const int levels_an_octave = head & 3;
  states_ = head & 4 ? kManyStates : 1;
  scale_bits_ = head >> 4;
  if (head & 8 || scale_bits_ < kMinScaleBits || scale_bits_ > kMaxScaleBits) Refuse("begin as a stream does");
  std::size_t table_size = 0;
  std::size_t begin = 1;
  for (int shift = 0;; shift += 7) {
    if (begin == stream.size() || shift > 21) Refuse("hold the length of its table");
    const std::size_t part = stream[begin++];
    table_size |= (part & 127) << shift;
    if (part < 128) break;
  }
  if (table_size > stream.size() - begin) Refuse("hold a whole table, got its beginning only");
  const std::vector<std::uint16_t> levels =
      DecodeTable(stream.subspan(begin, table_size), alphabet, MaxLevel(levels_an_octave));
  table_bytes_ = begin + table_size;
  const auto used = static_cast<std::size_t>(std::count_if(levels.begin(), levels.end(), [](auto l) { return l > 0; }));
  if (used == 0 || used > std::size_t{1} << (scale_bits_ - 1)) Refuse("use at least one symbol, and fewer than slots");

  const std::vector<std::uint32_t> frequencies = Frequencies(levels, levels_an_octave, scale_bits_);
  slots_.reserve(std::size_t{1} << scale_bits_);
  for (std::size_t symbol = 0; symbol < frequencies.size(); ++symbol) {
    for (std::uint32_t offset = 0; offset < frequencies[symbol]; ++offset) {
      slots_.push_back({static_cast<std::uint16_t>(frequencies[symbol]), static_cast<std::uint16_t>(offset),
                        static_cast<std::uint16_t>(symbol), 0});
    }
  }
  next_ = table_bytes_;
  if (stream.size() - next_ < 4 * states_) Refuse("hold its states");
  for (std::size_t i = 0; i < states_; ++i) {
    state_[i] = 0;
    for (int byte = 0; byte < 4; ++byte) state_[i] |= std::uint32_t{stream[next_++]} << 8 * byte;
    if (state_[i] < kLowest) Refuse("hold states of at least 65536");
  }
}

std::uint16_t RansDecoder::Read() {
  if (slots_.empty()) Refuse("hold every symbol, got none");
  std::uint32_t& x = state_[turn_];
  turn_ = (turn_ + 1) & (states_ - 1);
  const Slot slot = slots_[x & ((std::uint32_t{1} << scale_bits_) - 1)];
  x = slot.frequency * (x >> scale_bits_) + slot.offset;
  if (x < kLowest) {
    if (stream_.size() - next_ < 2) Refuse("hold every symbol, got fewer");
    x = x << 16 | stream_[next_] | std::uint32_t{stream_[next_ + 1]} << 8;
    next_ += 2;
  }
  return slot.symbol;
}

void RansDecoder::Read(std::span<std::uint16_t> symbols) {
  std::size_t done = 0;
  if (states_ == kManyStates && turn_ == 0 && !slots_.empty()) {
    const std::uint32_t mask = (std::uint32_t{1} << scale_bits_) - 1;
    std::array<std::uint32_t, kManyStates> state = state_;
    const std::uint8_t* next = stream_.data() + next_;
    const std::uint8_t* const end = stream_.data() + stream_.size();
    // A round takes at most a word for each state.
    for (; done + kManyStates <= symbols.size() && end - next >= std::ptrdiff_t{2 * kManyStates}; done += kManyStates) {
      for (std::size_t i = 0; i < kManyStates; ++i) {
        const Slot slot = slots_[state[i] & mask];
        std::uint32_t x = slot.frequency * (state[i] >> scale_bits_) + slot.offset;
        const std::uint32_t word = next[0] | std::uint32_t{next[1]} << 8;
        const bool low = x < kLowest;
        x = low ? x << 16 | word : x;
        next += low ? 2 : 0;
        state[i] = x;
        symbols[done + i] = slot.symbol;
      }
    }
    state_ = state;
    next_ = static_cast<std::size_t>(next - stream_.data());
  }
  for (; done < symbols.size(); ++done) symbols[done] = Read();
}

void RansDecoder::Finish() const {
  const bool all = std::all_of(state_.begin(), state_.end(), [](std::uint32_t x) { return x == kLowest; });
  if (!all || next_ != stream_.size()) Refuse("end after the last symbol, got more");
}

}  // namespace tersetorch
