// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

#ifndef FASTBERT_ACTIVATION
#define FASTBERT_ACTIVATION
namespace fastbert {
enum Activation : int { kIdentity, kGelu, kGeluTanh };
}  // namespace fastbert
#endif

namespace fastbert {
namespace FASTBERT_ISA {

// Products of int8 weights and activations of 12 or 8 bits. Row t of x is q[t] a[t] with integers
// of at most `levels` (2047 or 127) and a[t] = max |x[t]| / levels; the sums of q w are exact.

// y = x (w scale)^T + bias; `packed`, from linear_int8_pack, replaces w and scale
void linear_int8_fwd(int x_dtype,
                     const void* x,       // (M, K)
                     const void* w,       // (N, K) int8, or null
                     const void* packed,  // or null
                     const float* scale,  // (N,), or null
                     const float* bias,   // (N,), or null
                     void* y,             // (M, N) of x_dtype
                     int64_t M, int64_t N, int64_t K, int levels, int threads);

// A packed weight has the columns of w, and `extra` more whose factors are those of the columns
// `sources` of x: a column whose numbers do not fit into int8 is the sum of two or more.
int64_t linear_int8_packed_size(int64_t N, int64_t K, int64_t extra);  // bytes
void linear_int8_pack(const void* w,                                   // (N, K + extra) int8
                      const float* scale,                              // (N,)
                      const int32_t* sources,                          // (extra,), each below K
                      void* packed, int64_t N, int64_t K, int64_t extra, int threads);

// The two halves of linear_int8_fwd, for callers with memory of their own: q has
// quantised_floats(M, K + extra) floats. A row of zeros has a[t] = 0, a row with a NaN or an
// infinity NaN.
int64_t quantised_floats(int64_t M, int64_t columns);
int64_t columns_of(const void* packed);  // K + extra
void quantise(int x_dtype, const void* x, const void* packed, int64_t M, int64_t K, int levels,
              float* q,
              float* a,  // (M,)
              int threads);
void quantised_linear(int y_dtype, const float* q, const float* a, const void* packed,
                      const float* bias, Activation activation, void* y, int64_t M, int64_t N,
                      int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
