// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// The pre-activations of a gated feed-forward are u = [a, g] (M, 2 F): a is activated, g is not.
// `activation` is a number of Activation, not kIdentity.

// u = [x wa^T, x wg^T] + bias,  h = act(a) g
void gated_feed_forward_up(int x_dtype, int w_dtype, int activation,
                           const void* x,                   // (M, C)
                           const void* wa, const void* wg,  // (F, C)
                           const float* packed,  // of gated_feed_forward_pack, or null: wa and wg
                           const float* bias,    // (2 F,), or null
                           void* u,              // (M, 2 F), or null: not saved
                           void* h,              // (M, F)
                           int64_t M, int64_t F_, int64_t C, int threads);

// h = act(a) g
void gate(int dtype, int activation,
          const void* u,  // (M, 2 F)
          void* h,        // (M, F)
          int64_t M, int64_t F_, int threads);

// with dh = dy w2:  du = [dh g act'(a), dh act(a)],  and h = act(a) g again
void gated_feed_forward_down_bwd(int x_dtype, int w_dtype, int activation,
                                 const void* dy,  // (M, C)
                                 const void* w2,  // (C, F)
                                 const void* u,   // (M, 2 F)
                                 void* du,        // (M, 2 F)
                                 void* h,         // (M, F), or null: not wanted
                                 int64_t M, int64_t F_, int64_t C, int threads);

// floats of both weights (F, C), packed together for inputs of x_dtype
int64_t gated_feed_forward_packed_size(int x_dtype, int64_t F_, int64_t C);
void gated_feed_forward_pack(int x_dtype, int w_dtype, const void* wa, const void* wg,
                             float* packed, int64_t F_, int64_t C, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
