#include "kernels/codebook_conv2d/codebook_conv2d.h"
#include "kernels/codebook_conv2d/codebook_conv2d_simd.h"

namespace tersetorch {

const CodebookConvKernels kCodebookConvAvx512 = {Pad, PackWindows};

}  // namespace tersetorch
