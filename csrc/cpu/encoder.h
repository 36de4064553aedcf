// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// n post-norm encoder layers for inference, in one call: x, y and everything between are of
// `dtype`. `layers` holds kLayerFields addresses a layer, in the order of fastbert/runners/freeze.py:
// weights packed by linear_pack, biases and norms in fp32. With `rows` the last layer's second half
// runs for these rows.
void encoder_infer(int dtype,
                   const void* x,              // (T, C)
                   const int32_t* cu_seqlens,  // (B + 1,)
                   const int64_t* layers,      // (n, kLayerFields)
                   int64_t n,
                   const int64_t* rows,  // (R,), or null
                   int64_t R,
                   void* y,  // (T, C), or (R, C)
                   int64_t T, int64_t B, int64_t H, int64_t D, int64_t F_, float eps, bool tanh,
                   int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
