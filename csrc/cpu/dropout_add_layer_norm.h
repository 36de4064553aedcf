// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// y = LN(z) * weight + bias with z = residual + dropout(x); x, residual, y, z are of `dtype`
void dropout_add_layer_norm_fwd(int dtype,
                                const void* x,         // (N, C)
                                const void* residual,  // (N, C)
                                const float* weight,   // (C,)
                                const float* bias,     // (C,), or null: zeros
                                void* y,               // (N, C)
                                void* z,               // (N, C), or null: not saved
                                float* mean,           // (N,)
                                float* rstd,           // (N,)
                                int64_t N, int64_t C, float eps, const int64_t* seed, uint32_t site,
                                uint32_t threshold, float scale, const int64_t* rows, int threads);

void dropout_add_layer_norm_bwd(int dtype,
                                const void* dy,       // (N, C)
                                const void* z,        // (N, C)
                                const float* weight,  // (C,)
                                const float* mean,    // (N,)
                                const float* rstd,    // (N,)
                                const void* dz,       // (N, C), or null: no gradient of z
                                void* dx,             // (N, C)
                                void* dresidual,      // (N, C)
                                float* dweight,       // (C,)
                                float* dbias,         // (C,)
                                int64_t N, int64_t C, const int64_t* seed, uint32_t site,
                                uint32_t threshold, float scale, const int64_t* rows, int threads);

// for tests: the words behind n columns of one row, n a multiple of 64
void philox_row(uint32_t* words, int64_t n, int64_t seed, uint32_t row, uint32_t site);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
