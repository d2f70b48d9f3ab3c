// The CUDA kernel against sums in double, on shapes around its tile, both orders of an image's numbers, and damaged
// weights.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kernels/sparse_conv2d/conv_fragments_cuda.h"
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

// The same numbers in each way of storing them; codes go through a codebook of 7 entries.
struct Weight {
  // Some filters are empty and some full.
  Weight(const ConvShape& s, double density, std::mt19937& rng)
      : shape(s), columns(s.in_channels / s.groups * s.kernel_h * s.kernel_w), codebook(Random(7, rng)) {
    for (Index r = 0; r < s.out_channels; ++r) {
      std::bernoulli_distribution kept(r % 5 == 3 ? 0 : r % 7 == 2 ? 1 : density);
      for (Index c = 0; c < columns; ++c) {
        if (!kept(rng)) continue;
        col_indices.push_back(static_cast<std::int32_t>(c));
        codes.push_back(static_cast<std::uint8_t>(rng() % codebook.size()));
        values.push_back(codebook[codes.back()]);
        halves.push_back(Truncated(values.back()));
      }
      row_offsets.push_back(static_cast<std::int32_t>(col_indices.size()));
    }
  }
  Index nnz() const { return static_cast<Index>(col_indices.size()); }

  ConvShape shape;
  Index columns;
  std::vector<std::int32_t> row_offsets{0}, col_indices;
  std::vector<float> codebook, values;
  std::vector<std::uint16_t> halves;
  std::vector<std::uint8_t> codes;
};

// Images of one call and what it does with them.
struct Call {
  Index images, height, width, pad_h, pad_w;
  bool channels_last = false, relu = false;
  FloatDtype stored_as = FloatDtype::kFloat32;
  CsrValues values_as = CsrValues::kFloat32;
  ConvMode mode = ConvMode::kExact;
  int splits = 0;          // blocks that share a filter's channels; 0: as planned
  bool fragments = false;  // whether or not they are expected to be faster

  Index OutHeight(const ConvShape& s) const {
    return (height + 2 * pad_h - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
  }
  Index OutWidth(const ConvShape& s) const {
    return (width + 2 * pad_w - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
  }
  ConvSteps Steps(Index channels, Index rows, Index cols) const {
    if (channels_last) return {channels * rows * cols, 1, cols * channels, channels};
    return {channels * rows * cols, rows * cols, cols, 1};
  }
};

std::vector<float> Run(const Weight& w, const Call& call, const std::vector<float>& x_numbers,
                       const std::vector<float>* bias_numbers) {
  const ConvShape& s = w.shape;
  const Index out_height = call.OutHeight(s), out_width = call.OutWidth(s);
  DeviceArray<std::int32_t> offsets("row_offsets", w.row_offsets), indices("col_indices", w.col_indices);
  DeviceArray<float> codebook("codebook", w.codebook), values("values", w.values);
  DeviceArray<std::uint16_t> halves("values", w.halves);
  DeviceArray<std::uint8_t> codes("codes", w.codes);
  DeviceArray<float> bias("bias", bias_numbers == nullptr ? std::vector<float>() : *bias_numbers);
  DeviceFloats x("x", call.stored_as, x_numbers);
  DeviceFloats y("y", call.stored_as, call.images * s.out_channels * out_height * out_width);
  DeviceFloats scales("scales", FloatDtype::kFloat32, 2 * (call.images + s.out_channels));
  const void* chosen = call.values_as == CsrValues::kFloat32    ? static_cast<const void*>(values.data())
                       : call.values_as == CsrValues::kBFloat16 ? static_cast<const void*>(halves.data())
                                                                : codes.data();
  const CsrWeight weight{offsets.data(),
                         indices.data(),
                         CsrIndices::kInt32,
                         chosen,
                         call.values_as,
                         codebook.data(),
                         static_cast<Index>(w.codebook.size()),
                         s.out_channels,
                         w.columns,
                         w.nnz()};
  ConvCudaArgs args{weight,
                    s,
                    call.images,
                    call.height,
                    call.width,
                    out_height,
                    out_width,
                    call.pad_h,
                    call.pad_w,
                    x.data(),
                    call.Steps(s.in_channels, call.height, call.width),
                    call.stored_as,
                    bias_numbers == nullptr ? nullptr : bias.data(),
                    call.relu,
                    y.data(),
                    call.Steps(s.out_channels, out_height, out_width),
                    call.mode,
                    static_cast<ConvScale*>(scales.data()),
                    {},
                    nullptr};
  args.plan = call.fragments ? ConvFragmentPlan(args) : ConvPlanCuda(args);
  if (call.fragments)
    Expect(args.plan.fragments, "fragments for filters of %ld x %ld", long{s.kernel_h}, long{s.kernel_w});
  if (call.splits != 0 && args.plan.tiled) {
    args.plan.splits = call.splits;
    args.plan.channels = 2;
    args.plan.warp_filters = call.splits == 3 ? 2 : 1;
  }
  DeviceArray<std::uint8_t> scratch("scratch", ConvScratchBytes(args));
  args.scratch = scratch.data();
  ExpectLaunched(ConvCuda(args, nullptr), "ConvCuda");
  return y.Values();
}

Index At(const ConvSteps& steps, Index image, Index channel, Index row, Index column) {
  return image * steps.image + channel * steps.channel + row * steps.row + column * steps.column;
}

void TestOne(const Weight& w, const Call& call, bool with_bias, std::mt19937& rng) {
  const ConvShape& s = w.shape;
  const auto x = Random(call.images * s.in_channels * call.height * call.width, rng);
  const auto bias = Random(s.out_channels, rng);
  const auto got = Run(w, call, x, with_bias ? &bias : nullptr);
  const Index out_height = call.OutHeight(s), out_width = call.OutWidth(s);
  const ConvSteps from = call.Steps(s.in_channels, call.height, call.width);
  const ConvSteps to = call.Steps(s.out_channels, out_height, out_width);
  bool right = true;
  for (Index n = 0; n < call.images; ++n) {
    for (Index o = 0; o < s.out_channels; ++o) {
      const Index first = o / (s.out_channels / s.groups) * (s.in_channels / s.groups);
      for (Index i = 0; i < out_height; ++i) {
        for (Index j = 0; j < out_width; ++j) {
          Sum want;
          for (Index k = w.row_offsets[o]; k < w.row_offsets[o + 1]; ++k) {
            const Index column = w.col_indices[k], c = column / (s.kernel_h * s.kernel_w);
            const Index h = i * s.stride_h + column / s.kernel_w % s.kernel_h * s.dilation_h - call.pad_h;
            const Index v = j * s.stride_w + column % s.kernel_w * s.dilation_w - call.pad_w;
            if (h < 0 || h >= call.height || v < 0 || v >= call.width) continue;
            want.Add(double{w.values[k]} * x[At(from, n, first + c, h, v)]);
          }
          if (with_bias) want.Add(bias[o]);
          const float y = got[At(to, n, o, i, j)];
          // What the sum may be off, it may be on the other side of 0.
          right &=
              want.Near(y, call.stored_as) || (call.relu && y == 0 && (want.value < 0 || want.Near(0, call.stored_as)));
          right &= !call.relu || y >= 0;
        }
      }
    }
  }
  Expect(right, "%ld images of %ld x %ld x %ld, %ld filters of %ld x %ld, values %d, floats %d, last %d, relu %d",
         long{call.images}, long{s.in_channels}, long{call.height}, long{call.width}, long{s.out_channels},
         long{s.kernel_h}, long{s.kernel_w}, static_cast<int>(call.values_as), static_cast<int>(call.stored_as),
         call.channels_last, call.relu);
}

constexpr CsrValues kValues[] = {CsrValues::kFloat32, CsrValues::kBFloat16, CsrValues::kCodes};

void TestShapes() {
  std::mt19937 rng(1234);
  // in, out, groups, kernel, stride, dilation; images, height, width, padding. Around the 128 outputs of a block and
  // the 128 non-zeros that it decodes at once.
  const struct {
    ConvShape shape;
    Call call;
  } cases[] = {
      {{1, 1, 1, 1, 1, 1, 1, 1, 1}, {1, 1, 1, 0, 0}},   {{3, 5, 1, 3, 3, 1, 1, 1, 1}, {2, 7, 7, 1, 1}},
      {{2, 3, 1, 1, 1, 1, 1, 1, 1}, {1, 1, 127, 0, 0}}, {{2, 3, 1, 1, 1, 1, 1, 1, 1}, {2, 8, 8, 0, 0}},
      {{2, 3, 1, 1, 1, 1, 1, 1, 1}, {1, 3, 43, 0, 0}},  {{15, 4, 1, 3, 3, 1, 1, 1, 1}, {1, 4, 5, 1, 1}},
      {{128, 3, 1, 1, 1, 1, 1, 1, 1}, {1, 2, 3, 0, 0}}, {{43, 3, 1, 1, 3, 2, 1, 1, 2}, {3, 4, 6, 1, 2}},
      {{12, 8, 4, 3, 3, 1, 1, 1, 1}, {2, 6, 5, 1, 1}},  {{6, 12, 6, 2, 3, 1, 2, 2, 1}, {1, 7, 6, 0, 1}},
      {{2, 3, 1, 4, 4, 2, 3, 3, 2}, {1, 14, 13, 5, 1}}, {{3, 6, 1, 11, 11, 4, 4, 1, 1}, {1, 17, 19, 2, 2}},
      {{1, 3, 1, 3, 3, 1, 1, 1, 1}, {1, 2, 2, 20, 3}},  {{2, 0, 1, 3, 3, 1, 1, 1, 1}, {1, 5, 5, 0, 0}},
      {{0, 6, 1, 3, 3, 1, 1, 1, 1}, {1, 5, 5, 0, 0}},   {{2, 3, 1, 3, 3, 1, 1, 1, 1}, {0, 5, 5, 0, 0}},
      {{2, 3, 1, 1, 1, 1, 1, 1, 1}, {1, 0, 3, 1, 0}},   {{2, 4, 1, 1, 7, 1, 1, 1, 1}, {2, 1, 33, 0, 3}},
      {{2, 3, 1, 3, 3, 1, 1, 1, 1}, {1, 21, 67, 1, 1}}, {{2, 3, 1, 3, 3, 2, 2, 65, 65}, {1, 140, 135, 1, 1}},
  };
  int turn = 0;
  for (const auto& one : cases) {
    const Weight w(one.shape, 0.4, rng);
    for (const bool channels_last : {false, true}) {
      for (const CsrValues values_as : kValues) {
        for (const FloatDtype floats_as : kFloats) {
          Call call = one.call;
          call.channels_last = channels_last, call.values_as = values_as, call.stored_as = floats_as;
          call.relu = turn % 3 == 0;
          TestOne(w, call, turn++ % 2 == 0, rng);
        }
      }
    }
  }
  TestOne(Weight({3, 6, 1, 3, 3, 1, 1, 1, 1}, 0, rng), {1, 5, 5, 1, 1}, true, rng);
  // Blocks that share channels: all of them with some, and some with none.
  for (const int splits : {2, 3, 6}) {
    const Weight w({9, 10, 1, 3, 3, 1, 1, 1, 1}, 0.4, rng);
    Call call{2, 7, 7, 1, 1};
    call.splits = splits;
    TestOne(w, call, true, rng);
    call.channels_last = true, call.stored_as = FloatDtype::kBFloat16;
    TestOne(w, call, false, rng);
  }
}

// The scale of numbers as one sample, as kernels/panels has it.
struct Scale {
  explicit Scale(const float* numbers, Index count) {
    for (Index i = 0; i < count; ++i) largest = std::max(largest, std::fabs(numbers[i]));
  }
  int Rounded(float x) const { return largest == 0 ? 0 : static_cast<int>(std::rint(x * (127.0f / largest))); }

  float largest = 0;
};

// int8 gives the bits of its formula, bfloat16 what rounded numbers give exactly.
void TestModes() {
  std::mt19937 rng(31);
  const ConvShape shapes[] = {{1, 1, 1, 1, 1, 1, 1, 1, 1},
                              {15, 4, 1, 3, 3, 1, 1, 1, 1},
                              {12, 8, 4, 3, 3, 2, 1, 1, 2},
                              {2, 3, 1, 1, 1, 1, 1, 1, 1},
                              {2, 3, 1, 1, 1, 65, 65, 1, 1}};  // too far apart for tiles
  for (const ConvShape& s : shapes) {
    const Weight w(s, 0.4, rng);
    for (const bool last : {false, true}) {
      for (const CsrValues values_as : kValues) {
        Call call{3, 8, 9, 1, 2};
        call.channels_last = last, call.values_as = values_as, call.relu = last;
        const Index size = s.in_channels * call.height * call.width;
        auto x = Random(call.images * size, rng);
        for (Index i = 0; i < size; ++i) x[2 * size + i] *= std::ldexp(1.0f, -120);  // below every scale
        const auto bias = Random(s.out_channels, rng);
        call.mode = ConvMode::kBFloat16;  // x and W are such numbers already
        const auto rounded = Run(w, call, x, &bias);
        call.mode = ConvMode::kExact;
        Expect(rounded == Run(w, call, x, &bias), "bfloat16, values %d", static_cast<int>(values_as));

        call.mode = ConvMode::kInt8;
        call.splits = last ? 2 : 0;
        const auto got = Run(w, call, x, &bias);
        const Index out_height = call.OutHeight(s), out_width = call.OutWidth(s);
        const ConvSteps from = call.Steps(s.in_channels, call.height, call.width);
        const ConvSteps to = call.Steps(s.out_channels, out_height, out_width);
        bool right = true;
        for (Index n = 0; n < call.images; ++n) {
          const Scale of_x(x.data() + n * size, n == 2 ? 0 : size);
          for (Index o = 0; o < s.out_channels; ++o) {
            const Index begin = w.row_offsets[o], first = o / (s.out_channels / s.groups) * (s.in_channels / s.groups);
            const Scale of_row(w.values.data() + begin, w.row_offsets[o + 1] - begin);
            for (Index i = 0; i < out_height; ++i) {
              for (Index j = 0; j < out_width; ++j) {
                int sum = 0;
                for (Index k = begin; k < w.row_offsets[o + 1]; ++k) {
                  const Index column = w.col_indices[k], c = column / (s.kernel_h * s.kernel_w);
                  const Index h = i * s.stride_h + column / s.kernel_w % s.kernel_h * s.dilation_h - call.pad_h;
                  const Index v = j * s.stride_w + column % s.kernel_w * s.dilation_w - call.pad_w;
                  if (h < 0 || h >= call.height || v < 0 || v >= call.width) continue;
                  sum += of_row.Rounded(w.values[k]) * of_x.Rounded(x[At(from, n, first + c, h, v)]);
                }
                const float want =
                    std::fma(static_cast<float>(sum) * (of_row.largest / 127.0f), of_x.largest / 127.0f, bias[o]);
                right &= got[At(to, n, o, i, j)] == (call.relu && want < 0 ? 0 : want);
              }
            }
          }
        }
        Expect(right, "int8, %ld channels, values %d, last %d", long{s.in_channels}, static_cast<int>(values_as), last);
      }
    }
  }
}

// In mode int8 an image that is not finite is NaN, and so is a filter that is not finite or damaged.
void TestDamagedInt8() {
  std::mt19937 rng(32);
  Weight w({4, 6, 1, 3, 3, 1, 1, 1, 1}, 0.6, rng);
  Call call{3, 5, 4, 1, 1};
  call.mode = ConvMode::kInt8;
  auto x = Random(3 * 4 * 20, rng);
  x[80 + 7] = NAN;
  w.values[w.row_offsets[1]] = INFINITY;
  w.col_indices[w.row_offsets[5]] = -3;
  const auto got = Run(w, call, x, nullptr);
  bool right = true;
  for (Index i = 0; i < static_cast<Index>(got.size()); ++i) {
    const Index image = i / (6 * 20), filter = i / 20 % 6;
    right &= std::isnan(got[i]) == (image == 1 || filter == 1 || filter == 5);
  }
  Expect(right, "damage in mode int8");
}

// NaN and infinity reach the filters whose stored weights meet them, and no others; padding is 0, not absent.
void TestInfinities() {
  std::mt19937 rng(5);
  Weight w({1, 3, 1, 1, 2, 1, 1, 1, 1}, 0, rng);
  w.row_offsets = {0, 1, 2, 3};
  w.col_indices = {0, 1, 0};
  w.values = {2, INFINITY, 0};
  const auto got = Run(w, {1, 1, 2, 0, 1, false, true}, {NAN, 3}, nullptr);
  Expect(got[0] == 0 && std::isnan(got[1]) && got[2] == 6, "NaN meets a weight");
  Expect(std::isnan(got[3]) && got[4] == INFINITY && std::isnan(got[5]), "infinity times padding");
  Expect(got[6] == 0 && std::isnan(got[7]) && got[8] == 0, "a stored zero");
}

// Damage becomes NaN in the filters concerned, and changes no other.
void TestDamage() {
  std::mt19937 rng(99);
  const Weight good({20, 6, 2, 3, 3, 1, 1, 1, 1}, 0.9, rng);
  Call call{2, 5, 4, 1, 1};
  call.values_as = CsrValues::kCodes;
  const auto x = Random(call.images * 20 * call.height * call.width, rng);
  const Index pixels = call.height * call.width, filters = good.shape.out_channels;
  Call shared = call;
  shared.splits = 3;
  Call integer = shared;
  integer.mode = ConvMode::kInt8;
  const Call calls[] = {call, shared, integer};
  const std::vector<float> wanted[] = {Run(good, call, x, nullptr), Run(good, shared, x, nullptr),
                                       Run(good, integer, x, nullptr)};
  const auto expect = [&](const Weight& bad, const std::vector<Index>& damaged, const char* what) {
    for (const int way : {0, 1, 2}) {
      const bool relu = way == 1;
      Call own = calls[way];
      own.relu = relu;
      const std::vector<float>& want = wanted[way];
      const auto got = Run(bad, own, x, nullptr);
      bool right = true;
      for (Index i = 0; i < static_cast<Index>(got.size()); ++i) {
        const Index filter = i / pixels % filters;
        const bool is_damaged = std::find(damaged.begin(), damaged.end(), filter) != damaged.end();
        right &= is_damaged ? std::isnan(got[i]) : got[i] == (relu && want[i] < 0 ? 0 : want[i]);
      }
      Expect(right, "%s, mode %d, relu %d", what, static_cast<int>(own.mode), relu);
    }
  };
  const Index last = good.nnz() - 1, columns = good.columns;
  const auto row_of = [&](Index k) {
    Index r = 0;
    while (good.row_offsets[r + 1] <= k) ++r;
    return r;
  };
  for (const Index k : {Index{0}, Index{good.row_offsets[2] - 1}, Index{good.row_offsets[2]}, last}) {
    for (const std::int32_t column : {static_cast<std::int32_t>(columns), -1, 1 << 30, INT32_MIN, INT32_MAX}) {
      Weight bad = good;
      bad.col_indices[k] = column;
      expect(bad, {row_of(k)}, "a column outside");
    }
    Weight bad = good;
    bad.codes[k] = static_cast<std::uint8_t>(k % 2 == 0 ? 7 : 255);
    expect(bad, {row_of(k)}, "a code outside");
  }
  // Filter 3 is empty.
  for (const std::int32_t offset : {-1, INT32_MIN, INT32_MAX, static_cast<std::int32_t>(last) + 2}) {
    Weight bad = good;
    bad.row_offsets[2] = offset;
    expect(bad, {1, 2}, "an offset outside");
  }
  Weight first = good, end = good;
  ++first.row_offsets.front();
  --end.row_offsets.back();
  expect(first, {0}, "offsets that do not start at 0");
  expect(end, {filters - 1}, "offsets that do not end at nnz");
  // Columns out of order, in blocks of channels that are not shared alike: the filter is NaN, or each counts once.
  for (const Index distance : {Index{20}, Index{40}, Index{60}}) {
    Weight bad = good;
    const Index k = good.row_offsets[1];
    std::swap(bad.col_indices[k], bad.col_indices[k + distance]);
    std::swap(bad.codes[k], bad.codes[k + distance]);
    const auto got = Run(bad, integer, x, nullptr);
    bool right = true;
    for (Index i = 0; i < static_cast<Index>(got.size()); ++i) {
      right &= got[i] == wanted[2][i] || (i / pixels % filters == 1 && std::isnan(got[i]));
    }
    Expect(right, "columns %ld apart swapped", long{distance});
  }
  Weight no_channels = good;
  no_channels.shape.in_channels = no_channels.columns = 0;
  const auto none = Run(no_channels, call, {}, nullptr);
  Expect(std::isnan(none[0]) && none[3 * pixels] == 0, "columns of images without channels");
}

// ---- fragments

constexpr FloatDtype kAllFloats[] = {FloatDtype::kFloat32, FloatDtype::kBFloat16, FloatDtype::kFloat16};

// Around the 16 filters of a fragment and the 64 of a block, the 32 or 64 channels that are multiplied together, the 8,
// 128 and 256 outputs of a fragment and of tiles, and images side by side in one.
const struct {
  ConvShape shape;
  Call call;
} kFragmentCases[] = {
    {{1, 1, 1, 1, 1, 1, 1, 1, 1}, {1, 1, 1, 0, 0}},    {{31, 15, 1, 3, 3, 1, 1, 1, 1}, {2, 6, 7, 1, 1}},
    {{33, 17, 1, 3, 3, 1, 1, 1, 1}, {1, 14, 9, 1, 1}}, {{65, 65, 1, 1, 1, 1, 1, 1, 1}, {1, 3, 43, 0, 0}},
    {{32, 16, 1, 1, 1, 1, 1, 1, 1}, {5, 8, 8, 0, 0}},  {{10, 8, 2, 3, 3, 1, 1, 1, 1}, {3, 7, 7, 1, 1}},
    {{66, 34, 2, 1, 3, 2, 1, 1, 2}, {2, 6, 9, 0, 2}},  {{5, 9, 1, 4, 4, 2, 3, 3, 2}, {1, 14, 13, 5, 1}},
    {{4, 20, 1, 6, 6, 3, 2, 1, 1}, {1, 17, 19, 2, 2}}, {{3, 6, 1, 3, 3, 1, 1, 1, 1}, {1, 2, 2, 20, 3}},
    {{4, 4, 1, 3, 3, 1, 1, 1, 1}, {1, 5, 67, 1, 1}},   {{2, 4, 1, 3, 3, 2, 2, 1, 1}, {2, 33, 33, 1, 1}},
};

// A mode after the other for each case, another one in each round: bfloat16 and exact against sums in double, x and W
// being bfloat16 numbers already, and int8 against the bits that it gives without fragments.
void TestFragments(int round) {
  std::mt19937 rng(77 + round);
  for (const auto& one : kFragmentCases) {
    const Index index = &one - kFragmentCases, turn = index + round;
    const Weight w(one.shape, 0.4, rng);
    Call call = one.call;
    call.fragments = true, call.mode = static_cast<ConvMode>(turn % 3);
    call.channels_last = turn % 2 == 1, call.relu = turn % 4 == 0;
    call.values_as = kValues[turn / 3 % 3], call.stored_as = kAllFloats[turn / 2 % 3];
    if (call.mode == ConvMode::kExact) call.values_as = CsrValues::kBFloat16, call.stored_as = FloatDtype::kBFloat16;
    if (call.mode != ConvMode::kInt8) {
      TestOne(w, call, turn % 5 != 0, rng);
      continue;
    }
    const auto x = Random(call.images * one.shape.in_channels * call.height * call.width, rng);
    const auto bias = Random(one.shape.out_channels, rng);
    const auto got = Run(w, call, x, &bias);
    call.fragments = false;
    Expect(got == Run(w, call, x, &bias), "int8 fragments, case %ld", long{index});
  }
}

// What is damaged is NaN in all images, and what is not, is as it was. An infinity or NaN in x reaches the filters
// whose non-zeros meet it, as without fragments.
void TestDamagedFragments() {
  std::mt19937 rng(79);
  const Weight good({40, 6, 1, 1, 3, 1, 1, 1, 1}, 0.5, rng);
  for (const ConvMode mode : {ConvMode::kBFloat16, ConvMode::kInt8}) {
    Call call{2, 4, 5, 0, 1};
    call.mode = mode, call.fragments = true, call.values_as = CsrValues::kCodes;
    auto x = Random(call.images * 40 * 20, rng);
    const auto want = Run(good, call, x, nullptr);
    const auto expect = [&](const Weight& bad, const std::vector<Index>& filters, const char* what) {
      const auto got = Run(bad, call, x, nullptr);
      bool right = true;
      for (Index i = 0; i < static_cast<Index>(got.size()); ++i) {
        const bool damaged = std::find(filters.begin(), filters.end(), i / 20 % 6) != filters.end();
        right &= damaged ? std::isnan(got[i]) : got[i] == want[i];
      }
      Expect(right, "fragments, %s, mode %d", what, static_cast<int>(mode));
    };
    Weight bad = good;
    bad.col_indices[bad.row_offsets[1]] = -1;
    bad.col_indices[bad.row_offsets[6] - 1] = static_cast<std::int32_t>(good.columns);
    bad.codes[bad.row_offsets[2] + 100] = 7;
    expect(bad, {1, 2, 5}, "columns and a code outside");
    bad = good;
    bad.row_offsets[2] = -1;
    expect(bad, {1, 2}, "an offset outside");
    bad = good;
    bad.col_indices[bad.row_offsets[4] + 3] = bad.col_indices[bad.row_offsets[4] + 2];
    if (mode == ConvMode::kInt8) expect(bad, {4}, "a column twice");
    x[20 * 40 + 7] = INFINITY, x[20 * 40 + 20 * 33 + 11] = NAN;
    for (const FloatDtype stored_as : kAllFloats) {
      call.stored_as = stored_as, call.fragments = true;
      const auto got = Run(good, call, x, nullptr);
      call.fragments = false;
      const auto alone = Run(good, call, x, nullptr);
      bool right = true;
      Index numbers = 0;
      for (std::size_t i = 0; i < got.size(); ++i) {
        right &= std::isfinite(alone[i]) ? std::isfinite(got[i])
                                         : got[i] == alone[i] || (std::isnan(got[i]) && std::isnan(alone[i]));
        numbers += std::isfinite(got[i]) && i >= got.size() / 2;
      }
      Expect(right && (numbers > 0) == (mode != ConvMode::kInt8), "fragments of an infinite image, mode %d, floats %d",
             static_cast<int>(mode), static_cast<int>(stored_as));
    }
  }
}

// Which way is taken: images in batches go to tensor cores where products are exact, one image and few non-zeros do
// not.
void TestChoice() {
  ConvCudaArgs args{};
  args.weight.rows = 256, args.weight.columns = 2304, args.weight.nnz = 118000;
  args.weight.stored_as = CsrValues::kFloat32;
  args.shape = {256, 256, 1, 3, 3, 1, 1, 1, 1};
  args.height = args.width = args.out_height = args.out_width = 14, args.pad_h = args.pad_w = 1;
  args.x_steps = {256 * 196, 196, 14, 1};
  const auto fragments = [&](ConvMode mode, Index images, Index nnz = 118000) {
    args.mode = mode, args.images = images, args.weight.nnz = nnz;
    return ConvPlanCuda(args).fragments;
  };
  Expect(fragments(ConvMode::kBFloat16, 32) && fragments(ConvMode::kInt8, 32), "32 images on tensor cores");
  Expect(!fragments(ConvMode::kBFloat16, 1) && !fragments(ConvMode::kBFloat16, 32, 5000), "little work is not");
  Expect(!fragments(ConvMode::kExact, 32), "float32 is not");
  args.weight.stored_as = CsrValues::kBFloat16, args.stored_as = FloatDtype::kBFloat16;
  Expect(fragments(ConvMode::kExact, 32), "bfloat16 products are exact");
}

// More blocks than the grid's y axis has.
void TestLargeGrids() {
  std::mt19937 rng(7);
  TestOne(Weight({1, 65536 + 3, 1, 1, 1, 1, 1, 1, 1}, 0.5, rng), {1, 1, 1, 0, 0}, true, rng);
}

}  // namespace

int main() {
  int round = 0;
  return RunOnDevice([&] {
    TestShapes();
    TestModes();
    TestDamagedInt8();
    TestInfinities();
    TestDamage();
    TestFragments(round);
    TestDamagedFragments();
    if (round == 0) TestChoice();
    if (round == 0) TestLargeGrids();
    ++round;
  });
}
