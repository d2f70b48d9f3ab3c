#include "kernels/panels/panels.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {

namespace {

PackPanelFunction Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kPackPanelAvx512;
    case CpuIsa::kAvx2:
      return kPackPanelAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kPackPanelScalar;
}

const WordPanelFunctions& ActiveWords() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kWordPanelsAvx512;
    case CpuIsa::kAvx2:
      return kWordPanelsAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kWordPanelsScalar;
}

}  // namespace

void PackPanel(const PanelPackArgs& args, std::int64_t feature_begin, std::int64_t feature_end) noexcept {
  Active()(args, feature_begin, feature_end);
}

void PackPairPanel(const WordPanelArgs& args, std::int64_t word_begin, std::int64_t word_end) noexcept {
  ActiveWords().pairs(args, word_begin, word_end);
}

void PackQuadPanel(const WordPanelArgs& args, std::int64_t word_begin, std::int64_t word_end) noexcept {
  ActiveWords().quads(args, word_begin, word_end);
}

void SampleScales(const SampleScalesArgs& args, std::int64_t sample_begin, std::int64_t sample_end) noexcept {
  ActiveWords().scales(args, sample_begin, sample_end);
}

}  // namespace tersetorch
