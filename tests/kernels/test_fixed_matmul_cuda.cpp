// The CUDA kernels of fixed_matmul against the reference, bit by bit.
#include <algorithm>

#include "kernels/device.h"
#include "kernels/fixed_matmul/fixed_matmul_cuda.h"
#include "kernels/fixed_matmul_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

template <typename X, typename Whole>
void TestProduct(Index samples, Index rows, Index columns, bool extreme, std::mt19937& rng) {
  constexpr bool kWide = sizeof(Whole) == 2;
  const auto x = WholeNumbers<X>(samples * columns, 8 * sizeof(X), extreme, rng);
  const auto weight = WholeNumbers<Whole>(rows * columns, 8 * sizeof(Whole), extreme, rng);
  std::vector<Index> want(samples * rows);
  for (Index i = 0; i < samples * rows; ++i) {
    for (Index c = 0; c < columns; ++c) want[i] += Index{x[i / rows * columns + c]} * weight[i % rows * columns + c];
  }
  const Index of_word = FixedNumbersOfWord(kWide), words = (columns + of_word - 1) / of_word;
  const Index panels = (rows + kFixedPanel - 1) / kFixedPanel;
  std::vector<std::int32_t> packed(panels * (words + 1) * kFixedPanel);
  FixedPack({weight.data(), kWide, rows, columns, 1, packed.data()}, 0, panels);
  DeviceArray<X> of_x("x", x);
  DeviceArray<std::int32_t> of_packed("packed", packed);
  DeviceArray<Index> sums("sums", want.size());
  const FixedCudaArgs args{of_x.data(), sizeof(X) == 2, of_packed.data(), kWide, samples,
                           columns,     rows,           sums.data(),      {}};
  ExpectLaunched(FixedMatmulCuda(args, nullptr), "FixedMatmulCuda");
  Expect(sums.Values() == want, "int%d by int%d, %ld samples, %ld rows, %ld columns, extreme %d",
         static_cast<int>(8 * sizeof(X)), static_cast<int>(8 * sizeof(Whole)), long{samples}, long{rows}, long{columns},
         extreme);
}

template <typename X, typename Whole>
void TestWindows(FixedImages s, Index rows, std::mt19937& rng) {
  constexpr bool kWide = sizeof(Whole) == 2;
  s.out_height = (s.height + 2 * s.pad_h - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
  s.out_width = (s.width + 2 * s.pad_w - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
  const Index samples = s.count * s.Windows(), of_group = s.channels / s.groups, group_rows = rows / s.groups;
  const Index columns = of_group * s.kernel_h * s.kernel_w, of_word = FixedNumbersOfWord(kWide);
  const Index words = s.Segments() * ((columns / s.Segments() + of_word - 1) / of_word);
  const Index panels = (group_rows + kFixedPanel - 1) / kFixedPanel, of_panels = panels * (words + 1) * kFixedPanel;
  const auto x = WholeNumbers<X>(s.count * s.channels * s.height * s.width, 8 * sizeof(X), false, rng);
  const auto weight = WholeNumbers<Whole>(rows * columns, 8 * sizeof(Whole), false, rng);
  std::vector<std::int32_t> packed(s.groups * of_panels);
  for (Index group = 0; group < s.groups; ++group) {
    FixedPack({weight.data() + group * group_rows * columns, kWide, group_rows, columns, s.Segments(),
               packed.data() + group * of_panels},
              0, panels);
  }
  std::vector<Index> want(samples * rows);
  for (Index i = 0; i < samples * rows; ++i) {
    const Index r = i % rows, n = i / rows, image = n / s.Windows(), window = n % s.Windows();
    for (Index k = 0; k < columns; ++k) {
      const Index tap = k / of_group, c = r / group_rows * of_group + k % of_group;
      const Index row = window / s.out_width * s.stride_h - s.pad_h + tap / s.kernel_w * s.dilation_h;
      const Index column = window % s.out_width * s.stride_w - s.pad_w + tap % s.kernel_w * s.dilation_w;
      if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
      const Index at = s.channels_last ? ((image * s.height + row) * s.width + column) * s.channels + c
                                       : ((image * s.channels + c) * s.height + row) * s.width + column;
      want[i] += Index{x[at]} * weight[r * columns + k];
    }
  }
  DeviceArray<X> of_x("x", x);
  DeviceArray<std::int32_t> of_packed("packed", packed);
  DeviceArray<Index> sums("sums", want.size());
  ExpectLaunched(FixedConv2dCuda(
                     {of_x.data(), sizeof(X) == 2, of_packed.data(), kWide, samples, 0, rows, sums.data(), s}, nullptr),
                 "FixedConv2dCuda");
  Expect(sums.Values() == want, "windows of %ld x %ld of %ld channels in %ld groups, %ld rows, last %d",
         long{s.kernel_h}, long{s.kernel_w}, long{s.channels}, long{s.groups}, long{rows}, s.channels_last);
}

void TestWindows(std::mt19937& rng) {
  FixedImages plain{}, apart{};
  plain.count = 2, plain.channels = 5, plain.height = 6, plain.width = 5;
  plain.kernel_h = 3, plain.kernel_w = 2, plain.stride_w = 2, plain.pad_h = 1, plain.pad_w = 2;
  apart.count = 3, apart.channels = 6, apart.height = 5, apart.width = 7, apart.groups = 2;
  apart.kernel_h = 2, apart.kernel_w = 3, apart.stride_h = 2, apart.pad_h = 2, apart.pad_w = 1;
  apart.dilation_h = 2, apart.dilation_w = 3;
  for (const bool last : {false, true}) {
    plain.channels_last = apart.channels_last = last;
    TestWindows<std::int8_t, std::int8_t>(plain, 18, rng);
    TestWindows<std::int16_t, std::int16_t>(plain, 3, rng);
    TestWindows<std::int8_t, std::int16_t>(apart, 36, rng);
    TestWindows<std::int16_t, std::int8_t>(apart, 4, rng);
  }
}

// Of four samples; biased, of two images.
void TestConversion(FixedConvertArgs args, Index size, std::mt19937& rng) {
  constexpr Index kSamples = 4;
  args.rows = args.sums_stride = args.y_stride = size;
  const auto of_args = SumsOf(args, kSamples * size, rng), biases = SumsOf(args, size, rng);
  for (const bool biased : {false, true}) {
    const Index item = args.as == FixedAs::kInt8 ? 1 : args.as == FixedAs::kInt16 ? 2 : 4;
    const Index bytes = kSamples * size * item, pixels = biased ? 2 : 1;
    std::vector<unsigned char> rowwise(bytes), want(bytes);
    auto kept = biases;
    for (Index& bias : kept) bias = std::min(std::max(bias, -kFixedMostBias), kFixedMostBias);
    args.sums = of_args.data();
    args.added = biased ? kept.data() : nullptr;
    args.y = rowwise.data();
    kFixedMatmulScalar.convert(args, 0, kSamples);
    for (Index i = 0; i < kSamples * size; ++i) {
      const Index n = i / size, place = (n / pixels * size + i % size) * pixels + n % pixels;
      std::copy_n(rowwise.begin() + i * item, item, want.begin() + place * item);
    }
    DeviceArray<Index> sums("sums", of_args), added("added", biases);
    DeviceArray<unsigned char> y("y", bytes);
    args.sums = sums.data();
    args.added = biased ? added.data() : nullptr;
    args.y = y.data();
    ExpectLaunched(FixedConvertCuda(args, kSamples, pixels, nullptr), "FixedConvertCuda");
    Expect(y.Values() == want, "%ld sums of %d fraction bits to <%d,%d>, stochastic %d, relu %d, as %d, biased %d",
           long{size}, args.sum_fraction_bits, args.integer_bits, args.fraction_bits, args.stochastic, args.relu,
           static_cast<int>(args.as), biased);
  }
}

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(1);
    for (const Index columns : {0, 1, 33, 70}) {
      for (const Index samples : {0, 7, 9}) {
        for (const Index rows : {1, 16, 18}) {
          TestProduct<std::int8_t, std::int8_t>(samples, rows, columns, rows == 16, rng);
          TestProduct<std::int8_t, std::int16_t>(samples, rows, columns, rows == 16, rng);
          TestProduct<std::int16_t, std::int16_t>(samples, rows, columns, rows == 16, rng);
        }
      }
    }
    for (const Index samples : {3, 65}) {  // few, and more than one tile of them
      TestProduct<std::int8_t, std::int8_t>(samples, 49, 257, true, rng);
      TestProduct<std::int8_t, std::int8_t>(samples, 33, 260, false, rng);  // of whole words
      TestProduct<std::int16_t, std::int16_t>(samples, 49, 130, true, rng);
      TestProduct<std::int16_t, std::int16_t>(samples, 33, 131, true, rng);
      TestProduct<std::int8_t, std::int16_t>(samples, 17, 130, true, rng);
    }
    // More columns than are summed in 32 bits, of the least number, whose products are the largest.
    TestProduct<std::int8_t, std::int8_t>(9, 1, 16'400, true, rng);
    TestProduct<std::int8_t, std::int8_t>(1, 1, 65'600, true, rng);
    TestWindows(rng);
    for (const FixedConvertArgs& args : Conversions()) TestConversion(args, 65, rng);
    TestConversion(Conversions()[0], 0, rng);
  });
}
