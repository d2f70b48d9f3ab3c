#include "kernels/blocked_matmul/blocked_matmul.h"
#include "kernels/blocked_matmul/blocked_matmul_simd.h"

namespace tersetorch {

const BlockedMatmulFunction kBlockedAvx512Bf16 = ForWidth<16>;

}  // namespace tersetorch
