#include "codec/positions.h"

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <stdexcept>
#include <string>

#include "codec/bit_stream.h"
#include "codec/huffman.h"
#include "codec/rans.h"

namespace tersetorch {
namespace {

// Gaps below this are counted in an array, the few above in a map.
constexpr std::uint64_t kShortGaps = std::uint64_t{1} << 16;

// Wider alphabets are for a few far positions, whose table would cost more than fillers.
constexpr int kMaxRansGapWidth = 10;

std::uint32_t Filler(int width) { return (std::uint32_t{1} << width) - 1; }

// Calls visit(gap) for the zeros before every position.
template <typename Visit>
void ForEachGap(std::span<const std::int64_t> positions, Visit visit) {
  std::int64_t next = 0;
  for (const std::int64_t position : positions) {
    if (position < next) {
      throw std::invalid_argument("positions: they must rise from 0, got " + std::to_string(position) + " after " +
                                  std::to_string(next - 1));
    }
    visit(static_cast<std::uint64_t>(position - next));
    next = position + 1;
  }
}

// How often each symbol occurs at this width.
std::vector<std::uint64_t> SymbolCounts(std::span<const std::uint64_t> short_gaps,
                                        const std::map<std::uint64_t, std::uint64_t>& long_gaps, int width) {
  const std::uint64_t filler = Filler(width);
  std::vector<std::uint64_t> counts(filler + 1);
  const auto add = [&](std::uint64_t gap, std::uint64_t count) {
    counts[gap % filler] += count;
    counts[filler] += gap / filler * count;
  };
  for (std::uint64_t gap = 0; gap < short_gaps.size(); ++gap) {
    if (short_gaps[gap] > 0) add(gap, short_gaps[gap]);
  }
  for (const auto& [gap, count] : long_gaps) add(gap, count);
  return counts;
}

struct GapHistogram {
  std::vector<std::uint64_t> short_gaps;
  std::map<std::uint64_t, std::uint64_t> long_gaps;

  explicit GapHistogram(std::span<const std::int64_t> positions) : short_gaps(kShortGaps) {
    ForEachGap(positions, [&](std::uint64_t gap) { gap < kShortGaps ? ++short_gaps[gap] : ++long_gaps[gap]; });
  }

  std::vector<std::uint64_t> Counts(int width) const { return SymbolCounts(short_gaps, long_gaps, width); }
};

// read(symbols) decodes many symbols at a time, but never more than the positions that are left, each of which has one.
template <typename Read>
void DecodeGapSymbols(std::uint32_t filler, std::int64_t size, std::span<std::int64_t> positions, Read read) {
  std::array<std::uint16_t, 512> symbols;
  std::size_t held = 0;
  std::size_t taken = 0;
  std::int64_t next = 0;
  for (std::size_t i = 0; i < positions.size();) {
    if (taken == held) {
      held = std::min(positions.size() - i, symbols.size());
      taken = 0;
      read(std::span(symbols).first(held));
    }
    const std::uint32_t symbol = symbols[taken++];
    next += symbol;
    if (next >= size) {
      throw std::invalid_argument("positions: they must lie in [0, " + std::to_string(size) + "), got one beyond");
    }
    if (symbol != filler) positions[i++] = next++;
  }
}

}  // namespace

GapCoding BestGapCoding(std::span<const std::int64_t> positions) {
  const GapHistogram histogram(positions);
  GapCoding best;
  for (int width = 1; width <= kMaxGapWidth; ++width) {
    const std::vector<std::uint64_t> counts = histogram.Counts(width);
    std::uint64_t symbols = 0;
    for (const std::uint64_t count : counts) symbols += count;
    const std::uint64_t packed = (symbols * static_cast<std::uint64_t>(width) + 7) / 8;
    const std::uint64_t coded = HuffmanBytes(counts, HuffmanLengths(counts));
    if (width == 1 || packed < best.bytes) best = {width, GapCoder::kPacked, packed};
    if (coded < best.bytes) best = {width, GapCoder::kHuffman, coded};
    if (width > kMaxRansGapWidth) continue;
    const std::uint64_t ranged = BestRansCoding(counts).bytes;
    if (ranged < best.bytes && positions.size() / kRansItemsPerByte < ranged) best = {width, GapCoder::kRans, ranged};
  }
  return best;
}

std::vector<std::uint8_t> EncodeGaps(std::span<const std::int64_t> positions, int width, GapCoder coder) {
  const std::uint32_t filler = Filler(width);
  BitWriter writer;
  const auto encode = [&](auto write) {
    ForEachGap(positions, [&](std::uint64_t gap) {
      for (std::uint64_t fillers = gap / filler; fillers > 0; --fillers) write(filler);
      write(static_cast<std::uint32_t>(gap % filler));
    });
  };
  if (coder == GapCoder::kRans) {
    std::vector<std::uint16_t> symbols;
    symbols.reserve(positions.size());
    encode([&](std::uint32_t symbol) { symbols.push_back(static_cast<std::uint16_t>(symbol)); });
    return RansEncode(symbols, BestRansCoding(GapHistogram(positions).Counts(width)));
  }
  if (coder == GapCoder::kHuffman) {
    const HuffmanEncoder encoder(HuffmanLengths(GapHistogram(positions).Counts(width)));
    encoder.WriteTable(writer);
    encode([&](std::uint32_t symbol) { encoder.Write(symbol, writer); });
  } else {
    encode([&](std::uint32_t symbol) { writer.Write(symbol, width); });
  }
  return writer.Finish();
}

std::vector<std::uint8_t> EncodeBitmap(std::span<const std::int64_t> positions, std::int64_t size) {
  std::vector<std::uint8_t> bytes((static_cast<std::size_t>(size) + 7) / 8);
  ForEachGap(positions, [](std::uint64_t) {});
  if (!positions.empty() && positions.back() >= size) {
    throw std::invalid_argument("positions: they must lie in [0, " + std::to_string(size) + "), got " +
                                std::to_string(positions.back()));
  }
  for (const std::int64_t position : positions) {
    bytes[static_cast<std::size_t>(position / 8)] |= static_cast<std::uint8_t>(1 << position % 8);
  }
  return bytes;
}

void DecodeGaps(std::span<const std::uint8_t> stream, int width, GapCoder coder, std::int64_t size,
                std::span<std::int64_t> positions) {
  const std::uint32_t filler = Filler(width);
  const std::size_t alphabet = std::size_t{filler} + 1;
  using Symbols = std::span<std::uint16_t>;
  if (coder == GapCoder::kRans) {
    RansDecoder decoder(alphabet, stream);
    DecodeGapSymbols(filler, size, positions, [&](Symbols symbols) { decoder.Read(symbols); });
    decoder.Finish();
    return;
  }
  BitReader reader(stream.data(), stream.size());
  if (coder == GapCoder::kHuffman) {
    const HuffmanDecoder decoder(alphabet, reader, positions.size());
    DecodeGapSymbols(filler, size, positions, [&](Symbols symbols) { decoder.Read(reader, symbols); });
  } else {
    DecodeGapSymbols(filler, size, positions, [&](Symbols symbols) {
      if (!reader.Read(width, symbols)) {
        throw std::invalid_argument("positions: data must hold every position, got fewer");
      }
    });
  }
  if (!reader.OnlyPaddingLeft()) throw std::invalid_argument("positions: data must end after the last, got more");
}

void DecodeBitmap(std::span<const std::uint8_t> stream, std::int64_t size, std::span<std::int64_t> positions) {
  if (stream.size() != (static_cast<std::size_t>(size) + 7) / 8) {
    throw std::invalid_argument("positions: a bitmap of " + std::to_string(size) + " bits must be whole, got " +
                                std::to_string(stream.size()) + " bytes");
  }
  std::size_t found = 0;
  for (std::size_t byte = 0; byte < stream.size(); ++byte) {
    for (unsigned bits = stream[byte]; bits != 0; bits &= bits - 1, ++found) {
      const auto position = static_cast<std::int64_t>(byte * 8) + std::countr_zero(bits);
      if (position >= size || found == positions.size()) {
        throw std::invalid_argument("positions: a bitmap must mark " + std::to_string(positions.size()) +
                                    " positions below " + std::to_string(size) + ", got another");
      }
      positions[found] = position;
    }
  }
  if (found != positions.size()) {
    throw std::invalid_argument("positions: a bitmap must mark " + std::to_string(positions.size()) +
                                " positions, got " + std::to_string(found));
  }
}

}  // namespace tersetorch
