// Panels of windows against the reference's panels of the same windows cut out one by one, bit by bit, at every level.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/codebook_conv2d/codebook_conv2d.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/parts.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  const CodebookConvKernels& kernels;
};

struct Case {
  Index channels, height, width, pad_h, pad_w;
  CodebookWindowShape shape;
  Index OutHeight() const {
    return (height + 2 * pad_h - shape.dilation_h * (shape.kernel_h - 1) - 1) / shape.stride_h + 1;
  }
  Index OutWidth() const {
    return (width + 2 * pad_w - shape.dilation_w * (shape.kernel_w - 1) - 1) / shape.stride_w + 1;
  }
};

constexpr Index kImages = 3;
constexpr float kInverse = 20.0f;

// Windows [first, first + count) as rows of columns.
std::vector<float> Windows(const Case& c, const std::vector<float>& x, Index first, Index count) {
  std::vector<float> windows;
  for (Index output = first; output < first + count; ++output) {
    const Index j = output % c.OutWidth(), i = output / c.OutWidth() % c.OutHeight();
    const Index image = output / c.OutWidth() / c.OutHeight();
    for (Index channel = 0; channel < c.channels; ++channel) {
      for (Index kh = 0; kh < c.shape.kernel_h; ++kh) {
        for (Index kw = 0; kw < c.shape.kernel_w; ++kw) {
          const Index h = i * c.shape.stride_h + kh * c.shape.dilation_h - c.pad_h;
          const Index w = j * c.shape.stride_w + kw * c.shape.dilation_w - c.pad_w;
          const bool inside = 0 <= h && h < c.height && 0 <= w && w < c.width;
          windows.push_back(inside ? x[((image * c.channels + channel) * c.height + h) * c.width + w] : 0.0f);
        }
      }
    }
  }
  return windows;
}

void TestOne(const Variant& variant, const Case& c, CodebookMode mode, int bits, Index block, bool padded,
             FloatDtype stored_as, std::mt19937& rng) {
  const bool integer = mode == CodebookMode::kInt8;
  const auto x = Random(kImages * c.channels * c.height * c.width, rng);
  std::vector<std::uint16_t> narrow;
  for (const float v : x) narrow.push_back(Truncated(v));
  Unaligned<float> floats(x);
  Unaligned<std::uint16_t> halves(narrow);
  const Index image = c.channels * c.height * c.width, size = stored_as == FloatDtype::kFloat32 ? 4 : 2;
  const auto* images = stored_as == FloatDtype::kFloat32 ? reinterpret_cast<const char*>(floats.data())
                                                         : reinterpret_cast<const char*>(halves.data());
  CodebookWindowsArgs a{};
  a.images = images;
  a.image_step = image, a.channel_step = c.height * c.width, a.row_step = c.width, a.phase_step = 0;
  const Index phase = CodebookPhaseColumns(c.width, c.pad_w, c.shape.stride_w);
  const Index rows = c.height + 2 * c.pad_h, row = phase * c.shape.stride_w;
  std::vector<char> memory(1 + kImages * c.channels * rows * row * (integer ? 1 : 4) + kCodebookWindowSlack, 'x');
  if (padded) {
    a.images = memory.data() + 1;
    a.image_step = c.channels * rows * row, a.channel_step = rows * row, a.row_step = row, a.phase_step = phase;
    for (Index n = 0; n < kImages; ++n) {
      const CodebookPadArgs pad{images + n * image * size,
                                stored_as,
                                c.channels,
                                c.height,
                                c.width,
                                c.pad_h,
                                c.pad_w,
                                c.shape,
                                integer,
                                kInverse,
                                memory.data() + 1 + n * a.image_step * (integer ? 1 : 4)};
      InParts(c.channels / 2, c.channels, [&](Index begin, Index end) { variant.kernels.pad(pad, begin, end); });
    }
  }
  a.shape = c.shape;
  a.channels = c.channels;
  a.out_height = c.OutHeight(), a.out_width = c.OutWidth();
  const Index columns = c.channels * c.shape.kernel_h * c.shape.kernel_w,
              outputs = kImages * a.out_height * a.out_width;
  a.column_block = block == 0 ? columns : block;
  a.bits = bits, a.mode = mode;
  const Index chunks = CodeRowBytes(columns, a.column_block, bits) / kCodeChunkBytes;
  for (const Index width : {1, 2, 4, 8, 16, 32, 48, 64}) {
    const Index count = std::min(outputs, std::max<Index>(1, width - static_cast<Index>(rng() % (width / 2 + 1))));
    a.width = width, a.count = count;
    a.first = static_cast<Index>(rng() % (outputs - count + 1));
    const std::size_t bytes = CodebookPanelBytes(chunks * kCodeChunkBytes, bits, mode, width);
    Unaligned<char> got(std::vector<char>(bytes, 'g')), want(std::vector<char>(bytes, 'w'));
    std::vector<std::int32_t> sums(width, 7), want_sums(width, 7);
    a.panel = got.data(), a.sums = sums.data();
    InParts(chunks / 2, chunks, [&](Index begin, Index end) { variant.kernels.pack_windows(a, begin, end); });
    const auto windows = Windows(c, x, a.first, count);
    const std::vector<float> inverses(count, kInverse);
    kCodebookScalar.pack_samples({windows.data(), FloatDtype::kFloat32, count, columns, a.column_block, bits, mode,
                                  inverses.data(), want.data(), width, want_sums.data()},
                                 0, chunks);
    auto packed = got.Values();
    const auto expected = want.Values();
    if (!integer && width > kCodebookFewSamples) {  // what is left over of a chunk counts as 0
      const Index columns_of_chunk = 512 / bits, column_bytes = 4 * width;
      for (Index i = 0; i < chunks; ++i) {
        const Index of_block = CodeChunks(a.column_block, bits), in_block = i % of_block * columns_of_chunk;
        const Index left = std::min(a.column_block - in_block, columns - i / of_block * a.column_block - in_block);
        for (Index b = std::min(left, columns_of_chunk) * column_bytes; b < columns_of_chunk * column_bytes; ++b) {
          packed[i * columns_of_chunk * column_bytes + b] = 0;
        }
      }
    }
    Expect(packed == expected && (!integer || sums == want_sums),
           "%s: %ld x %ld x %ld, taps %ld x %ld, stride %ld %ld, padding %ld %ld, %d bits, mode %d, width %ld",
           variant.name, long{c.channels}, long{c.height}, long{c.width}, long{c.shape.kernel_h},
           long{c.shape.kernel_w}, long{c.shape.stride_h}, long{c.shape.stride_w}, long{c.pad_h}, long{c.pad_w}, bits,
           static_cast<int>(mode), long{width});
  }
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kCodebookConvScalar},
                              {"avx2", CpuIsa::kAvx2, kCodebookConvAvx2},
                              {"avx512", CpuIsa::kAvx512, kCodebookConvAvx512}};
  const Case cases[] = {{3, 7, 7, 1, 1, {3, 3, 1, 1, 1, 1}},   {5, 9, 37, 0, 2, {1, 5, 1, 1, 1, 1}},
                        {2, 12, 23, 3, 3, {7, 7, 2, 2, 1, 1}}, {70, 5, 6, 0, 0, {1, 1, 1, 1, 1, 1}},
                        {3, 11, 13, 2, 0, {2, 3, 1, 3, 3, 2}}, {4, 9, 8, 0, 1, {1, 1, 2, 2, 1, 1}},
                        {1, 1, 1, 0, 0, {1, 1, 1, 1, 1, 1}},   {2, 6, 80, 0, 0, {3, 3, 1, 1, 1, 1}},
                        {3, 5, 1, 2, 4, {3, 4, 3, 5, 1, 2}}};
  for (const Variant& variant : variants) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    for (const Case& c : cases) {
      for (const int bits : {2, 4, 8}) {
        for (const Index block : {0, 20}) {
          for (const auto mode : {CodebookMode::kExact, CodebookMode::kBFloat16, CodebookMode::kInt8}) {
            TestOne(variant, c, mode, bits, block, true, kFloats[rng() % 2], rng);
            const bool plain = c.pad_h + c.pad_w == 0 && c.shape.stride_w == 1;
            if (plain && mode != CodebookMode::kInt8) {
              TestOne(variant, c, mode, bits, block, false, FloatDtype::kFloat32, rng);
            }
          }
        }
      }
    }
  }
  return Failures() != 0;
}
