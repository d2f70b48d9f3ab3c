#include "kernels/csr_matmul/csr_matmul.h"
#include "kernels/csr_matmul/csr_matmul_simd.h"

namespace tersetorch {

const CsrKernels kCsrAvx2 = kKernelsWithLanes<8>;

}  // namespace tersetorch
