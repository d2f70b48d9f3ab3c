// Arrays in a device's memory for the tests of CUDA kernels, which run on a GPU and on the emulator alike.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/float16.h"
#ifdef TERSETORCH_CUDA_EMULATOR
#include "emulator.h"
#endif

namespace tersetorch::test {

inline constexpr int kSkipped = 77;  // what a test returns where there is no GPU

// Runs the test under every schedule of the emulator, or once on the GPU; what main returns.
template <typename Test>
int RunOnDevice(const Test& test) {
#ifdef TERSETORCH_CUDA_EMULATOR
  for (const cuda_emulator::Schedule& schedule : cuda_emulator::kSchedules) {
    cuda_emulator::SetSchedule(schedule);
    test();
  }
#else
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return Failures() != 0 ? 1 : kSkipped;
  }
  test();
#endif
  return Failures() != 0;
}

// Whether a launch went well until its end.
inline void ExpectLaunched(int error, const char* what) {
  if (error == 0) error = cudaDeviceSynchronize();
#ifdef TERSETORCH_CUDA_EMULATOR
  const cuda_emulator::Report& report = cuda_emulator::LastReport();
  Expect(error == 0, "%s: error %d, %s: %s", what, error, report.kind.c_str(), report.message.c_str());
#else
  Expect(error == 0, "%s: error %d", what, error);
#endif
}

template <typename T>
class DeviceArray {
 public:
  // What a kernel only reads.
  DeviceArray(const char* name, const std::vector<T>& values) : DeviceArray(name, values.size()) {
    cudaMemcpy(data_, values.data(), sizeof(T) * size_, cudaMemcpyHostToDevice);
#ifdef TERSETORCH_CUDA_EMULATOR
    cuda_emulator::MakeReadOnly(data_);
#endif
  }
  // What it writes.
  DeviceArray(const char* name, std::size_t size) : size_(size) {
    cudaMalloc(reinterpret_cast<void**>(&data_), sizeof(T) * size_);
#ifdef TERSETORCH_CUDA_EMULATOR
    cuda_emulator::Name(data_, name);
#else
    static_cast<void>(name);
#endif
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;

  T* data() { return data_; }
  std::vector<T> Values() const {
    std::vector<T> values(size_);
    cudaMemcpy(values.data(), data_, sizeof(T) * size_, cudaMemcpyDeviceToHost);
    return values;
  }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

// Floats on the device as float32, bfloat16 or float16.
struct DeviceFloats {
  DeviceFloats(const char* name, FloatDtype stored_as, const std::vector<float>& numbers)
      : stored_as(stored_as), floats(name, numbers), halves(name, Halves(numbers, stored_as)) {}
  DeviceFloats(const char* name, FloatDtype stored_as, Index count)
      : stored_as(stored_as), floats(name, count), halves(name, count) {}

  void* data() { return stored_as == FloatDtype::kFloat32 ? static_cast<void*>(floats.data()) : halves.data(); }
  std::vector<float> Values() const {
    if (stored_as == FloatDtype::kFloat32) return floats.Values();
    std::vector<float> values;
    for (const std::uint16_t half : halves.Values()) {
      values.push_back(stored_as == FloatDtype::kBFloat16 ? Widened(half) : FromFloat16(half));
    }
    return values;
  }

  static std::vector<std::uint16_t> Halves(const std::vector<float>& numbers,
                                           FloatDtype stored_as = FloatDtype::kBFloat16) {
    std::vector<std::uint16_t> halves;
    for (const float number : numbers) {
      halves.push_back(stored_as == FloatDtype::kFloat16 ? ToFloat16(number) : Truncated(number));
    }
    return halves;
  }

  FloatDtype stored_as;
  DeviceArray<float> floats;
  DeviceArray<std::uint16_t> halves;
};

}  // namespace tersetorch::test
