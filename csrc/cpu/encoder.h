// No include guard: isas.h includes this once per instruction set.
#include <cstdint>

#ifndef FASTBERT_LAYER_FIELDS
// The parameters of an encoder layer, an address each, in the order of LayerWeights in
// fastbert/nn/layer.py. fastbert/runners/copies.py compares the names when it is imported.
#define FASTBERT_LAYER_FIELDS(X) \
  X(qkv)                         \
  X(qkv_bias)                    \
  X(out)                         \
  X(out_bias)                    \
  X(attention_norm)              \
  X(attention_norm_bias)         \
  X(up)                          \
  X(up_bias)                     \
  X(down)                        \
  X(down_bias)                   \
  X(output_norm)                 \
  X(output_norm_bias)

namespace fastbert {
constexpr int64_t kLayerSizes = 4;    // heads, head size, intermediate size, 1 for the tanh GELU
constexpr int64_t kLayerNumbers = 3;  // epsilon of the attention's norm and of the output's, scale
}  // namespace fastbert
#endif

namespace fastbert {
namespace FASTBERT_ISA {

// n post-norm encoder layers for inference, in one call: x, y and everything between are of
// `dtype`. `layers` holds the addresses of each layer's FASTBERT_LAYER_FIELDS: weights packed by
// linear_pack or, with `int8`, by linear_int8_pack; biases and norms in fp32. With `rows` the last
// layer's second half runs for these rows. The matrices of a block without heads, or of
// intermediate size 0, are not read: the block gives its last bias.
void encoder_infer(int dtype, bool int8,
                   const void* x,              // (T, C)
                   const int32_t* cu_seqlens,  // (B + 1,)
                   const int64_t* layers,      // (n, 12)
                   const int64_t* sizes,       // (n, kLayerSizes)
                   const float* numbers,       // (n, kLayerNumbers)
                   int64_t n,
                   const int64_t* rows,  // (R,), or null
                   int64_t R,
                   void* y,  // (T, C), or (R, C)
                   int64_t T, int64_t B, int64_t C, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
