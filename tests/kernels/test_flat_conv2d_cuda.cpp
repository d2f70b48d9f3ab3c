// The CUDA kernels against the scalar ones on the CPU, on shapes around their tiles, in every order of an image's
// numbers.
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kernels/flat_conv2d/flat_conv2d_cuda.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Call {
  Index images, channels, height, width, out_channels, rank, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  bool channels_last = false, relu = false;
  Index gap = 0;  // columns of x that lie between its rows
  FloatDtype stored_as = FloatDtype::kFloat32;
  bool with_nan = false;  // in x

  ConvSteps Steps(Index of, Index rows, Index cols) const {
    if (channels_last) return {of * rows * cols, 1, cols * of, of};
    return {of * rows * cols, rows * cols, cols, 1};
  }
};

void TestOne(const Call& call, std::mt19937& rng) {
  FlatStage stage{nullptr,
                  call.channels,
                  call.out_channels,
                  call.rank,
                  call.kernel_h,
                  call.kernel_w,
                  call.stride_h,
                  call.stride_w,
                  call.pad_h,
                  call.pad_w,
                  call.height,
                  call.width,
                  0,
                  0};
  stage.out_height = (call.height + 2 * call.pad_h - call.kernel_h) / call.stride_h + 1;
  stage.out_width = (call.width + 2 * call.pad_w - call.kernel_w) / call.stride_w + 1;
  const Index image = call.channels * call.height * call.width;
  const Index out_pixels = stage.out_height * stage.out_width, out_image = call.out_channels * out_pixels;
  auto x = Random(call.images * image, rng);
  if (call.with_nan) x[0] = NAN;
  const auto packed = Random(stage.Vectors() * kFlatLanes, rng);

  // On the CPU, float32.
  std::vector<float> want(call.images * out_image);
  FlatConvArgs args{};
  args.stages[0] = stage;
  args.stages[0].packed = packed.data();
  args.count = 1;
  args.relu = call.relu;
  std::vector<char> scratch;
  for (Index n = 0; n < call.images; ++n) {
    args.x = {x.data() + n * image, FloatDtype::kFloat32, call.channels_last,
              call.channels_last ? call.channels : call.height * call.width};
    args.y = {want.data() + n * out_image, FloatDtype::kFloat32, call.channels_last,
              call.channels_last ? call.out_channels : out_pixels};
    scratch.resize(FlatScratchBytes(args) + 64);
    char* aligned = scratch.data() + (64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64) % 64;
    FlatConv2d(kFlatScalar, args, 0, stage.out_height, 0, stage.Panels(), aligned);
  }

  const ConvSteps steps = call.Steps(call.channels, call.height, call.width + call.gap);
  const ConvSteps from = call.Steps(call.channels, call.height, call.width);
  std::vector<float> spread(call.images * steps.image, NAN);
  for (Index at = 0; at < call.images * image; ++at) {
    const Index w = at % call.width, h = at / call.width % call.height,
                c = at / call.width / call.height % call.channels;
    const Index n = at / image;
    spread[n * steps.image + c * steps.channel + h * steps.row + w * steps.column] =
        x[n * from.image + c * from.channel + h * from.row + w * from.column];
  }
  DeviceFloats device_x("x", call.stored_as, spread), y("y", call.stored_as, call.images * out_image);
  DeviceArray<float> device_packed("packed", packed), l("l", FlatLateralFloats(stage, call.images));
  stage.packed = device_packed.data();
  const FlatConvCudaArgs on_device{
      stage,         call.images,    device_x.data(),
      steps,         call.stored_as, l.data(),
      call.relu,     y.data(),       call.Steps(call.out_channels, stage.out_height, stage.out_width),
      call.stored_as};
  ExpectLaunched(FlatConvCuda(on_device, nullptr), "FlatConvCuda");
  const auto got = y.Values();
  const float half = call.stored_as == FloatDtype::kFloat32 ? 0 : 1.0f / 256;
  bool right = true;
  for (std::size_t i = 0; i < want.size(); ++i) {
    right &= std::isnan(want[i]) ? std::isnan(got[i])
                                 : std::fabs(got[i] - want[i]) <= 1e-3f + (half + 1e-5f) * std::fabs(want[i]);
  }
  Expect(right, "%ld images of %ld x %ld x %ld, %ld channels of %ld x %ld, rank %ld, last %d", long{call.images},
         long{call.channels}, long{call.height}, long{call.width}, long{call.out_channels}, long{call.kernel_h},
         long{call.kernel_w}, long{call.rank}, call.channels_last);
}

void TestAll() {
  std::mt19937 rng(1234);
  const Call cases[] = {
      {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0},    {2, 3, 7, 9, 5, 1, 3, 3, 1, 1, 1, 1},
      {1, 17, 5, 13, 33, 1, 3, 5, 1, 1, 2, 4}, {3, 16, 4, 16, 16, 2, 2, 3, 2, 1, 0, 1},
      {1, 4, 2, 65, 7, 3, 1, 4, 1, 3, 0, 5},   {0, 3, 5, 5, 4, 1, 3, 3, 1, 1, 0, 0},
      {1, 3, 5, 5, 0, 1, 3, 3, 1, 1, 0, 0},    {1, 1, 63, 2, 2, 1, 63, 1, 1, 1, 0, 0},  // the longest filters
      {1, 1, 2, 63, 1, 1, 1, 63, 1, 1, 0, 0},
  };
  int turn = 0;
  for (Call call : cases) {
    for (const auto stored_as : kFloats) {
      call.stored_as = stored_as, call.channels_last = turn % 2 == 1, call.relu = turn % 3 == 0;
      TestOne(call, rng);
      ++turn;
    }
    call.channels_last = !call.channels_last;
    TestOne(call, rng);
  }
  // More channels, maps and outputs than a block takes; rows that do not follow each other.
  for (const bool last : {false, true}) {
    TestOne({3, 37, 9, 11, 18, 2, 3, 3, 1, 1, 1, 1, last, true, 5}, rng);
  }
  Call with_nan{1, 2, 4, 5, 3, 1, 3, 3, 1, 1, 1, 1, false, true};
  with_nan.with_nan = true;
  TestOne(with_nan, rng);
}

}  // namespace

int main() { return RunOnDevice(TestAll); }
