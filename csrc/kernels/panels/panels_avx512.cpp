#include "kernels/panels/panels.h"
#include "kernels/panels/panels_simd.h"

namespace tersetorch {

const PackPanelFunction kPackPanelAvx512 = PackForWidth;
const WordPanelFunctions kWordPanelsAvx512 = {PackWords<Pairs>, PackWords<Quads>, Scales};

}  // namespace tersetorch
