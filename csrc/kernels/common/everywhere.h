// Marks a function that kernels on a GPU call, too.
#pragma once

#ifdef __CUDACC__
#define TERSETORCH_EVERYWHERE __host__ __device__
#else
#define TERSETORCH_EVERYWHERE
#endif
