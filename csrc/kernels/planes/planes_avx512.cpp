#include "kernels/planes/planes.h"
#include "kernels/planes/planes_simd.h"

namespace tersetorch {

const WordPlanesFunctions kWordPlanesAvx512{Planes<Pairs>, Planes<Quads>};

}  // namespace tersetorch
