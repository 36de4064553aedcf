// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// y = gelu(x + bias); x and y are of `dtype`. `activation` is a number of Activation, one of GELU's
// three forms.
void bias_gelu_fwd(int dtype,
                   const void* x,      // (N, C)
                   const float* bias,  // (C,), or null: zeros
                   void* y,            // (N, C)
                   int64_t N, int64_t C, int activation, int threads);

void bias_gelu_bwd(int dtype,
                   const void* dy,     // (N, C)
                   const void* x,      // (N, C)
                   const float* bias,  // (C,), or null: zeros
                   void* dx,           // (N, C)
                   float* dbias,       // (C,), or null: not wanted
                   int64_t N, int64_t C, int activation, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
