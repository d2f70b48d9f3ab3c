#include "kernels/panels/panels.h"
#include "kernels/panels/panels_simd.h"

namespace tersetorch {

const PackPanelFunction kPackPanelAvx2 = PackForWidth;
const WordPanelFunctions kWordPanelsAvx2 = {PackWords<Pairs>, PackWords<Quads>, Scales};

}  // namespace tersetorch
