// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

#include "runtime.h"

namespace fastbert {
namespace FASTBERT_ISA {

// Products of int8 weights and activations of 12 or 8 bits. Row t of x is q[t] a[t] with integers
// of at most `levels` (2047 or 127) and a[t] = max |x[t]| / levels; the sums of q w are exact.

// With 8 bits a processor that has VNNI's vpdpbusd multiplies q + 128, and the sums lose 128 times
// their column's sum of w: the same numbers.

// y = x (w scale)^T + bias
void linear_int8_fwd(int x_dtype,
                     const void* x,       // (M, K)
                     const void* w,       // (N, K) int8
                     const float* scale,  // (N,)
                     const float* bias,   // (N,), or null
                     void* y,             // (M, N) of x_dtype
                     int64_t M, int64_t N, int64_t K, int levels, int threads);

// A packed weight has K columns and `extra` more. Extra column i is multiplied by column sources[i]
// of x: it holds what is left of that column's numbers where they do not fit into int8.
// `levels` are those of the activations.
int64_t linear_int8_packed_size(int64_t N, int64_t K, int64_t extra, int levels);  // bytes
void linear_int8_pack(const void* w,           // (N, K + extra) int8
                      const float* scale,      // (N,)
                      const int32_t* sources,  // (extra,), each below K
                      void* packed, int64_t N, int64_t K, int64_t extra, int levels, int threads);
// the integers of a weight that linear_int8_pack packed on the same instruction set
void linear_int8_unpack(const void* packed,
                        void* w,  // (N, K + extra) int8
                        int64_t N, int threads);

// The two steps of a product with a packed weight, for callers with memory of their own: q has
// quantised_floats(M, K + extra) floats. a[t] is 0 for a row of zeros, and NaN for a row that holds
// a NaN or an infinity.
int64_t quantised_floats(int64_t M, int64_t columns);
int64_t columns_of(const void* packed);  // K + extra
void quantise(int x_dtype, const void* x, const void* packed, int64_t M, int64_t K, float* q,
              float* a,  // (M,)
              int threads);
void quantised_linear(int y_dtype, const float* q, const float* a, const void* packed,
                      const float* bias, Activation activation, void* y, int64_t M, int64_t N,
                      int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
