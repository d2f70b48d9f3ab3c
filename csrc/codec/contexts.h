// Codes and positions of a tensor by probabilities that follow what lies around each weight.
//
// Every decision is a bit: whether a weight is stored (positions), or a bit of its symbol, the highest first (codes).
// Each of a few contexts, which is a number made of what both sides know already, has an adaptive probability p of its
// own for the bit. They are mixed in the logistic domain, weighted by weights w that follow the gradient of the
// message's length:
//   x_i = confidence_i ln(p_i / (1 - p_i)),   p = 1 / (1 + exp(-sum_i w_i x_i)),   w_i += rate x_i (bit - p),
// with a confidence that rises to 1 with the bits a context has seen. No table is stored: probabilities begin at a
// half. Mahoney, "Adaptive weighing of context models for lossless data compression" (2005); range_coder.h writes the
// bits.
//
// A weight stands in an output row, at an input channel, at a place of a kernel. Contexts of a position: how full its
// row and its channel are; what is stored to the left, above and elsewhere in its kernel; the same place in the two
// rows before, and the two channels before; its channel and the number in its kernel. Contexts of a code: how large the
// codes of its row have been; those of its channel; the codes to the left and above in its kernel (without a kernel,
// the two codes before); those at its place in the row and in the channel before. Symbols are in the order of their
// values, so that symbol - center is a size with a sign.
//
// Decoding takes 25 to 30 nanoseconds for each bit: one for each weight (positions), the symbols' width for each code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/common/export.h"

namespace tersetorch {

inline constexpr int kMaxContextBits = 8;

// A tensor as rows of channels of kernels, in C order.
struct WeightGrid {
  std::int64_t size = 0;
  std::int64_t channels = 1;
  std::int64_t kernel = 1;        // places
  std::int64_t kernel_width = 1;  // places in a line of it
};

// Symbols of `width` bits, 1 <= width <= kMaxContextBits; see above for center.
struct SymbolRange {
  int width = 1;
  int center = 0;
};

// All throw std::invalid_argument when positions do not rise in [0, grid.size), or when a stream holds something else.
// The caller has checked that the grid's sizes are at least 1, that they divide each other, and that a row has at most
// grid.size weights. Empty positions with as many symbols as grid.size mean all.
TERSETORCH_API std::vector<std::uint8_t> EncodePositionsInContext(std::span<const std::int64_t> positions,
                                                                  const WeightGrid& grid);
TERSETORCH_API void DecodePositionsInContext(std::span<const std::uint8_t> stream, const WeightGrid& grid,
                                             std::span<std::int64_t> positions);
TERSETORCH_API std::vector<std::uint8_t> EncodeSymbolsInContext(std::span<const std::uint8_t> symbols,
                                                                std::span<const std::int64_t> positions,
                                                                const WeightGrid& grid, SymbolRange range);
TERSETORCH_API void DecodeSymbolsInContext(std::span<const std::uint8_t> stream,
                                           std::span<const std::int64_t> positions, const WeightGrid& grid,
                                           SymbolRange range, std::span<std::uint8_t> symbols);

}  // namespace tersetorch
