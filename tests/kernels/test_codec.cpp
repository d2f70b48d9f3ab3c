// Every decoder on damaged streams: an exception or other numbers of the right range, and nothing that a sanitizer
// finds.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <span>
#include <stdexcept>
#include <vector>

#include "codec/bit_stream.h"
#include "codec/contexts.h"
#include "codec/huffman.h"
#include "codec/numbers.h"
#include "codec/positions.h"
#include "codec/rans.h"
#include "kernels/check.h"

namespace {

using namespace tersetorch;
using tersetorch::test::Expect;
using Stream = std::vector<std::uint8_t>;
using Random = std::mt19937;

constexpr int kRounds = 200;

// Calls decode(stream), which returns whether it found nothing wrong with numbers it gave, on the stream as it is, on
// every beginning of it, and on what a few changed, missing or added bytes make of it.
template <typename Decode>
void Damage(const char* name, const Stream& stream, Random& random, Decode decode) {
  const auto attempt = [&](const Stream& damaged) {
    try {
      Expect(decode(std::span<const std::uint8_t>(damaged)), "%s decodes to numbers out of range", name);
    } catch (const std::invalid_argument&) {
      return false;
    }
    return true;
  };
  Expect(attempt(stream), "%s refuses what was encoded", name);
  for (std::size_t end = 0; end < stream.size(); ++end) {
    attempt(Stream(stream.begin(), stream.begin() + static_cast<std::ptrdiff_t>(end)));
  }
  for (int round = 0; round < kRounds; ++round) {
    Stream damaged = stream;
    for (unsigned changes = 1 + random() % 4; changes > 0 && !damaged.empty(); --changes) {
      const auto at = damaged.begin() + static_cast<std::ptrdiff_t>(random() % damaged.size());
      const unsigned kind = random() % 4;
      if (kind == 0) {
        *at ^= static_cast<std::uint8_t>(1u << random() % 8);
      } else if (kind == 1) {
        *at = static_cast<std::uint8_t>(random());
      } else if (kind == 2) {
        damaged.erase(at);
      } else {
        damaged.insert(at, static_cast<std::uint8_t>(random()));
      }
    }
    attempt(damaged);
  }
  for (int round = 0; round < kRounds; ++round) {
    Stream noise(random() % 64);
    for (std::uint8_t& byte : noise) byte = static_cast<std::uint8_t>(random());
    attempt(noise);
  }
}

bool Rise(std::span<const std::int64_t> positions, std::int64_t size) {
  std::int64_t last = -1;
  return std::all_of(positions.begin(), positions.end(), [&](std::int64_t position) {
    const bool rises = position > last && position < size;
    last = position;
    return rises;
  });
}

}  // namespace

int main() {
  Random random(1);
  for (const std::size_t alphabet : {1u, 2u, 16u, 256u, 3000u}) {
    for (const std::size_t count : {1u, 60u, 2500u, 5000u}) {
      std::vector<std::uint16_t> symbols(count);
      std::vector<std::uint64_t> counts(alphabet);
      for (std::uint16_t& symbol : symbols) {
        symbol = static_cast<std::uint16_t>(std::min(random() % alphabet, random() % alphabet));
        ++counts[symbol];
      }
      const auto inside = [&](std::uint32_t symbol) { return symbol < alphabet; };
      Damage("rans", RansEncode(symbols, BestRansCoding(counts)), random, [&](std::span<const std::uint8_t> stream) {
        RansDecoder decoder(alphabet, stream);
        std::vector<std::uint16_t> found(count);
        decoder.Read(found);
        decoder.Finish();
        return std::all_of(found.begin(), found.end(), inside);
      });
      BitWriter writer;
      const HuffmanEncoder encoder(HuffmanLengths(counts));
      encoder.WriteTable(writer);
      for (const std::uint16_t symbol : symbols) encoder.Write(symbol, writer);
      Damage("huffman", writer.Finish(), random, [&](std::span<const std::uint8_t> stream) {
        BitReader reader(stream.data(), stream.size());
        const HuffmanDecoder decoder(alphabet, reader, count);
        std::vector<std::uint16_t> found(count);
        decoder.Read(reader, found);
        return std::all_of(found.begin(), found.end(), inside);
      });
    }
  }

  for (const WeightGrid& grid : {WeightGrid{1, 1, 1, 1}, WeightGrid{40, 8, 1, 1}, WeightGrid{5 * 3 * 9, 3, 9, 3},
                                 WeightGrid{4 * 5 * 25, 5, 25, 5}}) {
    std::vector<std::int64_t> positions;
    for (std::int64_t position = 0; position < grid.size; ++position) {
      if (position == 0 || random() % 3 == 0) positions.push_back(position);
    }
    for (const GapCoder coder : {GapCoder::kPacked, GapCoder::kHuffman, GapCoder::kRans}) {
      Damage("gaps", EncodeGaps(positions, 3, coder), random, [&](std::span<const std::uint8_t> stream) {
        std::vector<std::int64_t> found(positions.size());
        DecodeGaps(stream, 3, coder, grid.size, found);
        return Rise(found, grid.size);
      });
    }
    Damage("bitmap", EncodeBitmap(positions, grid.size), random, [&](std::span<const std::uint8_t> stream) {
      std::vector<std::int64_t> found(positions.size());
      DecodeBitmap(stream, grid.size, found);
      return Rise(found, grid.size);
    });
    Damage("positions in context", EncodePositionsInContext(positions, grid), random,
           [&](std::span<const std::uint8_t> stream) {
             std::vector<std::int64_t> found(positions.size());
             DecodePositionsInContext(stream, grid, found);
             return Rise(found, grid.size);
           });
    for (const SymbolRange range : {SymbolRange{1, 1}, SymbolRange{4, 7}, SymbolRange{8, 256}}) {
      std::vector<std::uint8_t> symbols(positions.size());
      for (std::uint8_t& symbol : symbols) symbol = static_cast<std::uint8_t>(random() % (1u << range.width));
      Damage("codes in context", EncodeSymbolsInContext(symbols, positions, grid, range), random,
             [&](std::span<const std::uint8_t> stream) {
               std::vector<std::uint8_t> found(symbols.size());
               DecodeSymbolsInContext(stream, positions, grid, range, found);
               return std::all_of(found.begin(), found.end(),
                                  [&](unsigned symbol) { return symbol >> range.width == 0; });
             });
    }
  }

  for (const int width : {8, 16, 32, 64}) {
    for (const bool rising : {false, true}) {
      std::vector<std::uint64_t> patterns(50);
      for (std::uint64_t& pattern : patterns) pattern = (std::uint64_t{random()} << 32 | random()) >> (64 - width);
      if (rising) std::sort(patterns.begin(), patterns.end());
      Damage("numbers", EncodeNumbers(patterns, width), random, [&](std::span<const std::uint8_t> stream) {
        std::vector<std::uint64_t> found(patterns.size());
        DecodeNumbers(stream, width, found);
        return std::all_of(found.begin(), found.end(),
                           [&](std::uint64_t pattern) { return width == 64 || pattern >> width == 0; });
      });
    }
  }
  return tersetorch::test::Failures() != 0;
}
