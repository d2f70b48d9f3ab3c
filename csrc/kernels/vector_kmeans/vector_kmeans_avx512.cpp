#include "kernels/vector_kmeans/vector_kmeans.h"
#include "kernels/vector_kmeans/vector_kmeans_simd.h"

namespace tersetorch {

const VectorKmeansFunctions kVectorKmeansAvx512{Nearest, Members, Closer};

}  // namespace tersetorch
