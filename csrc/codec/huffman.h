// Canonical, length-limited Huffman codes.
//
// Stream: the table of code lengths, padded to a byte, then the codes, padded to a byte.
//
// Lengths, in symbol order, from a running state of two numbers: `before`, the length of the symbol before (0 means
// that it is not used), and `last`, the last length that was not 0; both start at 1, and an alphabet in sorted order,
// whose lengths rise and fall slowly, costs about two bits a symbol. Bits in the order they are read:
//   0            the same as before
//   1 0 s        last + 1 (s = 0) or last - 1 (s = 1)
//   1 1 0        0 after a used symbol, last after an unused one
//   1 1 1 llll   the length itself
//
// Codes are canonical (shorter before longer, then by symbol), their first bit first. One used symbol alone has the
// one-bit code 0, never an empty one: a stream without bits would allow any count.
//
// Lengths are optimal under the limit: package-merge, Larmore and Hirschberg, "A fast algorithm for optimal
// length-limited Huffman codes", J. ACM 37 (1990).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/bit_stream.h"
#include "kernels/common/export.h"

namespace tersetorch {

inline constexpr int kMaxCodeLength = 15;
inline constexpr std::size_t kMaxUsedSymbols = std::size_t{1} << kMaxCodeLength;
inline constexpr std::size_t kMaxAlphabet = 65536;

// The length of every symbol's code, 0 for a count of 0. Throws std::invalid_argument for more than kMaxAlphabet
// symbols or more than kMaxUsedSymbols used ones.
TERSETORCH_API std::vector<std::uint8_t> HuffmanLengths(std::span<const std::uint64_t> counts);

// Bytes of the table and of the codes, were `counts[s]` codes of each symbol s written with these lengths.
TERSETORCH_API std::uint64_t HuffmanBytes(std::span<const std::uint64_t> counts, std::span<const std::uint8_t> lengths);

class TERSETORCH_API HuffmanEncoder {
 public:
  explicit HuffmanEncoder(std::vector<std::uint8_t> lengths);

  void WriteTable(BitWriter& writer) const;

  // symbol must have a length other than 0.
  void Write(std::uint32_t symbol, BitWriter& writer) const { writer.Write(codes_[symbol], lengths_[symbol]); }

 private:
  std::vector<std::uint8_t> lengths_;
  std::vector<std::uint16_t> codes_;  // first bit lowest, as the stream wants it
};

class TERSETORCH_API HuffmanDecoder {
 public:
  // Reads the table; of `count` symbols, or more, that follow, many make it worth while to prepare for runs of them.
  // Throws std::invalid_argument when the table is cut short or its lengths are no complete prefix code.
  HuffmanDecoder(std::size_t alphabet, BitReader& reader, std::size_t count);

  // The next symbols. Throws std::invalid_argument when the stream ends or its bits are no code.
  void Read(BitReader& reader, std::span<std::uint16_t> symbols) const;

 private:
  std::uint16_t ReadOne(BitReader& reader) const;
  void PrepareRuns();
  std::size_t ReadRuns(BitReader& reader, std::span<std::uint16_t> symbols) const;

  struct Entry {
    std::uint16_t symbol;
    std::uint8_t length;  // 0: no code starts with these bits
  };

  // As many whole codes as the next kRunBits bits hold, but no more than kRunSymbols.
  static constexpr int kRunBits = 11, kRunSymbols = 3;
  struct Run {
    std::uint16_t symbols[kRunSymbols];
    std::uint8_t count;  // 0: the next code is longer, or there is none
    std::uint8_t length;
  };

  int index_bits_ = 1;
  std::vector<Entry> table_;  // [2^index_bits_], by the next bits of the stream
  std::vector<Run> runs_;     // [2^kRunBits], likewise, or empty
};

}  // namespace tersetorch
