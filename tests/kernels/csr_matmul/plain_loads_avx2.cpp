// The variant as it runs where gathers are slow.
#define TERSETORCH_CSR_WITHOUT_GATHERS
#define kCsrAvx2 kCsrAvx2PlainLoads
#include "kernels/csr_matmul/csr_matmul_avx2.cpp"
