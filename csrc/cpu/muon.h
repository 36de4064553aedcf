// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// Orthogonalises each of `matrices` matrices (R, C): out = U V^T of the singular value
// decomposition x = U S V^T, with singular values from 0.68 to 1.21 in the place of 1 after five
// steps, and less for those below 0.0014 |x|. A matrix of zeros stays one. Results have the same
// bits for any number of threads.
void muon_orthogonalise(const int64_t* places,  // (matrices, 2) addresses of x and out, fp32 (R,
                                                // C), not the same memory
                        int64_t matrices, int64_t R, int64_t C, int64_t steps, float a, float b,
                        float c, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
