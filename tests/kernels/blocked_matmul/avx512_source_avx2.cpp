// The AVX-512 source built for AVX2 (a vector of 16 floats becomes two of 8), so that machines without AVX-512 run it.
#pragma GCC diagnostic ignored "-Wpsabi"

#define kBlockedAvx512 kBlockedAvx512OnAvx2
#include "kernels/blocked_matmul/blocked_matmul_avx512.cpp"
