// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// h = gelu(u) with u = x w1^T + b1, the first half of the feed-forward. `packed`, a weight from
// linear_pack, replaces w1. `activation` is a number of Activation, one of GELU's three forms.
void feed_forward_up(int x_dtype, int w_dtype, int activation,
                     const void* x,        // (M, C)
                     const void* w1,       // (F, C)
                     const float* packed,  // or null
                     const float* b1,      // (F,), or null
                     void* u,              // (M, F), or null: not saved
                     void* h,              // (M, F)
                     int64_t M, int64_t F_, int64_t C, int threads);

// du = (dy w2) gelu'(u) and h = gelu(u), from one evaluation
void feed_forward_down_bwd(int x_dtype, int w_dtype, int activation,
                           const void* dy,  // (M, C)
                           const void* w2,  // (C, F)
                           const void* u,   // (M, F)
                           void* du,        // (M, F)
                           void* h,         // (M, F), or null: not wanted
                           int64_t M, int64_t F_, int64_t C, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
