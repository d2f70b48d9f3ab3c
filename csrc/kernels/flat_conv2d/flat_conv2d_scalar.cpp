#include "kernels/common/scalars.h"
#include "kernels/flat_conv2d/flat_conv2d.h"

namespace tersetorch {
namespace {

void LoadPixels(const FlatLoadArgs& a) noexcept {
  for (std::int64_t i = 0; i < a.count; ++i) {
    for (std::int64_t c = 0; c < a.channels; ++c) {
      const std::int64_t pixel = a.first + i;
      const std::int64_t at = a.x.channels_last ? pixel * a.x.step + c : c * a.x.step + pixel;
      a.to[i * a.step + c] = Load(a.x.data, a.x.stored_as, at);
    }
  }
}

void Lateral(const FlatLateralArgs& a) noexcept {
  for (std::int64_t p = 0; p < a.panels; ++p) {
    for (std::int64_t i = 0; i < a.count; ++i) {
      for (std::int64_t lane = 0; lane < kFlatLanes; ++lane) {
        float sum = At<float>(a.bias, p * kFlatLanes + lane);
        for (std::int64_t c = 0; c < a.channels; ++c) {
          sum += At<float>(a.weights, (p * a.channels + c) * kFlatLanes + lane) * At<float>(a.x, i * a.step + c);
        }
        a.to[p * a.panel_step + i * kFlatLanes + lane] = sum;
      }
    }
  }
}

float Vertical(const FlatPlanesArgs& a, std::int64_t i, std::int64_t r, std::int64_t p, std::int64_t w,
               std::int64_t lane) {
  if (w < 0 || w >= a.width) return 0;
  const std::int64_t panel = r * a.rank_panels + p;
  float sum = At<float>(a.vertical_bias, panel * kFlatLanes + lane);
  for (std::int64_t k = 0; k < a.kernel_h; ++k) {
    const float* from = a.rows[i * a.kernel_h + k];
    const float* row = from == nullptr ? a.zeros : from + (r * a.panels + p) * a.panel_step;
    sum += At<float>(a.vertical, (panel * a.kernel_h + k) * kFlatLanes + lane) * row[w * kFlatLanes + lane];
  }
  return sum;
}

void Planes(const FlatPlanesArgs& a) noexcept {
  for (std::int64_t i = 0; i < a.count; ++i) {
    for (std::int64_t j = 0; j < a.out_width; ++j) {
      for (std::int64_t map = 0; map < a.panels * kFlatLanes; ++map) {
        const std::int64_t p = map / kFlatLanes, lane = map % kFlatLanes;
        float sum = At<float>(a.bias, map);
        for (std::int64_t r = 0; r < a.rank; ++r) {
          for (std::int64_t k = 0; k < a.kernel_w; ++k) {
            const std::int64_t tap = ((r * a.rank_panels + p) * a.kernel_w + k) * kFlatLanes + lane;
            sum += At<float>(a.horizontal, tap) * Vertical(a, i, r, p, j * a.stride_w - a.pad_w + k, lane);
          }
        }
        Put(a.to, i * a.row_step + j * a.step + map, a.relu && sum < 0 ? 0.0f : sum);
      }
    }
  }
}

void StorePixels(const FlatStoreArgs& a) noexcept {
  for (std::int64_t i = 0; i < a.count; ++i) {
    for (std::int64_t c = 0; c < a.channels; ++c) {
      const std::int64_t pixel = a.first + i;
      const std::int64_t at = a.y.channels_last ? pixel * a.y.step + c : c * a.y.step + pixel;
      Store(a.y.data, a.y.stored_as, at, a.from[i * a.step + c]);
    }
  }
}

}  // namespace

const FlatKernels kFlatScalar = {LoadPixels, Lateral, Planes, StorePixels};

}  // namespace tersetorch
