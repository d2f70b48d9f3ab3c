// Every decoder of csrc/codec, with arguments as csrc/native lets them through: numbers out of range or a message that
// is not the same after another round is a failure, too.
#include <algorithm>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "codec/bit_stream.h"
#include "codec/contexts.h"
#include "codec/huffman.h"
#include "codec/numbers.h"
#include "codec/positions.h"
#include "codec/rans.h"
#include "native/engine.h"

namespace tersetorch::fuzz {
namespace {

using Symbols = std::vector<std::uint16_t>;
using Positions = std::vector<std::int64_t>;
using Input = std::span<const std::uint8_t>;

constexpr std::int64_t kMaxItems = 1 << 13;
constexpr std::int64_t kMaxItemsPerByte = 4096;  // csrc/native/codec.cpp

void Check(bool right, const char* what) {
  if (!right) Fail(what);
}

// As many items as a stream of a bit or more each, or of less than one, may be asked for.
std::int64_t TakeCount(Arguments& arguments, std::size_t bytes, bool below_a_bit) {
  const std::int64_t most = static_cast<std::int64_t>(bytes) * (below_a_bit ? kMaxItemsPerByte : 8);
  return std::min(arguments.Take(2, 0, kMaxItems), most);
}

Bytes Joined(std::initializer_list<std::uint64_t> numbers, std::initializer_list<int> widths, const Bytes& stream) {
  Bytes input;
  auto width = widths.begin();
  for (const std::uint64_t number : numbers) {
    for (int i = 0; i < *width; ++i) input.push_back(static_cast<std::uint8_t>(number >> 8 * i));
    ++width;
  }
  input.insert(input.end(), stream.begin(), stream.end());
  return input;
}

std::vector<std::uint64_t> CountsOf(const Symbols& symbols, std::size_t alphabet) {
  std::vector<std::uint64_t> counts(alphabet);
  for (const std::uint16_t symbol : symbols) {
    Check(symbol < alphabet, "a symbol outside its alphabet");
    ++counts[symbol];
  }
  return counts;
}

Symbols SomeSymbols(std::size_t count, std::size_t alphabet) {
  std::mt19937 random(1);
  Symbols symbols(count);
  for (std::uint16_t& symbol : symbols) {
    symbol = static_cast<std::uint16_t>(std::min(random() % alphabet, random() % alphabet));
  }
  return symbols;
}

Positions SomePositions(std::int64_t size, unsigned one_in) {
  std::mt19937 random(2);
  Positions positions;
  for (std::int64_t p = 0; p < size; ++p) {
    if (random() % one_in == 0) positions.push_back(p);
  }
  return positions;
}

void CheckRise(const Positions& positions, std::int64_t size) {
  std::int64_t last = -1;
  for (const std::int64_t position : positions) {
    Check(position > last && position < size, "positions that do not rise within their size");
    last = position;
  }
}

// ---- bits

void Bits(Input input) {
  Arguments arguments(input);
  const int width = static_cast<int>(arguments.Take(1, 1, kMaxBitWidth));
  const std::uint64_t mixed = arguments.Take(4);
  const Bytes stream = arguments.Rest();
  const std::size_t count = std::min<std::size_t>(stream.size() * 8 / static_cast<std::size_t>(width), kMaxItems);
  std::vector<std::uint32_t> found(count);
  BitReader reader(stream.data(), stream.size());
  Check(reader.Read(width, found), "a reader that does not hold what its size says");
  BitWriter writer;
  for (const std::uint32_t number : found) {
    Check(width == 32 || number >> width == 0, "a number wider than its width");
    writer.Write(number, width);
  }
  const Bytes again = writer.Finish();
  Check(std::equal(again.begin(), again.end() - (again.empty() ? 0 : 1), stream.begin()), "bits that changed");
  // One by one, with steps back and forth.
  BitReader steps(stream.data(), stream.size());
  for (std::uint64_t choice = mixed; choice != 0; choice /= 5) {
    const std::uint64_t left = steps.BitsLeft();
    const std::uint32_t ahead = steps.Peek(width);
    switch (choice % 5) {
      case 0:
        Check(steps.Skip(width) == (left >= static_cast<std::uint64_t>(width)), "a skip past the end");
        break;
      case 1: {
        const auto number = steps.Read(width);
        Check(!number || *number == ahead, "a number that was another when looked at");
        break;
      }
      case 2:
        steps.MoveTo(mixed % (8 * stream.size() + 1));
        break;
      case 3:
        steps.Align();
        break;
      default:
        steps.OnlyPaddingLeft();
    }
    Check(steps.BytesTaken() <= stream.size(), "more bytes taken than there are");
  }
}

std::vector<Bytes> BitSeeds() { return {{7, 1, 2, 3, 4, 9, 8, 7, 6, 5, 4, 3, 2, 1}, {32, 9, 9, 9, 9, 0, 1, 2, 3, 4}}; }

// ---- symbols

void Huffman(Input input) {
  Arguments arguments(input);
  const auto alphabet = static_cast<std::size_t>(arguments.Take(3, 0, kMaxAlphabet));
  const std::int64_t count = TakeCount(arguments, arguments.Left(), false);
  const Bytes stream = arguments.Rest();
  BitReader reader(stream.data(), stream.size());
  const HuffmanDecoder decoder(alphabet, reader, static_cast<std::size_t>(count));
  Symbols found(static_cast<std::size_t>(count));
  decoder.Read(reader, found);
  if (found.empty()) return;

  const std::vector<std::uint8_t> lengths = HuffmanLengths(CountsOf(found, alphabet));
  BitWriter writer;
  const HuffmanEncoder encoder(lengths);
  encoder.WriteTable(writer);
  for (const std::uint16_t symbol : found) encoder.Write(symbol, writer);
  const Bytes again = writer.Finish();
  BitReader second(again.data(), again.size());
  Symbols same(found.size());
  HuffmanDecoder(alphabet, second, found.size()).Read(second, same);
  Check(same == found && second.OnlyPaddingLeft(), "symbols that Huffman codes change");
}

std::vector<Bytes> HuffmanSeeds() {
  std::vector<Bytes> seeds;
  for (const std::size_t alphabet : {1u, 5u, 9u, 300u}) {
    const Symbols symbols = SomeSymbols(alphabet == 9 ? 5000 : 60, alphabet);  // so many are read in runs
    const HuffmanEncoder encoder(HuffmanLengths(CountsOf(symbols, alphabet)));
    BitWriter writer;
    encoder.WriteTable(writer);
    for (const std::uint16_t symbol : symbols) encoder.Write(symbol, writer);
    seeds.push_back(Joined({alphabet, symbols.size()}, {3, 2}, writer.Finish()));
  }
  return seeds;
}

void Rans(Input input) {
  Arguments arguments(input);
  const auto alphabet = static_cast<std::size_t>(arguments.Take(3, 0, kMaxAlphabet));
  const std::int64_t count = TakeCount(arguments, arguments.Left(), true);
  const Bytes stream = arguments.Rest();
  RansDecoder decoder(alphabet, stream);
  Check(decoder.TableBytes() <= stream.size(), "a table longer than its stream");
  Symbols found(static_cast<std::size_t>(count));
  decoder.Read(found);
  decoder.Finish();
  if (found.empty()) return;

  const Bytes again = RansEncode(found, BestRansCoding(CountsOf(found, alphabet)));
  RansDecoder second(alphabet, again);
  Symbols same(found.size());
  for (std::uint16_t& symbol : same) symbol = second.Read();  // one by one, which is another loop
  second.Finish();
  Check(same == found, "symbols that rANS changes");
}

std::vector<Bytes> RansSeeds() {
  std::vector<Bytes> seeds;
  for (const std::size_t alphabet : {1u, 5u, 300u}) {
    for (const std::size_t count : {40u, 2100u}) {
      const Symbols symbols = SomeSymbols(count, alphabet);
      const Bytes stream = RansEncode(symbols, BestRansCoding(CountsOf(symbols, alphabet)));
      seeds.push_back(Joined({alphabet, count}, {3, 2}, stream));
    }
  }
  return seeds;
}

// ---- positions

void Gaps(Input input) {
  Arguments arguments(input);
  const auto coder = static_cast<GapCoder>(arguments.Take(1, 0, 2));
  const int width = static_cast<int>(arguments.Take(1, 1, kMaxGapWidth));
  std::int64_t size = arguments.Take(6, 0, std::int64_t{1} << 48);
  // Symbols that only go on may take no bits: the reader of files bounds how many there can be (Entry.places_read).
  if (coder == GapCoder::kRans) size = std::min(size, ((std::int64_t{1} << width) - 1) << 22);
  const std::int64_t count = TakeCount(arguments, arguments.Left(), coder == GapCoder::kRans);
  const Bytes stream = arguments.Rest();
  Positions found(static_cast<std::size_t>(count));
  DecodeGaps(stream, width, coder, size, found);
  CheckRise(found, size);

  if (found.empty() || found.back() >> width > kMaxItems) return;  // fillers without end
  Positions same(found.size());
  DecodeGaps(EncodeGaps(found, width, coder), width, coder, size, same);
  Check(same == found, "positions that gaps change");
}

std::vector<Bytes> GapSeeds() {
  std::vector<Bytes> seeds;
  for (const GapCoder coder : {GapCoder::kPacked, GapCoder::kHuffman, GapCoder::kRans}) {
    for (const int width : {2, 6}) {
      const Positions positions = SomePositions(900, 11);
      seeds.push_back(
          Joined({static_cast<std::uint64_t>(coder), static_cast<std::uint64_t>(width - 1), 900, positions.size()},
                 {1, 1, 6, 2}, EncodeGaps(positions, width, coder)));
    }
  }
  return seeds;
}

void Bitmap(Input input) {
  Arguments arguments(input);
  const std::int64_t size = arguments.Take(2, 0, 0xffff);
  const std::int64_t count = TakeCount(arguments, arguments.Left(), false);
  const Bytes stream = arguments.Rest();
  Positions found(static_cast<std::size_t>(count));
  DecodeBitmap(stream, size, found);
  CheckRise(found, size);
  Check(EncodeBitmap(found, size) == stream, "a bitmap that changes");
}

std::vector<Bytes> BitmapSeeds() {
  const Positions positions = SomePositions(203, 4);
  return {Joined({203, positions.size()}, {2, 2}, EncodeBitmap(positions, 203))};
}

// ---- contexts

WeightGrid TakeGrid(Arguments& arguments) {
  WeightGrid grid;
  grid.kernel_width = arguments.Take(1, 1, 5);
  grid.kernel = grid.kernel_width * arguments.Take(1, 1, 5);
  grid.channels = arguments.Take(1, 1, 40);
  grid.size = grid.kernel * grid.channels * arguments.Take(1, 1, 16);
  return grid;
}

void ContextPositions(Input input) {
  Arguments arguments(input);
  const WeightGrid grid = TakeGrid(arguments);
  const std::int64_t count = TakeCount(arguments, arguments.Left(), true);
  const Bytes stream = arguments.Rest();
  Positions found(static_cast<std::size_t>(count));
  DecodePositionsInContext(stream, grid, found);
  CheckRise(found, grid.size);
  Positions same(found.size());
  DecodePositionsInContext(EncodePositionsInContext(found, grid), grid, same);
  Check(same == found, "positions that contexts change");
}

std::vector<Bytes> ContextPositionSeeds() {
  std::vector<Bytes> seeds;
  for (const WeightGrid& grid : {WeightGrid{40, 8, 1, 1}, WeightGrid{5 * 3 * 9, 3, 9, 3}}) {
    const Positions positions = SomePositions(grid.size, 3);
    seeds.push_back(Joined(
        {static_cast<std::uint64_t>(grid.kernel_width - 1),
         static_cast<std::uint64_t>(grid.kernel / grid.kernel_width - 1), static_cast<std::uint64_t>(grid.channels - 1),
         static_cast<std::uint64_t>(grid.size / grid.kernel / grid.channels - 1), positions.size()},
        {1, 1, 1, 1, 2}, EncodePositionsInContext(positions, grid)));
  }
  return seeds;
}

void ContextSymbols(Input input) {
  Arguments arguments(input);
  const WeightGrid grid = TakeGrid(arguments);
  SymbolRange range;
  range.width = static_cast<int>(arguments.Take(1, 1, kMaxContextBits));
  range.center = static_cast<int>(arguments.Take(2, 0, std::int64_t{1} << range.width));
  const auto one_in = static_cast<unsigned>(arguments.Take(1, 0, 7));
  const Positions positions = one_in == 0 ? Positions() : SomePositions(grid.size, one_in);
  const auto count =
      static_cast<std::size_t>(positions.empty() ? grid.size : static_cast<std::int64_t>(positions.size()));
  const Bytes stream = arguments.Rest();
  if (count > stream.size() * kMaxItemsPerByte) return;
  Bytes found(count);
  DecodeSymbolsInContext(stream, positions, grid, range, found);
  Check(std::all_of(found.begin(), found.end(), [&](unsigned symbol) { return symbol >> range.width == 0; }),
        "a symbol wider than its width");
  Bytes same(count);
  DecodeSymbolsInContext(EncodeSymbolsInContext(found, positions, grid, range), positions, grid, range, same);
  Check(same == found, "symbols that contexts change");
}

std::vector<Bytes> ContextSymbolSeeds() {
  std::vector<Bytes> seeds;
  for (const unsigned one_in : {0u, 3u}) {
    const WeightGrid grid{5 * 3 * 9, 3, 9, 3};
    const Positions positions = one_in == 0 ? Positions() : SomePositions(grid.size, one_in);
    const Symbols symbols = SomeSymbols(positions.empty() ? static_cast<std::size_t>(grid.size) : positions.size(), 16);
    const Bytes codes(symbols.begin(), symbols.end());
    seeds.push_back(Joined({2, 2, 2, 4, 3, 7, one_in}, {1, 1, 1, 1, 1, 2, 1},
                           EncodeSymbolsInContext(codes, positions, grid, {4, 7})));
  }
  return seeds;
}

// ---- numbers

void Numbers(Input input) {
  Arguments arguments(input);
  const int width = static_cast<int>(arguments.Take(1, 8, 64));
  const std::int64_t count = TakeCount(arguments, arguments.Left(), true);
  const Bytes stream = arguments.Rest();
  std::vector<std::uint64_t> found(static_cast<std::size_t>(count)), same(found.size());
  DecodeNumbers(stream, width, found);
  for (const std::uint64_t pattern : found)
    Check(width == 64 || pattern >> width == 0, "a pattern wider than its width");
  DecodeNumbers(EncodeNumbers(found, width), width, same);
  Check(same == found, "numbers that change");
}

std::vector<Bytes> NumberSeeds() {
  std::vector<Bytes> seeds;
  std::mt19937_64 random(3);
  for (const int width : {8, 16, 32, 64}) {
    std::vector<std::uint64_t> patterns(20);
    for (std::uint64_t& pattern : patterns) pattern = random() >> (64 - width);
    for (const bool rising : {false, true}) {
      if (rising) std::sort(patterns.begin(), patterns.end());
      seeds.push_back(
          Joined({static_cast<std::uint64_t>(width - 8), patterns.size()}, {1, 2}, EncodeNumbers(patterns, width)));
    }
  }
  return seeds;
}

constexpr Target kTargets[] = {
    {"bits", Bits, BitSeeds},
    {"huffman", Huffman, HuffmanSeeds},
    {"rans", Rans, RansSeeds},
    {"gaps", Gaps, GapSeeds},
    {"bitmap", Bitmap, BitmapSeeds},
    {"context_positions", ContextPositions, ContextPositionSeeds},
    {"context_symbols", ContextSymbols, ContextSymbolSeeds},
    {"numbers", Numbers, NumberSeeds},
};

}  // namespace

std::span<const Target> Targets() { return kTargets; }

}  // namespace tersetorch::fuzz
