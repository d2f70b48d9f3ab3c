// The CUDA kernel against sums in double, or the integers of its formula, on shapes around its tile, both orders of an
// image's numbers, and codes outside their table.
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/codebook_conv2d/codebook_conv2d_cuda.h"
#include "kernels/device.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

// Of int8: of a table, whose largest entry is 127, and of an image; the former is not the larger one.
float TableScale(Index table) { return table % 2 == 0 ? 0.25f : 0.5f; }
float ImageScale(Index image) { return 0.5f + 0.25f * static_cast<float>(image); }

enum class Tables { kOne, kRows, kBlocks };

struct Call {
  ConvShape shape;
  Index images, height, width, pad_h, pad_w;
  Tables tables = Tables::kOne;
  Index entries = 11;
  bool channels_last = false, relu = false;
  FloatDtype stored_as = FloatDtype::kFloat32;
  CodebookMode mode = CodebookMode::kExact;

  Index OutHeight() const {
    return (height + 2 * pad_h - shape.dilation_h * (shape.kernel_h - 1) - 1) / shape.stride_h + 1;
  }
  Index OutWidth() const {
    return (width + 2 * pad_w - shape.dilation_w * (shape.kernel_w - 1) - 1) / shape.stride_w + 1;
  }
  Index Columns() const { return shape.in_channels / shape.groups * shape.kernel_h * shape.kernel_w; }
  Index Block() const { return tables == Tables::kBlocks ? 10 : std::max<Index>(1, Columns()); }
  ConvSteps Steps(Index channels, Index rows, Index cols) const {
    if (channels_last) return {channels * rows * cols, 1, cols * channels, channels};
    return {channels * rows * cols, rows * cols, cols, 1};
  }
};

Index At(const ConvSteps& steps, Index image, Index channel, Index row, Index column) {
  return image * steps.image + channel * steps.channel + row * steps.row + column * steps.column;
}

// With windows for so many outputs at a time, or without.
void TestOne(const Call& call, std::mt19937& rng, Index wave = 0, Index damaged_filter = -1, Index damaged_column = 0) {
  const ConvShape& s = call.shape;
  const Index rows = s.out_channels, columns = call.Columns(), out_height = call.OutHeight(),
              out_width = call.OutWidth();
  const bool integer = call.mode == CodebookMode::kInt8;
  const Index tables = call.tables == Tables::kOne    ? 1
                       : call.tables == Tables::kRows ? rows
                                                      : std::max<Index>(1, (columns + 9) / 10);
  const bool per_row = call.tables == Tables::kRows;
  const auto scale_of_row = [&](Index row) { return TableScale(per_row ? row : 0); };
  std::vector<float> x, codebook, bias = Random(rows, rng);
  std::vector<std::int8_t> x_bytes, table_bytes;
  const Index x_count = call.images * s.in_channels * call.height * call.width;
  if (integer) {
    for (Index i = 0; i < x_count; ++i) x_bytes.push_back(static_cast<std::int8_t>(rng() % 255 - 127));
    for (Index i = 0; i < tables * call.entries; ++i) {
      table_bytes.push_back(static_cast<std::int8_t>(i % call.entries == 0 ? 127 : rng() % 255 - 127));
    }
    x.assign(x_bytes.begin(), x_bytes.end());
    for (Index i = 0; i < tables * call.entries; ++i)
      codebook.push_back(table_bytes[i] * scale_of_row(i / call.entries));
  } else {
    x = Random(x_count, rng), codebook = Random(tables * call.entries, rng);
  }
  std::vector<std::uint8_t> codes(rows * columns);
  for (auto& code : codes) code = static_cast<std::uint8_t>(rng() % call.entries);
  if (damaged_filter >= 0) codes[damaged_filter * columns + damaged_column] = static_cast<std::uint8_t>(call.entries);
  const int bits = CodeBits(call.entries);
  const Index row_bytes = CodeRowBytes(columns, call.Block(), bits);
  std::vector<std::uint8_t> packed(rows * row_bytes);
  CodebookPack(codes.data(), columns, call.Block(), bits, packed.data(), 0, rows);
  std::vector<float> image_scales, table_scales;
  for (Index n = 0; n < call.images; ++n) image_scales.push_back(ImageScale(n));
  for (Index o = 0; o < rows; ++o) table_scales.push_back(scale_of_row(o));

  DeviceArray<std::uint8_t> device_codes("codes", packed);
  DeviceArray<float> device_codebook("codebook", codebook), device_bias("bias", bias);
  DeviceArray<float> device_image_scales("image_scales", image_scales);
  DeviceArray<float> device_table_scales("table_scales", table_scales);
  DeviceArray<std::int8_t> device_x_bytes("x", x_bytes), device_tables("tables", table_bytes);
  DeviceFloats device_x("x", call.stored_as, x);
  DeviceFloats y("y", call.stored_as, call.images * rows * out_height * out_width);
  const ConvSteps from = call.Steps(s.in_channels, call.height, call.width);
  const ConvSteps to = call.Steps(rows, out_height, out_width);
  CodebookConvCudaArgs args{
      {device_codes.data(), device_codebook.data(), call.entries, per_row, rows, columns, call.Block()},
      s,
      call.images,
      call.height,
      call.width,
      out_height,
      out_width,
      call.pad_h,
      call.pad_w,
      integer ? static_cast<const void*>(device_x_bytes.data()) : device_x.data(),
      from,
      call.stored_as,
      device_bias.data(),
      call.relu,
      y.data(),
      to,
      call.mode};
  args.tables = device_tables.data(), args.table_stride = call.entries;
  args.image_scales = device_image_scales.data(), args.table_scales = device_table_scales.data();
  if (wave > 0) {
    args.plan = CodebookConvPlanCuda(args);
    const bool tables_fit = call.tables == Tables::kOne || (call.tables == Tables::kRows && bits <= 4);
    const bool enough = rows / s.groups >= (call.mode == CodebookMode::kExact ? 64 : 32);
    Expect((args.plan.outputs > 0) == (tables_fit && enough), "windows for tables %d of %ld, %ld filters, mode %d",
           static_cast<int>(call.tables), long{call.entries}, long{rows}, static_cast<int>(call.mode));
    args.plan.outputs = std::min(args.plan.outputs, wave);
  }
  const CodebookConvPlan& plan = args.plan;
  DeviceArray<uint4> windows("windows", static_cast<std::size_t>(plan.outputs * plan.window_stride / 16));
  DeviceArray<float> window_scales("window_scales", static_cast<std::size_t>(plan.outputs));
  DeviceArray<float> parts("parts", static_cast<std::size_t>(plan.part_count * plan.outputs * rows / s.groups));
  args.windows = windows.data(), args.window_scales = window_scales.data();
  args.parts = plan.part_count > 1 ? parts.data() : nullptr;
  ExpectLaunched(CodebookConvCuda(args, nullptr), "CodebookConvCuda");
  const auto got = y.Values();

  bool right = true;
  for (Index n = 0; n < call.images; ++n) {
    for (Index o = 0; o < rows; ++o) {
      const Index first = o / (rows / s.groups) * (s.in_channels / s.groups);
      for (Index i = 0; i < out_height; ++i) {
        for (Index j = 0; j < out_width; ++j) {
          const float number = got[At(to, n, o, i, j)];
          if (o == damaged_filter) {
            right &= number != number;
            continue;
          }
          Sum want;
          for (Index column = 0; column < columns; ++column) {
            const Index c = column / (s.kernel_h * s.kernel_w);
            const Index h = i * s.stride_h + column / s.kernel_w % s.kernel_h * s.dilation_h - call.pad_h;
            const Index v = j * s.stride_w + column % s.kernel_w * s.dilation_w - call.pad_w;
            if (h < 0 || h >= call.height || v < 0 || v >= call.width) continue;
            const Index table = per_row ? o : column / call.Block();
            const Index entry = table * call.entries + codes[o * columns + column];
            want.Add(double{integer ? table_bytes[entry] : codebook[entry]} * x[At(from, n, first + c, h, v)]);
          }
          if (integer) {
            const float sum = std::fma(static_cast<float>(want.value) * scale_of_row(o), ImageScale(n), bias[o]);
            const float stored = call.relu && sum < 0 ? 0.0f : sum;
            right &= call.stored_as == FloatDtype::kFloat32 ? number == stored
                                                            : std::fabs(number - stored) <= std::fabs(stored) / 128;
            continue;
          }
          want.Add(bias[o]);
          right &= want.Near(number, call.stored_as) ||
                   (call.relu && number == 0 && (want.value < 0 || want.Near(0, call.stored_as)));
          right &= !call.relu || number >= 0;
        }
      }
    }
  }
  Expect(right, "%ld images of %ld x %ld x %ld, %ld filters of %ld x %ld, tables %d, mode %d, last %d, damaged %ld",
         long{call.images}, long{s.in_channels}, long{call.height}, long{call.width}, long{rows}, long{s.kernel_h},
         long{s.kernel_w}, static_cast<int>(call.tables), static_cast<int>(call.mode), call.channels_last,
         long{damaged_filter});
}

void TestAll() {
  std::mt19937 rng(1234);
  // in, out, groups, kernel, stride, dilation; images, height, width, padding. Around the 128 outputs and 8 filters of
  // a block, and the 128 columns that it decodes at once.
  const Call cases[] = {
      {{1, 1, 1, 1, 1, 1, 1, 1, 1}, 1, 1, 1, 0, 0},   {{3, 5, 1, 3, 3, 1, 1, 1, 1}, 2, 7, 7, 1, 1},
      {{2, 3, 1, 1, 1, 1, 1, 1, 1}, 1, 3, 43, 0, 0},  {{15, 4, 1, 3, 3, 1, 1, 1, 1}, 1, 4, 5, 1, 1},
      {{128, 3, 1, 1, 1, 1, 1, 1, 1}, 1, 2, 3, 0, 0}, {{43, 3, 1, 1, 3, 2, 1, 1, 2}, 3, 4, 6, 1, 2},
      {{12, 8, 4, 3, 3, 1, 1, 1, 1}, 2, 6, 5, 1, 1},  {{6, 12, 6, 2, 3, 1, 2, 2, 1}, 1, 7, 6, 0, 1},
      {{1, 3, 1, 3, 3, 1, 1, 1, 1}, 1, 2, 2, 20, 3},  {{2, 0, 1, 3, 3, 1, 1, 1, 1}, 1, 5, 5, 0, 0},
      {{0, 6, 1, 3, 3, 1, 1, 1, 1}, 1, 5, 5, 0, 0},   {{2, 3, 1, 3, 3, 1, 1, 1, 1}, 0, 5, 5, 0, 0},
      {{8, 18, 2, 3, 3, 1, 1, 1, 1}, 1, 4, 4, 1, 1},
  };
  const Index entries[] = {3, 11, 200};
  int turn = 0;
  for (Call call : cases) {
    for (const auto mode : {CodebookMode::kExact, CodebookMode::kBFloat16, CodebookMode::kInt8}) {
      for (const auto tables : {Tables::kOne, Tables::kRows, Tables::kBlocks}) {
        call.mode = mode, call.tables = tables, call.entries = entries[turn % 3];
        call.channels_last = turn % 2 == 1, call.relu = turn % 5 == 0, call.stored_as = kFloats[turn / 2 % 2];
        ++turn;
        TestOne(call, rng);
      }
    }
  }
  for (const auto mode : {CodebookMode::kExact, CodebookMode::kInt8}) {
    Call call = cases[1];
    call.mode = mode;
    for (const Index column : {Index{0}, Index{5}, call.Columns() - 1}) TestOne(call, rng, 0, 3, column);
    call.shape.out_channels = 10;
    TestOne(call, rng, 0, 9, 5);
  }
  // Windows: around the words and outputs of a block and the tiles of codebook_matmul, in several waves and parts.
  struct {
    Call call;
    Index wave, entries;  // entries in turn if 0
  } const of_windows[] = {
      {{{5, 67, 1, 3, 3, 1, 1, 1, 1}, 2, 7, 7, 1, 1}, 64, 0},
      {{{23, 64, 1, 1, 3, 2, 1, 1, 2}, 4, 4, 6, 1, 2}, 128, 0},
      {{{16, 66, 2, 2, 3, 1, 2, 2, 1}, 2, 5, 6, 0, 1}, 33, 0},
      {{{65, 64, 1, 3, 3, 1, 1, 1, 1}, 1, 3, 3, 1, 1}, 64, 200},
      {{{1, 130, 1, 1, 1, 1, 1, 1, 1}, 5, 1, 1, 0, 0}, 5, 0},
  };
  const FloatDtype of_device[] = {FloatDtype::kFloat32, FloatDtype::kBFloat16, FloatDtype::kFloat16};
  for (auto [call, wave, of_table] : of_windows) {
    for (const auto mode : {CodebookMode::kExact, CodebookMode::kBFloat16, CodebookMode::kInt8}) {
      for (const auto tables : {Tables::kOne, Tables::kRows}) {
        call.mode = mode, call.tables = tables, call.entries = of_table > 0 ? of_table : entries[turn % 3];
        call.channels_last = turn % 2 == 1, call.relu = turn % 5 == 0, call.stored_as = of_device[turn / 2 % 3];
        ++turn;
        if (of_table == 0 || tables == Tables::kOne) TestOne(call, rng, wave);
      }
    }
    ++turn;
  }
  for (const auto mode : {CodebookMode::kExact, CodebookMode::kBFloat16, CodebookMode::kInt8}) {
    Call call = of_windows[0].call;
    call.mode = mode;
    for (const Index column : {Index{0}, Index{5}, call.Columns() - 1}) TestOne(call, rng, 64, 66, column);
  }
}

}  // namespace

int main() { return RunOnDevice(TestAll); }
