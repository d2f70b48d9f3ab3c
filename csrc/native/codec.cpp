#include "native/codec.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "codec/bit_stream.h"
#include "codec/contexts.h"
#include "codec/huffman.h"
#include "codec/numbers.h"
#include "codec/positions.h"
#include "codec/rans.h"

namespace py = pybind11;

namespace tersetorch {
namespace {

using Codes = py::array_t<std::uint32_t, py::array::c_style>;
using Symbols = py::array_t<std::uint16_t, py::array::c_style>;
using Counts = py::array_t<std::uint64_t, py::array::c_style>;
using Positions = py::array_t<std::int64_t, py::array::c_style>;

// What reading accepts: a stream that says more costs more memory than its size promises.
constexpr std::uint64_t kMaxItemsPerByte = 4096;

std::span<const std::uint8_t> BytesOf(const py::bytes& data) {
  const std::string_view view = data;
  return {reinterpret_cast<const std::uint8_t*>(view.data()), view.size()};
}

template <typename T>
std::span<const T> ItemsOf(const py::array_t<T, py::array::c_style>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

py::bytes ToBytes(const std::vector<std::uint8_t>& stream) {
  return py::bytes(reinterpret_cast<const char*>(stream.data()), stream.size());
}

void CheckRange(const char* function, const char* argument, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high) {
    throw py::value_error(std::string(function) + ": " + argument + " must lie in [" + std::to_string(low) + ", " +
                          std::to_string(high) + "], got " + std::to_string(value));
  }
}

// Compared before allocating: a damaged count must not ask for memory that the stream cannot fill.
void CheckCount(const char* function, std::int64_t count, std::size_t bytes, int width) {
  if (count < 0 || static_cast<std::uint64_t>(count) > std::uint64_t{bytes} * 8 / static_cast<unsigned>(width)) {
    throw py::value_error(std::string(function) + ": data must hold count codes, got " + std::to_string(bytes) +
                          " bytes for " + std::to_string(count) + " codes of at least " + std::to_string(width) +
                          " bits; the stream is cut short");
  }
}

// The same for coders that can spend less than a bit on an item.
void CheckItems(const char* function, std::int64_t count, const py::bytes& data) {
  const std::uint64_t most = std::uint64_t{BytesOf(data).size()} * kMaxItemsPerByte;
  if (count < 0 || static_cast<std::uint64_t>(count) > most) {
    throw py::value_error(std::string(function) + ": data must hold at most " + std::to_string(kMaxItemsPerByte) +
                          " items a byte, got " + std::to_string(BytesOf(data).size()) + " bytes for " +
                          std::to_string(count));
  }
}

py::bytes WriteBits(const Codes& codes, int width) {
  CheckRange("write_bits", "width", width, 1, kMaxBitWidth);
  BitWriter writer;
  for (const std::uint32_t code : ItemsOf(codes)) {
    if (std::uint64_t{code} >> width != 0) {
      throw py::value_error("write_bits: codes must fit " + std::to_string(width) + " bits, got " +
                            std::to_string(code) + "; raise width");
    }
    writer.Write(code, width);
  }
  return ToBytes(writer.Finish());
}

Codes ReadBits(const py::bytes& data, int width, std::int64_t count) {
  CheckRange("read_bits", "width", width, 1, kMaxBitWidth);
  const std::span<const std::uint8_t> stream = BytesOf(data);
  CheckCount("read_bits", count, stream.size(), width);
  Codes codes(count);
  BitReader reader(stream.data(), stream.size());
  reader.Read(width,
              std::span(codes.mutable_data(), static_cast<std::size_t>(count)));  // CheckCount saw that it holds them
  if (!reader.OnlyPaddingLeft()) {
    throw py::value_error("read_bits: data must end after the last code in zero bits, got " +
                          std::to_string(stream.size()) + " bytes; pass the stream alone");
  }
  return codes;
}

std::uint64_t HuffmanSize(const Counts& counts) {
  const std::span<const std::uint64_t> items = ItemsOf(counts);
  return HuffmanBytes(items, HuffmanLengths(items));
}

// How often each symbol occurs.
std::vector<std::uint64_t> CountsOf(const char* function, const Symbols& symbols, std::int64_t alphabet) {
  CheckRange(function, "alphabet", alphabet, 0, kMaxAlphabet);
  std::vector<std::uint64_t> counts(static_cast<std::size_t>(alphabet));
  for (const std::uint16_t symbol : ItemsOf(symbols)) {
    if (symbol >= counts.size()) CheckRange(function, "symbols", symbol, 0, alphabet - 1);
    ++counts[symbol];
  }
  return counts;
}

py::bytes HuffmanEncode(const Symbols& symbols, std::int64_t alphabet) {
  const HuffmanEncoder encoder(HuffmanLengths(CountsOf("huffman_encode", symbols, alphabet)));
  BitWriter writer;
  encoder.WriteTable(writer);
  for (const std::uint16_t symbol : ItemsOf(symbols)) encoder.Write(symbol, writer);
  return ToBytes(writer.Finish());
}

Symbols HuffmanDecode(const py::bytes& data, std::int64_t alphabet, std::int64_t count) {
  CheckRange("huffman_decode", "alphabet", alphabet, 0, kMaxAlphabet);
  const std::span<const std::uint8_t> stream = BytesOf(data);
  CheckCount("huffman_decode", count, stream.size(), 1);
  BitReader reader(stream.data(), stream.size());
  const HuffmanDecoder decoder(static_cast<std::size_t>(alphabet), reader, static_cast<std::size_t>(count));
  Symbols symbols(count);
  decoder.Read(reader, {symbols.mutable_data(), static_cast<std::size_t>(count)});
  if (!reader.OnlyPaddingLeft()) {
    throw py::value_error("huffman_decode: data must end after the last code in zero bits, got " +
                          std::to_string(stream.size()) + " bytes; pass the stream alone");
  }
  return symbols;
}

std::size_t HuffmanTableSize(const py::bytes& data, std::int64_t alphabet) {
  CheckRange("huffman_table_size", "alphabet", alphabet, 0, kMaxAlphabet);
  const std::span<const std::uint8_t> stream = BytesOf(data);
  BitReader reader(stream.data(), stream.size());
  const HuffmanDecoder decoder(static_cast<std::size_t>(alphabet), reader, 0);
  return reader.BytesTaken();
}

std::uint64_t RansSize(const Counts& counts) { return BestRansCoding(ItemsOf(counts)).bytes; }

py::bytes RansEncodeSymbols(const Symbols& symbols, std::int64_t alphabet) {
  return ToBytes(RansEncode(ItemsOf(symbols), BestRansCoding(CountsOf("rans_encode", symbols, alphabet))));
}

Symbols RansDecode(const py::bytes& data, std::int64_t alphabet, std::int64_t count) {
  CheckRange("rans_decode", "alphabet", alphabet, 0, kMaxAlphabet);
  CheckItems("rans_decode", count, data);
  RansDecoder decoder(static_cast<std::size_t>(alphabet), BytesOf(data));
  Symbols symbols(count);
  decoder.Read({symbols.mutable_data(), static_cast<std::size_t>(count)});
  decoder.Finish();
  return symbols;
}

std::size_t RansTableSize(const py::bytes& data, std::int64_t alphabet) {
  CheckRange("rans_table_size", "alphabet", alphabet, 0, kMaxAlphabet);
  return RansDecoder(static_cast<std::size_t>(alphabet), BytesOf(data)).TableBytes();
}

constexpr std::array<const char*, 3> kGapCoders = {"gaps", "gaps-huffman", "gaps-rans"};

GapCoder GapCoderOf(const char* function, const std::string& name) {
  const auto found = std::find(kGapCoders.begin(), kGapCoders.end(), name);
  if (found == kGapCoders.end()) {
    throw py::value_error(std::string(function) + ": coder must be gaps, gaps-huffman or gaps-rans, got " + name);
  }
  return static_cast<GapCoder>(found - kGapCoders.begin());
}

py::tuple BestGaps(const Positions& positions) {
  const GapCoding best = BestGapCoding(ItemsOf(positions));
  return py::make_tuple(kGapCoders[static_cast<std::size_t>(best.coder)], best.width, best.bytes);
}

py::bytes GapsEncode(const Positions& positions, const std::string& coder, int width) {
  CheckRange("encode_gaps", "width", width, 1, kMaxGapWidth);
  return ToBytes(EncodeGaps(ItemsOf(positions), width, GapCoderOf("encode_gaps", coder)));
}

py::bytes BitmapEncode(const Positions& positions, std::int64_t size) {
  CheckRange("encode_bitmap", "size", size, 0, std::int64_t{1} << 48);
  return ToBytes(EncodeBitmap(ItemsOf(positions), size));
}

// Room for `count` positions, after comparing the count with the stream.
Positions RoomFor(const char* function, std::int64_t count, const py::bytes& data, std::int64_t size,
                  bool below_a_bit = false) {
  CheckRange(function, "size", size, 0, std::int64_t{1} << 48);
  below_a_bit ? CheckItems(function, count, data) : CheckCount(function, count, BytesOf(data).size(), 1);
  return Positions(count);
}

Positions GapsDecode(const py::bytes& data, const std::string& coder, int width, std::int64_t count,
                     std::int64_t size) {
  CheckRange("decode_gaps", "width", width, 1, kMaxGapWidth);
  const GapCoder gap_coder = GapCoderOf("decode_gaps", coder);
  Positions positions = RoomFor("decode_gaps", count, data, size, gap_coder == GapCoder::kRans);
  DecodeGaps(BytesOf(data), width, gap_coder, size, {positions.mutable_data(), static_cast<std::size_t>(count)});
  return positions;
}

Positions BitmapDecode(const py::bytes& data, std::int64_t count, std::int64_t size) {
  Positions positions = RoomFor("decode_bitmap", count, data, size);
  DecodeBitmap(BytesOf(data), size, {positions.mutable_data(), static_cast<std::size_t>(count)});
  return positions;
}

using Bytes = py::array_t<std::uint8_t, py::array::c_style>;
using Patterns = py::array_t<std::uint64_t, py::array::c_style>;

WeightGrid GridOf(const char* function, std::int64_t size, std::int64_t channels, std::int64_t kernel,
                  std::int64_t kernel_width) {
  CheckRange(function, "size", size, 1, std::int64_t{1} << 32);
  CheckRange(function, "channels", channels, 1, size);
  CheckRange(function, "kernel", kernel, 1, size);
  CheckRange(function, "kernel_width", kernel_width, 1, kernel);
  if (kernel % kernel_width != 0 || size % (channels * kernel) != 0) {
    throw py::value_error(std::string(function) + ": size must be rows of channels of kernels, got " +
                          std::to_string(size) + " for " + std::to_string(channels) + " channels of " +
                          std::to_string(kernel) + " places");
  }
  return {size, channels, kernel, kernel_width};
}

SymbolRange RangeOf(const char* function, int width, int center) {
  CheckRange(function, "width", width, 1, kMaxContextBits);
  CheckRange(function, "center", center, 0, std::int64_t{1} << width);
  return {width, center};
}

// Symbols at all places of the grid, or one for each position.
void CheckPlaces(const char* function, std::int64_t count, const Positions& positions, const WeightGrid& grid) {
  const std::int64_t places = positions.size() == 0 ? grid.size : positions.size();
  if (count != places) {
    throw py::value_error(std::string(function) + ": there must be a symbol for each of " + std::to_string(places) +
                          " places, got " + std::to_string(count));
  }
}

py::bytes ContextsEncodePositions(const Positions& positions, std::int64_t size, std::int64_t channels,
                                  std::int64_t kernel, std::int64_t kernel_width) {
  const WeightGrid grid = GridOf("contexts_encode_positions", size, channels, kernel, kernel_width);
  return ToBytes(EncodePositionsInContext(ItemsOf(positions), grid));
}

Positions ContextsDecodePositions(const py::bytes& data, std::int64_t count, std::int64_t size, std::int64_t channels,
                                  std::int64_t kernel, std::int64_t kernel_width) {
  const WeightGrid grid = GridOf("contexts_decode_positions", size, channels, kernel, kernel_width);
  CheckItems("contexts_decode_positions", count, data);
  Positions positions(count);
  DecodePositionsInContext(BytesOf(data), grid, {positions.mutable_data(), static_cast<std::size_t>(count)});
  return positions;
}

py::bytes ContextsEncodeSymbols(const Bytes& symbols, const Positions& positions, std::int64_t size,
                                std::int64_t channels, std::int64_t kernel, std::int64_t kernel_width, int width,
                                int center) {
  const WeightGrid grid = GridOf("contexts_encode_symbols", size, channels, kernel, kernel_width);
  const SymbolRange range = RangeOf("contexts_encode_symbols", width, center);
  CheckPlaces("contexts_encode_symbols", symbols.size(), positions, grid);
  for (const std::uint8_t symbol : ItemsOf(symbols)) {
    if (symbol >> width != 0) CheckRange("contexts_encode_symbols", "symbols", symbol, 0, (1 << width) - 1);
  }
  return ToBytes(EncodeSymbolsInContext(ItemsOf(symbols), ItemsOf(positions), grid, range));
}

Bytes ContextsDecodeSymbols(const py::bytes& data, std::int64_t count, const Positions& positions, std::int64_t size,
                            std::int64_t channels, std::int64_t kernel, std::int64_t kernel_width, int width,
                            int center) {
  const WeightGrid grid = GridOf("contexts_decode_symbols", size, channels, kernel, kernel_width);
  const SymbolRange range = RangeOf("contexts_decode_symbols", width, center);
  CheckItems("contexts_decode_symbols", count, data);
  CheckPlaces("contexts_decode_symbols", count, positions, grid);
  Bytes symbols(count);
  DecodeSymbolsInContext(BytesOf(data), ItemsOf(positions), grid, range,
                         {symbols.mutable_data(), static_cast<std::size_t>(count)});
  return symbols;
}

py::bytes NumbersEncode(const Patterns& patterns, int width) {
  CheckRange("numbers_encode", "width", width, 8, 64);
  for (const std::uint64_t pattern : ItemsOf(patterns)) {
    if (width < 64 && pattern >> width != 0) {
      throw py::value_error("numbers_encode: patterns must fit " + std::to_string(width) + " bits, got more");
    }
  }
  return ToBytes(EncodeNumbers(ItemsOf(patterns), width));
}

Patterns NumbersDecode(const py::bytes& data, int width, std::int64_t count) {
  CheckRange("numbers_decode", "width", width, 8, 64);
  CheckItems("numbers_decode", count, data);
  Patterns patterns(count);
  DecodeNumbers(BytesOf(data), width, {patterns.mutable_data(), static_cast<std::size_t>(count)});
  return patterns;
}

}  // namespace

void BindCodec(py::module_& m) {
  m.def("write_bits", &WriteBits, py::arg("codes").noconvert(), py::arg("width"));
  m.def("read_bits", &ReadBits, py::arg("data"), py::arg("width"), py::arg("count"));
  m.def("huffman_size", &HuffmanSize, py::arg("counts").noconvert());
  m.def("huffman_encode", &HuffmanEncode, py::arg("symbols").noconvert(), py::arg("alphabet"));
  m.def("huffman_decode", &HuffmanDecode, py::arg("data"), py::arg("alphabet"), py::arg("count"));
  m.def("huffman_table_size", &HuffmanTableSize, py::arg("data"), py::arg("alphabet"));
  m.def("rans_size", &RansSize, py::arg("counts").noconvert());
  m.def("rans_encode", &RansEncodeSymbols, py::arg("symbols").noconvert(), py::arg("alphabet"));
  m.def("rans_decode", &RansDecode, py::arg("data"), py::arg("alphabet"), py::arg("count"));
  m.def("rans_table_size", &RansTableSize, py::arg("data"), py::arg("alphabet"));
  m.def("best_gaps", &BestGaps, py::arg("positions").noconvert());
  m.def("encode_gaps", &GapsEncode, py::arg("positions").noconvert(), py::arg("coder"), py::arg("width"));
  m.def("decode_gaps", &GapsDecode, py::arg("data"), py::arg("coder"), py::arg("width"), py::arg("count"),
        py::arg("size"));
  const auto size = py::arg("size");
  const auto channels = py::arg("channels");
  const auto kernel = py::arg("kernel");
  const auto kernel_width = py::arg("kernel_width");
  m.def("contexts_encode_positions", &ContextsEncodePositions, py::arg("positions").noconvert(), size, channels, kernel,
        kernel_width);
  m.def("contexts_decode_positions", &ContextsDecodePositions, py::arg("data"), py::arg("count"), size, channels,
        kernel, kernel_width);
  m.def("contexts_encode_symbols", &ContextsEncodeSymbols, py::arg("symbols").noconvert(),
        py::arg("positions").noconvert(), size, channels, kernel, kernel_width, py::arg("width"), py::arg("center"));
  m.def("contexts_decode_symbols", &ContextsDecodeSymbols, py::arg("data"), py::arg("count"),
        py::arg("positions").noconvert(), size, channels, kernel, kernel_width, py::arg("width"), py::arg("center"));
  m.def("numbers_encode", &NumbersEncode, py::arg("patterns").noconvert(), py::arg("width"));
  m.def("numbers_decode", &NumbersDecode, py::arg("data"), py::arg("width"), py::arg("count"));
  m.def("encode_bitmap", &BitmapEncode, py::arg("positions").noconvert(), py::arg("size"));
  m.def("decode_bitmap", &BitmapDecode, py::arg("data"), py::arg("count"), py::arg("size"));
}

}  // namespace tersetorch
