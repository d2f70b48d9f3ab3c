#include "kernels/codebook_embedding/codebook_embedding.h"
#include "kernels/codebook_embedding/codebook_embedding_simd.h"

namespace tersetorch {

const CodebookLookup kCodebookEmbeddingAvx512 = Lookup;

}  // namespace tersetorch
