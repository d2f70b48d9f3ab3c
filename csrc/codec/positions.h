// Where the non-zeros of a flattened tensor are: rising positions p_0 < p_1 < ... in [0, size), as gaps or as a bitmap.
//
// Gaps: with s = 2^width - 1, symbols below s are zeros skipped before an entry, and symbol s is a filler, which skips
// s zeros and is no entry (no value is stored for it). Entry k with g zeros before it is g / s fillers and the symbol
// g % s. The stream ends with the last entry. Symbols are written at a fixed width, as Huffman codes or
// by rANS.
// Fillers after Han, Mao and Dally, "Deep Compression" (2015), section 2; there a filler spends a value too.
//
// Bitmap: bit p is set when p is a position.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/common/export.h"

namespace tersetorch {

inline constexpr int kMaxGapWidth = 15;

enum class GapCoder { kPacked, kHuffman, kRans };

struct GapCoding {
  int width = 1;
  GapCoder coder = GapCoder::kPacked;
  std::uint64_t bytes = 0;
};

// The smallest way to write these gaps: every width and coder. Nothing is encoded; of rANS the bytes are an estimate.
// The functions that take positions throw std::invalid_argument when they do not rise or lie outside [0, size).
TERSETORCH_API GapCoding BestGapCoding(std::span<const std::int64_t> positions);

TERSETORCH_API std::vector<std::uint8_t> EncodeGaps(std::span<const std::int64_t> positions, int width, GapCoder coder);

TERSETORCH_API std::vector<std::uint8_t> EncodeBitmap(std::span<const std::int64_t> positions, std::int64_t size);

// Fill `positions` from exactly this stream. Throw std::invalid_argument when it holds another number of positions, one
// outside [0, size), or anything after the last. The caller has checked that positions.size() is at most the bits of
// the stream.
TERSETORCH_API void DecodeGaps(std::span<const std::uint8_t> stream, int width, GapCoder coder, std::int64_t size,
                               std::span<std::int64_t> positions);

TERSETORCH_API void DecodeBitmap(std::span<const std::uint8_t> stream, std::int64_t size,
                                 std::span<std::int64_t> positions);

}  // namespace tersetorch
