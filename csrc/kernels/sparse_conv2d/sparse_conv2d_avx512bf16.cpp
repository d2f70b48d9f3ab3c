#include "kernels/sparse_conv2d/sparse_conv2d.h"
#include "kernels/sparse_conv2d/sparse_conv2d_simd.h"

namespace tersetorch {

const ConvKernels kConvAvx512Bf16{16, kQuadOffset, Check, Planes, Convolve<16>};

}  // namespace tersetorch
