// The variant as it runs where gathers are slow.
#define TERSETORCH_CSR_WITHOUT_GATHERS
#define kCsrAvx512 kCsrAvx512PlainLoads
#include "kernels/csr_matmul/csr_matmul_avx512.cpp"
