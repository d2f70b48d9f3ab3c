// y = relu?(conv2d(x, W) + bias) for a sparse weight W, directly from the image: no im2col matrix is built.
//
// Math:   y[o][i][j] = bias[o] + sum over the non-zeros (c, kh, kw) of filter o of
//         w * x[c][i * stride_h + kh * dilation_h - pad_h][j * stride_w + kw * dilation_w - pad_w], x being 0 outside;
//         at least 0 with relu. w is values[k] or codebook[values[k]]. Everything is accumulated in float32.
//         Words: a value is two bfloat16 or four int8, of neighbouring input channels at one tap, and x comes in planes
//         of such words (kernels/planes); a word with any non-zero is one, filled with zeros. Everywhere below, an
//         input channel is then a word. Pairs: products of two bfloat16 are exact in float32, so that the levels differ
//         by the rounding of sums alone. Quads: x is q * image_scale with int8 q, and
//         y = fma(sum of w * q * row_scales[o], image_scale, bias[o]) with an exact integer sum: the same bits at every
//         level.
// Method: a tile of outputs is kTileRows vectors at most, one vector for each of so many rows of outputs. Channel block
//         after channel block, the inputs that it needs are copied into a buffer of the first cache level as vectors
//         that are what one tap multiplies: lane j of slot i of (c, kw) belongs to output column j. A non-zero is then
//         one number, the place of its tap's first vector: it multiplies the vectors that follow each other from there,
//         all of them aligned. ConvSlots says which input rows the slots hold; taps whose rows overlap share slots.
// Layout: W is cut into blocks of kConvRows filters and channel_block input channels (channels of all groups counted
//         through), ordered by channel block, then filters. blocks[i] is where the segments and the non-zeros of block
//         i start. A segment is a filter with non-zeros in the block: filter in the block << 16 | number of them, more
//         of them first, so that equal trip counts follow each other. indices are vectors from the start of the buffer:
//         ((channel in the block * kernel_w + kw) * slots + slot of kh). The layout depends on neither the level nor
//         the sizes of the image.
// Limits: a non-zero costs R vector multiply-adds, as many loads, one for its value and 1/4 for its index: loads
// decide.
//         A core that sustains 1.8 64-byte loads and 2 multiply-adds a cycle takes 4.5 cycles for R = 7, 78 % of the
//         FMA limit; the kernel takes 4.6 to 4.9. Each segment costs about 15 cycles more, to read and write its sums
//         and to start its chains: as much as 3 to 4 non-zeros, so that few channels or low densities lose a part.
//         Packing costs 4 to 5 cycles a vector. Lanes beyond the image are lost (1 of 8 at 14 columns): ConvPlan
//         chooses tiles that lose few. With few input channels or a kernel of 1 x 1 the images' bytes decide instead.
//         A word costs the loads of a non-zero and does the work of 2 or 4. Where non-zeros lie at random, a share d of
//         them, words are 1 - (1 - d)^2 or 1 - (1 - d)^4 of all places: 1.21 or 1.70 times less than the non-zeros at
//         35 %, 1.05 or 1.16 times at 10 %. Of segments and of packed vectors there are 2 or 4 times less. Planes of
//         words read an image once and write a half or a quarter of it.
// Safety: ConvCheck compares offsets, segments, indices and codes with their bounds; the other functions rely on it.
// Source: kernel offsets into a padded copy follow Park et al., Faster CNNs with Direct Sparse Convolutions and Guided
//         Pruning (2017), section 2; copies that make each tap's rows aligned vectors and channel blocks are ours.
//
// Single-threaded, and a number does not depend on how the caller splits the work. No pointer but scratch needs to be
// aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

inline constexpr std::int64_t kConvRows = 64;         // filters of a block
inline constexpr std::int64_t kConvTileRows = 8;      // vectors of a tile at most
inline constexpr std::int64_t kConvMaxIndex = 65536;  // vectors of a buffer at most, and non-zeros of a segment
inline constexpr std::int64_t kConvMaxLanes = 16;
inline constexpr std::int64_t kConvMaxEntries = 256;

enum class ConvValues : int { kFloat32, kBFloat16, kCodes, kBFloat16Pairs, kInt8Quads };
// How a product rounds its weight and its images: not, to bfloat16, or to int8 with a scale for each row and each
// image.
enum class ConvMode : int { kExact, kBFloat16, kInt8 };
enum class ConvStatus : int { kOk, kBadBlock, kBadSegment, kBadIndex, kBadCode };

struct ConvShape {
  std::int64_t in_channels, out_channels, groups, kernel_h, kernel_w;
  std::int64_t stride_h, stride_w, dilation_h, dilation_w;
};

namespace {

inline std::int64_t ConvGcd(std::int64_t a, std::int64_t b) { return b == 0 ? a : ConvGcd(b, a % b); }

// Which input rows the slots of a channel hold. Taps kh with the same kh % period form a class; the rows of a class
// lie stride_h apart, and each tap reads kTileRows of them, `step` further than the tap before it in the class.
struct ConvSlots {
  explicit ConvSlots(const ConvShape& s) : kernel_h(s.kernel_h) {
    const std::int64_t common = ConvGcd(s.stride_h, s.dilation_h);
    period = s.stride_h / common;
    step = s.dilation_h / common;
    if (step > kConvTileRows || period > kernel_h) {
      period = kernel_h;  // nothing to share
      step = 0;
    }
  }

  std::int64_t Taps(std::int64_t of_class) const { return (kernel_h - of_class + period - 1) / period; }
  // Slots of a class when a tile has so many rows.
  std::int64_t Rows(std::int64_t of_class, std::int64_t tile_rows) const {
    return tile_rows + step * (Taps(of_class) - 1);
  }
  std::int64_t Base(std::int64_t of_class) const {
    std::int64_t base = 0;
    for (std::int64_t i = 0; i < of_class; ++i) base += Rows(i, kConvTileRows);
    return base;
  }
  std::int64_t Slot(std::int64_t kh) const { return Base(kh % period) + step * (kh / period); }
  std::int64_t Count() const { return Base(period); }

  std::int64_t kernel_h, period, step;
};

// The shape of a weight in words of `group` input channels; each group of filters begins with a word.
inline ConvShape ConvWordShape(ConvShape shape, std::int64_t group) {
  shape.in_channels = shape.groups * ((shape.in_channels / shape.groups + group - 1) / group);
  return shape;
}

}  // namespace

struct ConvWeight {
  const std::int32_t* blocks;    // [channel blocks * row blocks + 1, 2]: first segment, first non-zero
  const std::int32_t* segments;  // [segment_count]
  const std::uint16_t* indices;  // [nnz]
  const void* values;            // [nnz], as stored_as says; codes are uint8, pairs and quads 4 bytes
  ConvValues stored_as;
  const float* codebook;  // [entries], for codes only
  std::int64_t entries;
  std::int64_t segment_count, nnz;
  std::int64_t channel_block;
  ConvShape shape;
};

// How the outputs of one image are cut into tiles. A vector's lanes are `parts` times `columns` neighbouring outputs,
// the parts lying tile_rows rows below each other. In a line (one row of outputs and a kernel one row high) the vectors
// of a tile lie beside each other instead.
struct ConvPlan {
  bool line;
  std::int64_t lanes, columns, parts, tile_rows;
  std::int64_t tiles_across, tiles_down;
};

struct ConvArgs {
  ConvWeight weight;
  std::int64_t height, width, out_height, out_width, pad_h, pad_w;
  const float* planes;  // of one image, [in_channels, height, width], or its words; of quads plus ConvQuadOffset
  void* y;              // its outputs, [out_channels, out_height, out_width], or with the channels last
  FloatDtype stored_as;
  bool channels_last;
  const float* bias;  // [out_channels] or null
  bool relu;
  const float* row_scales;       // [out_channels], for quads only, as the next two
  const std::int32_t* row_sums;  // [out_channels]: the sum of a filter's int8
  float image_scale;
  ConvPlan plan;
  // Scratch, aligned to 64 bytes, of as many floats as ConvScratch says.
  float* buffer;
  float* line;
  float* sums;
};

struct ConvScratchSizes {
  std::int64_t buffer, line;
  std::int64_t sums;  // for one block of filters
};

// What the active level has added to the bytes of a quad of x, modulo 2^8: VNNI takes one factor without a sign.
TERSETORCH_API std::int32_t ConvQuadOffset() noexcept;
// Channels of a block, for a buffer that stays in the first cache level.
TERSETORCH_API std::int64_t ConvChannelBlock(const ConvShape& shape) noexcept;
TERSETORCH_API std::int64_t ConvLanes() noexcept;  // of the active level
TERSETORCH_API ConvPlan ConvPlanFor(const ConvShape& shape, std::int64_t nnz, std::int64_t pad_h,
                                    std::int64_t out_height, std::int64_t out_width, std::int64_t lanes) noexcept;
TERSETORCH_API ConvScratchSizes ConvScratch(const ConvWeight& weight, const ConvPlan& plan) noexcept;

TERSETORCH_API ConvStatus ConvCheck(const ConvWeight& weight) noexcept;

// The outputs of one tile for the filters of blocks [row_begin, row_end).
TERSETORCH_API void Conv(const ConvArgs& args, std::int64_t tile, std::int64_t row_begin,
                         std::int64_t row_end) noexcept;

struct ConvPlanesArgs {
  const void* x;  // [channels, pixels], or [pixels, channels] with the channels last
  FloatDtype stored_as;
  bool channels_last;
  std::int64_t channels, pixels;
  float* planes;  // [channels, pixels]
};

// The planes of pixels [begin, end) of an image that is not stored as Conv reads it.
TERSETORCH_API void ConvPlanes(const ConvPlanesArgs& args, std::int64_t begin, std::int64_t end) noexcept;

struct ConvPackArgs {
  ConvShape shape;
  const std::int32_t* row_offsets;  // of the weight in compressed sparse rows, [out_channels + 1], valid
  const std::int32_t* col_indices;  // [nnz], each in [0, in_channels / groups * kernel_h * kernel_w)
  std::int64_t channel_block;
  std::int32_t* blocks;    // [channel blocks * row blocks + 1, 2]
  std::int32_t* segments;  // [channel blocks * out_channels], of which blocks says how many are used
  std::uint16_t* indices;  // [nnz]
  std::int32_t* sources;   // [nnz]: the position in col_indices that each non-zero comes from
  std::int32_t* scratch;   // [channel blocks * out_channels + kernel_h]
};

// Lays out a weight in compressed sparse rows.
TERSETORCH_API void ConvPack(const ConvPackArgs& args) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
struct ConvKernels {
  std::int64_t lanes;
  std::int32_t quad_offset;
  ConvStatus (*check)(const ConvWeight&) noexcept;
  void (*planes)(const ConvPlanesArgs&, std::int64_t, std::int64_t) noexcept;
  void (*conv)(const ConvArgs&, std::int64_t, std::int64_t, std::int64_t) noexcept;
};
extern const ConvKernels kConvScalar;
extern const ConvKernels kConvAvx2;
extern const ConvKernels kConvAvx512;
extern const ConvKernels kConvAvx512Bf16;

}  // namespace tersetorch
