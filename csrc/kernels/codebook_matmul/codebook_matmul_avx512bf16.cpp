#include "kernels/codebook_matmul/codebook_matmul.h"
#include "kernels/codebook_matmul/codebook_matmul_simd.h"

namespace tersetorch {

const CodebookKernels kCodebookAvx512Bf16 = {PackSamples, Matmul};

}  // namespace tersetorch
