// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// y = x * rstd * weight; x and y are of `dtype`
void rms_norm_fwd(int dtype,
                  const void* x,        // (N, C)
                  const float* weight,  // (C,), or null: ones
                  void* y,              // (N, C)
                  float* rstd,          // (N,)
                  int64_t N, int64_t C, float eps, int threads);

void rms_norm_bwd(int dtype,
                  const void* dy,       // (N, C)
                  const void* x,        // (N, C)
                  const float* weight,  // (C,), or null: ones
                  const float* rstd,    // (N,)
                  void* dx,             // (N, C)
                  float* dweight,       // (C,)
                  int64_t N, int64_t C, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
