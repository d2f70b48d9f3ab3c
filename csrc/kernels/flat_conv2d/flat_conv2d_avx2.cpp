#include "kernels/flat_conv2d/flat_conv2d.h"
#include "kernels/flat_conv2d/flat_conv2d_simd.h"

namespace tersetorch {

const FlatKernels kFlatAvx2 = {LoadPixels, Lateral, Planes, StorePixels};

}  // namespace tersetorch
