// Random images of signs and the largest of each window by definition, for the tests of both devices.
#pragma once

#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/sign_max_pool2d/sign_max_pool2d.h"

namespace tersetorch::test {

// The members of SignMaxPool2dArgs from images to dilation_w; the sizes of the outputs follow.
inline std::vector<SignMaxPool2dArgs> SignPools() {
  std::vector<SignMaxPool2dArgs> pools;
  for (const Index words : {0, 1, 3, 4, 5, 7, 8, 9, 17}) {
    pools.push_back({nullptr, 2, 6, 7, words, 2, 2, 2, 2, 0, 0, 1, 1, 3, 3, nullptr, nullptr});
  }
  pools.push_back({nullptr, 1, 7, 5, 2, 3, 3, 2, 1, 1, 1, 1, 1, 4, 5, nullptr, nullptr});
  pools.push_back({nullptr, 1, 7, 9, 4, 3, 2, 1, 3, 2, 1, 2, 1, 7, 4, nullptr, nullptr});
  pools.push_back({nullptr, 2, 8, 9, 2, 2, 3, 1, 2, 0, 1, 1, 2, 7, 4, nullptr, nullptr});
  pools.push_back(
      {nullptr, 3, 5, 5, 2, 2, 2, 2, 2, 0, 0, 1, 1, 3, 3, nullptr, nullptr});  // ceil_mode: windows end outside
  pools.push_back({nullptr, 1, 1, 1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 2, 2, nullptr, nullptr});  // none of a window inside
  pools.push_back({nullptr, 0, 4, 4, 2, 2, 2, 2, 2, 0, 0, 1, 1, 2, 2, nullptr, nullptr});
  return pools;
}

struct SignPoolProblem {
  SignPoolProblem(const SignMaxPool2dArgs& a, std::mt19937& rng)
      : x(a.images * a.height * a.width * a.words), flips(a.words) {
    const auto word = [&] { return std::uint64_t{rng()} << 32 | rng(); };
    for (std::uint64_t& bits : x) bits = word() | word() | word();
    for (std::uint64_t& bits : flips) bits = word();
    for (Index at = 0; at < a.images * a.out_height * a.out_width * a.words; ++at) {
      const Index k = at % a.words, pixel = at / a.words, r = pixel / a.out_width;
      std::uint64_t bits = ~std::uint64_t{0};
      for (Index row = 0; row < a.height; ++row) {
        for (Index column = 0; column < a.width; ++column) {
          const Index h = row + a.pad_h - r % a.out_height * a.stride_h;
          const Index w = column + a.pad_w - pixel % a.out_width * a.stride_w;
          const bool in_window = h >= 0 && w >= 0 && h % a.dilation_h == 0 && w % a.dilation_w == 0 &&
                                 h / a.dilation_h < a.kernel_h && w / a.dilation_w < a.kernel_w;
          if (in_window) bits &= x[((r / a.out_height * a.height + row) * a.width + column) * a.words + k];
        }
      }
      plain.push_back(bits);
      flipped.push_back(bits ^ flips[k]);
    }
  }
  std::vector<std::uint64_t> x, flips, plain, flipped;
};

}  // namespace tersetorch::test
