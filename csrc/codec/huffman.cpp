#include "codec/huffman.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace tersetorch {
namespace {

constexpr int kLengthBits = 4;  // of a length written out

constexpr std::size_t kManySymbols = 4096;  // to read, for which runs are prepared

// Canonical codes, first bit lowest. The lengths must be a prefix code.
std::vector<std::uint16_t> CanonicalCodes(std::span<const std::uint8_t> lengths) {
  std::array<std::uint32_t, kMaxCodeLength + 2> next{};
  for (const std::uint8_t length : lengths) next[length + 1u] += length > 0;
  for (std::size_t length = 1; length < next.size(); ++length) next[length] = (next[length] + next[length - 1]) << 1;
  std::vector<std::uint16_t> codes(lengths.size());
  for (std::size_t symbol = 0; symbol < lengths.size(); ++symbol) {
    if (lengths[symbol] == 0) continue;
    std::uint32_t code = next[lengths[symbol]]++;
    std::uint32_t reversed = 0;
    for (int bit = 0; bit < lengths[symbol]; ++bit, code >>= 1) reversed = reversed << 1 | (code & 1);
    codes[symbol] = static_cast<std::uint16_t>(reversed);
  }
  return codes;
}

// The running state of the table's coding.
struct LengthState {
  int before = 1;
  int last = 1;

  void Move(int length) {
    before = length;
    if (length > 0) last = length;
  }

  int Toggled() const { return before == 0 ? last : 0; }
};

// Calls emit(bits, width) for every piece of the table.
template <typename Emit>
void ForEachTablePiece(std::span<const std::uint8_t> lengths, Emit emit) {
  LengthState state;
  for (const int length : lengths) {
    if (length == state.before) {
      emit(0b0u, 1);
    } else if (length == state.Toggled()) {
      emit(0b011u, 3);
    } else if (length == state.last + 1) {
      emit(0b001u, 3);
    } else if (length == state.last - 1) {
      emit(0b101u, 3);
    } else {
      emit(0b111u | static_cast<std::uint32_t>(length) << 3, 3 + kLengthBits);
    }
    state.Move(length);
  }
}

std::uint32_t ReadTableBits(BitReader& reader, int width) {
  const std::optional<std::uint32_t> bits = reader.Read(width);
  if (!bits) throw std::invalid_argument("huffman: data must hold a whole code table, got its beginning only");
  return *bits;
}

std::vector<std::uint8_t> ReadLengths(std::size_t alphabet, BitReader& reader) {
  if (alphabet > reader.BitsLeft()) {
    throw std::invalid_argument("huffman: data must hold a code table of " + std::to_string(alphabet) +
                                " symbols, got " + std::to_string(reader.BitsLeft()) + " bits in all");
  }
  std::vector<std::uint8_t> lengths(alphabet);
  LengthState state;
  for (std::uint8_t& slot : lengths) {
    int length = state.before;
    if (ReadTableBits(reader, 1) == 1) {
      if (ReadTableBits(reader, 1) == 0) {
        length = state.last + (ReadTableBits(reader, 1) == 0 ? 1 : -1);
      } else {
        length = ReadTableBits(reader, 1) == 0 ? state.Toggled() : static_cast<int>(ReadTableBits(reader, kLengthBits));
      }
    }
    if (length < 0 || length > kMaxCodeLength) {
      throw std::invalid_argument("huffman: code lengths must lie in [0, 15], got " + std::to_string(length));
    }
    slot = static_cast<std::uint8_t>(length);
    state.Move(length);
  }
  return lengths;
}

}  // namespace

std::vector<std::uint8_t> HuffmanLengths(std::span<const std::uint64_t> counts) {
  if (counts.size() > kMaxAlphabet) {
    throw std::invalid_argument("huffman: the alphabet must have at most 65536 symbols, got " +
                                std::to_string(counts.size()));
  }
  std::vector<std::uint32_t> used;
  for (std::uint32_t symbol = 0; symbol < counts.size(); ++symbol) {
    if (counts[symbol] > 0) used.push_back(symbol);
  }
  if (used.size() > kMaxUsedSymbols) {
    throw std::invalid_argument("huffman: codes of at most 15 bits can tell 32768 symbols apart, got " +
                                std::to_string(used.size()) + "; pack them at a fixed width");
  }
  std::vector<std::uint8_t> lengths(counts.size());
  if (used.size() == 1) lengths[used[0]] = 1;
  if (used.size() < 2) return lengths;
  std::stable_sort(used.begin(), used.end(), [&](std::uint32_t a, std::uint32_t b) { return counts[a] < counts[b]; });

  // Level by level from the longest codes: the symbols, merged in order of weight with the pairs of the level below.
  std::array<std::vector<bool>, kMaxCodeLength> is_symbol;
  std::vector<std::uint64_t> weights;
  for (std::vector<bool>& level : is_symbol) {
    std::vector<std::uint64_t> merged;
    std::size_t symbol = 0;
    std::size_t pair = 0;
    while (symbol < used.size() || pair + 1 < weights.size()) {
      const bool take_symbol = pair + 1 >= weights.size() ||
                               (symbol < used.size() && counts[used[symbol]] <= weights[pair] + weights[pair + 1]);
      merged.push_back(take_symbol ? counts[used[symbol]] : weights[pair] + weights[pair + 1]);
      level.push_back(take_symbol);
      take_symbol ? ++symbol : pair += 2;
    }
    weights = std::move(merged);
  }
  // The 2n - 2 lightest items of the last level are taken; each pair among them takes its two items one level below,
  // and a symbol's length is the number of levels at which it is taken.
  std::size_t taken = 2 * used.size() - 2;
  for (auto level = is_symbol.rbegin(); level != is_symbol.rend(); ++level) {
    const auto symbols =
        static_cast<std::size_t>(std::count(level->begin(), level->begin() + static_cast<std::ptrdiff_t>(taken), true));
    for (std::size_t i = 0; i < symbols; ++i) ++lengths[used[i]];
    taken = 2 * (taken - symbols);
  }
  return lengths;
}

std::uint64_t HuffmanBytes(std::span<const std::uint64_t> counts, std::span<const std::uint8_t> lengths) {
  std::uint64_t table_bits = 0;
  ForEachTablePiece(lengths, [&](std::uint32_t, int width) { table_bits += static_cast<std::uint64_t>(width); });
  const std::uint64_t code_bits = std::inner_product(counts.begin(), counts.end(), lengths.begin(), std::uint64_t{0});
  return (table_bits + 7) / 8 + (code_bits + 7) / 8;
}

HuffmanEncoder::HuffmanEncoder(std::vector<std::uint8_t> lengths)
    : lengths_(std::move(lengths)), codes_(CanonicalCodes(lengths_)) {}

void HuffmanEncoder::WriteTable(BitWriter& writer) const {
  ForEachTablePiece(lengths_, [&](std::uint32_t bits, int width) { writer.Write(bits, width); });
  writer.Align();
}

HuffmanDecoder::HuffmanDecoder(std::size_t alphabet, BitReader& reader, std::size_t count) {
  const std::vector<std::uint8_t> lengths = ReadLengths(alphabet, reader);
  if (!reader.Align()) throw std::invalid_argument("huffman: the code table must end in zero bits, got a set one");

  std::uint64_t used = 0;
  std::uint64_t claimed = 0;  // of 2^15 longest codes
  for (const std::uint8_t length : lengths) {
    if (length == 0) continue;
    ++used;
    claimed += std::uint64_t{1} << (kMaxCodeLength - length);
    index_bits_ = std::max<int>(index_bits_, length);
  }
  const bool complete = claimed == std::uint64_t{1} << kMaxCodeLength;
  const bool single = used == 1 && index_bits_ == 1;
  if (used > 0 && !complete && !single) {
    throw std::invalid_argument("huffman: code lengths must fill the code exactly, got " + std::to_string(claimed) +
                                " of 32768 leaves");
  }
  table_.resize(std::size_t{1} << index_bits_);
  const std::vector<std::uint16_t> codes = CanonicalCodes(lengths);
  for (std::size_t symbol = 0; symbol < lengths.size(); ++symbol) {
    if (lengths[symbol] == 0) continue;
    for (std::size_t index = codes[symbol]; index < table_.size(); index += std::size_t{1} << lengths[symbol]) {
      table_[index] = {static_cast<std::uint16_t>(symbol), lengths[symbol]};
    }
  }
  if (count >= kManySymbols) PrepareRuns();
}

void HuffmanDecoder::PrepareRuns() {
  runs_.resize(std::size_t{1} << kRunBits);
  const std::size_t mask = table_.size() - 1;
  for (std::size_t index = 0; index < runs_.size(); ++index) {
    Run& run = runs_[index];
    while (run.count < kRunSymbols) {
      // Bits past the index are zeros here, but a code that fits the rest of it is told by that rest.
      const Entry entry = table_[index >> run.length & mask];
      if (entry.length == 0 || run.length + entry.length > kRunBits) break;
      run.symbols[run.count++] = entry.symbol;
      run.length = static_cast<std::uint8_t>(run.length + entry.length);
    }
  }
}

std::uint16_t HuffmanDecoder::ReadOne(BitReader& reader) const {
  const Entry entry = table_[reader.Peek(index_bits_)];
  if (entry.length == 0) throw std::invalid_argument("huffman: data must hold codes of its table, got other bits");
  if (!reader.Skip(entry.length)) throw std::invalid_argument("huffman: data must hold every code, got fewer");
  return entry.symbol;
}

// A look-up, which has to wait for the length of the one before, takes about 8 cycles and gives up to three symbols.
std::size_t HuffmanDecoder::ReadRuns(BitReader& reader, std::span<std::uint16_t> symbols) const {
  // Runs to a load of 8 bytes, of which at least 57 bits are new; a run is stored whole, its last two bytes too.
  constexpr int kRuns = 57 / kRunBits;
  constexpr std::size_t kMost = kRuns * kRunSymbols + sizeof(Run) / sizeof(std::uint16_t) - kRunSymbols;
  const std::span<const std::uint8_t> bytes = reader.Bytes();
  std::uint64_t place = reader.Place();
  std::size_t done = 0;
  while (place / 8 + 8 <= bytes.size() && done + kMost <= symbols.size()) {
    std::uint64_t bits;
    std::memcpy(&bits, bytes.data() + place / 8, 8);
    bits >>= place % 8;
    for (int i = 0; i < kRuns; ++i) {
      // In one register, since fields that are read one by one are waited for one by one.
      std::uint64_t run;
      std::memcpy(&run, &runs_[bits & ((1u << kRunBits) - 1)], sizeof(Run));
      const std::uint64_t length = run >> 56, count = run >> 48 & 255;
      if (count == 0) {
        reader.MoveTo(place);
        symbols[done++] = ReadOne(reader);
        place = reader.Place();
        break;
      }
      std::memcpy(symbols.data() + done, &run, sizeof(Run));
      done += count;
      bits >>= length;
      place += length;
    }
  }
  reader.MoveTo(place);
  return done;
}

void HuffmanDecoder::Read(BitReader& reader, std::span<std::uint16_t> symbols) const {
  std::size_t done = runs_.empty() ? 0 : ReadRuns(reader, symbols);
  for (; done < symbols.size(); ++done) symbols[done] = ReadOne(reader);
}

}  // namespace tersetorch
