// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// y = dropout(LN(word[ids] + position[positions] + type[types]) * weight + bias); the tables are of
// `dtype`, y of `out_dtype`; the ids must be inside their tables
void embed_fwd(int dtype, int out_dtype,
               const int64_t* ids,        // (T,), or null: row t of word belongs to token t
               const int64_t* positions,  // (T,)
               const int64_t* types,      // (T,), or null: no types
               const void* word,          // (V, C)
               const void* position,      // (P, C)
               const void* type,          // (Y, C), or null
               const float* weight,       // (C,)
               const float* bias,         // (C,)
               void* y,                   // (T, C)
               float* mean,               // (T,)
               float* rstd,               // (T,)
               int64_t T, int64_t C, float eps, const int64_t* seed, uint32_t site,
               uint32_t threshold, float scale, int threads);

// writes every row of the tables' gradients, which are of `dtype`
void embed_bwd(int dtype, int out_dtype,
               const void* dy,            // (T, C)
               const int64_t* ids,        // (T,), or null: dword is (T, C)
               const int64_t* positions,  // (T,)
               const int64_t* types,      // (T,), or null
               const void* word,          // (V, C)
               const void* position,      // (P, C)
               const void* type,          // (Y, C), or null
               const float* weight,       // (C,)
               const float* mean,         // (T,)
               const float* rstd,         // (T,)
               void* dword,               // (V, C)
               void* dposition,           // (P, C), or null: not wanted
               void* dtype_table,         // (Y, C), or null
               float* dweight,            // (C,)
               float* dbias,              // (C,)
               int64_t T, int64_t C, int64_t V, int64_t P, int64_t Y,
               int64_t padding,           // the row of word without a gradient, or -1
               int64_t position_padding,  // the same for position
               const int64_t* seed, uint32_t site, uint32_t threshold, float scale, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
