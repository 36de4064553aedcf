// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// out = dropout(softmax(scale Q K^T)) V inside each packed sequence; qkv and out are of `dtype`.
// Rows of qkv from cu_seqlens[B] on are not read; these rows of out are 0.
void attention_fwd(int dtype,
                   const void* qkv,            // (T, 3, H, D)
                   const int32_t* cu_seqlens,  // (B + 1,)
                   void* out,                  // (T, H, D)
                   float* lse,                 // (H, T), or null
                   int64_t T, int64_t B, int64_t H, int64_t D, float scale, bool causal,
                   const int64_t* seed, uint32_t site, uint32_t threshold, float keep, int threads);

void attention_bwd(int dtype,
                   const void* dout,           // (T, H, D)
                   const void* qkv,            // (T, 3, H, D)
                   const void* out,            // (T, H, D)
                   const int32_t* cu_seqlens,  // (B + 1,)
                   void* dqkv,                 // (T, 3, H, D)
                   int64_t T, int64_t B, int64_t H, int64_t D, float scale, bool causal,
                   const int64_t* seed, uint32_t site, uint32_t threshold, float keep, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
