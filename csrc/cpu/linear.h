// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// A weight (N, K) is given in up to three pieces of `each` rows; x, y, dy, dx are of x_dtype.

// y = x weight^T + bias; `packed`, a weight from linear_pack, replaces the pieces
void linear_fwd(int x_dtype, int w_dtype,
                const void* x,                                   // (M, K)
                const void* w0, const void* w1, const void* w2,  // (each, K)
                int64_t each,
                const float* packed,  // linear_packed_size floats, or null
                const float* bias,    // (N,), or null
                void* y,              // (M, N)
                int64_t M, int64_t N, int64_t K, int threads);

// dx = alpha dy weight
void linear_bwd_dx(int x_dtype, int w_dtype,
                   const void* dy,                                  // (M, N)
                   const void* w0, const void* w1, const void* w2,  // (each, K)
                   int64_t each, float alpha,
                   void* dx,  // (M, K)
                   int64_t M, int64_t N, int64_t K, int threads);

// dweight = alpha dy^T x, of w_dtype
void linear_bwd_dw(int x_dtype, int w_dtype,
                   const void* dy,  // (M, N)
                   const void* x,   // (M, K)
                   float alpha,
                   void* dweight,  // (N, K)
                   int64_t M, int64_t N, int64_t K, int threads);

// dbias = alpha sum over the rows of dy
void linear_bwd_db(int x_dtype,
                   const void* dy,  // (M, N)
                   float alpha,
                   float* dbias,  // (N,)
                   int64_t M, int64_t N, int threads);

// floats of a packed weight for inputs of x_dtype
int64_t linear_packed_size(int x_dtype, int64_t N, int64_t K);
void linear_pack(int x_dtype, int w_dtype, const void* w0, const void* w1, const void* w2,
                 int64_t each, float* packed, int64_t N, int64_t K, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
