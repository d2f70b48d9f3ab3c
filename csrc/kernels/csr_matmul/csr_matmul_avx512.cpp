#include "kernels/csr_matmul/csr_matmul.h"
#include "kernels/csr_matmul/csr_matmul_simd.h"

namespace tersetorch {

const CsrKernels kCsrAvx512 = kKernelsWithLanes<16>;

}  // namespace tersetorch
