// Static range coding by asymmetric numeral systems: as short as the counts allow, decoded from a table.
//
// A state x >= 2^16 holds what is still to be decoded. With frequencies f_s, which sum to 2^m, and starts b_s = the sum
// of those before, decoding takes the slot y = x mod 2^m, finds the symbol s with b_s <= y < b_s + f_s, and sets
//   x = f_s (x >> m) + y - b_s,  then, below 2^16, x = x << 16 | the next word.
// Encoding runs backwards from x = 2^16, which the decoder must therefore end with. Symbol i uses state i mod `states`;
// several states let a processor overlap their multiplications.
// Duda, "Asymmetric numeral systems" (arXiv 1311.2540, 2013); Giesen, "Interleaved entropy coders" (arXiv 1402.3392).
//
// Stream: a byte (bits 0-1: e, bit 2: kManyStates states in place of one, bits 4-7: m), the length of the table (seven
// bits a byte, lowest first, bit 7: more follow), the table, the states (4 bytes each), the words (2 bytes each), all
// little endian.
//
// Table, range coded: for every symbol a level, 0 if it is not used. Level l >= 1 has the weight 2^((l - 1) / 2^e), and
// the frequencies are the weights, scaled and rounded with the remainder carried on, at least 1 each. Coarse levels
// cost little: at 4 levels an octave frequencies are within 9 % of the counts, which lengthens the message by about
// 0.002 bits a symbol. Whether a symbol is used has its probability after the two before; a level is coded as its
// difference from the mean of the two levels before, sign and all, in Elias's gamma code of adaptive bits.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/common/export.h"

namespace tersetorch {

// Symbols that may be used; the alphabet may be larger (huffman.h).
inline constexpr std::size_t kMaxRansSymbols = 8192;
// A stream that is shorter should be written by another coder: readers compare a count with the stream's size.
inline constexpr std::size_t kRansItemsPerByte = 2048;

// How symbols with these counts are coded.
struct RansCoding {
  std::vector<std::uint16_t> levels;
  int levels_an_octave = 0;  // as a power of two
  int scale_bits = 0;
  std::uint64_t bytes = 0;  // of the stream, to a few bytes: an estimate
};

// The best coding. Throws std::invalid_argument for more than kMaxRansSymbols used symbols.
TERSETORCH_API RansCoding BestRansCoding(std::span<const std::uint64_t> counts);

// Every symbol must have a level. Encodes in one go, since it runs backwards.
TERSETORCH_API std::vector<std::uint8_t> RansEncode(std::span<const std::uint16_t> symbols, const RansCoding& coding);

class TERSETORCH_API RansDecoder {
 public:
  // Reads the table from memory that the caller keeps alive. Throws std::invalid_argument when it is damaged.
  RansDecoder(std::size_t alphabet, std::span<const std::uint8_t> stream);

  // All three throw std::invalid_argument when the stream holds something else.
  std::uint16_t Read();
  void Read(std::span<std::uint16_t> symbols);
  void Finish() const;

  // Bytes before the states.
  std::size_t TableBytes() const { return table_bytes_; }

 private:
  static constexpr std::size_t kManyStates = 4;
  struct Slot {
    std::uint16_t frequency;
    std::uint16_t offset;  // of the slot among the symbol's
    std::uint16_t symbol;
    std::uint16_t unused;
  };

  std::span<const std::uint8_t> stream_;
  std::size_t next_ = 0;
  std::size_t table_bytes_ = 0;
  std::size_t states_ = 1;
  std::size_t turn_ = 0;
  int scale_bits_ = 0;
  std::array<std::uint32_t, kManyStates> state_{};
  std::vector<Slot> slots_;  // [2^scale_bits]
};

}  // namespace tersetorch
