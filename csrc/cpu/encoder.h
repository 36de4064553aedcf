// No include guard: isas.h includes this once per instruction set.
#include <cstdint>

#ifndef FASTBERT_LAYER_FIELDS
// The parameters of an encoder layer, an address each, in the order of LayerWeights in
// fastbert/nn/layer.py. fastbert/runners/copies.py compares the names when it is imported. Biases
// may be null, and so may the attention's norm of a pre-norm layer.
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
// heads, head size, intermediate size, Activation, key heads, and 1 for norms before the blocks,
// for a gated feed-forward and for RMSNorm
constexpr int64_t kLayerSizes = 8;
constexpr int64_t kLayerNumbers = 3;  // epsilon of the attention's norm and of the output's, scale
// the arguments of attention_fwd that change with the batch: left, right, rotary, half, pairs,
// bias, positions; tables by their addresses
constexpr int64_t kLayerForms = 7;
}  // namespace fastbert
#endif

namespace fastbert {
namespace FASTBERT_ISA {

// n encoder layers for inference, in one call: x, y and everything between are of `dtype`, but for
// the sums of pre-norm layers, which stay in fp32. `layers` holds the addresses of each layer's
// FASTBERT_LAYER_FIELDS: weights packed by linear_pack, a gated `up` by gated_feed_forward_pack, or
// with `int8` all by linear_int8_pack; biases and norms in fp32. With `rows` the last layer's
// second half runs for these rows. The matrices of a block without heads, or of intermediate size
// 0, are not read: the block gives its last bias. All layers are post-norm, or all are pre-norm.
// With `held` keys and values are kept: all sequences begin, or all go on by one token, which sees
// those before it. The layers have H key heads of one size then, and nothing in `forms` but
// a causal window.
void encoder_infer(int dtype, bool int8,
                   const void* x,              // (T, C)
                   const int32_t* cu_seqlens,  // (B + 1,)
                   const int64_t* layers,      // (n, 12)
                   const int64_t* sizes,       // (n, kLayerSizes)
                   const float* numbers,       // (n, kLayerNumbers)
                   const int64_t* forms,       // (n, kLayerForms), or null: whole sequences alone
                   int64_t n,
                   const int64_t* rows,  // (R,), or null
                   int64_t R,
                   const int64_t* held,  // (B,) of Held, or null
                   void* y,              // (T, C), or (R, C)
                   int64_t T, int64_t B, int64_t C, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
