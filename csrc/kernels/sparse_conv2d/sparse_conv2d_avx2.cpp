#include "kernels/sparse_conv2d/sparse_conv2d.h"
#include "kernels/sparse_conv2d/sparse_conv2d_simd.h"

namespace tersetorch {

const ConvKernels kConvAvx2{8, kQuadOffset, Check, Planes, Convolve<8>};

}  // namespace tersetorch
