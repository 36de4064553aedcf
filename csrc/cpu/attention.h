// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// out = dropout(softmax(scale Q K^T + bias)) V inside each packed sequence; qkv and out are of
// `dtype`. Rows of qkv hold H queries, then the keys, then the values of `kv_heads` heads; query
// head h reads key h kv_heads / H. D is at most 256. A query sees `left` keys before itself and
// `right` behind; all of them where the number is negative. Rows of qkv from cu_seqlens[B] on are
// not read; these rows of out are 0.
void attention_fwd(int dtype,
                   const void* qkv,            // (T, H + 2 kv_heads, D)
                   const int32_t* cu_seqlens,  // (B + 1,)
                   void* out,                  // (T, H, D)
                   float* lse,                 // (H, T), or null
                   int64_t T, int64_t B, int64_t H, int64_t kv_heads, int64_t D, float scale,
                   int64_t left, int64_t right,
                   const float* rotary,       // (P, 2, half), or null
                   int64_t half, bool pairs,  // elements 2 d and 2 d + 1, or d and d + half
                   const float* bias,         // (H, 2 positions - 1), or null
                   int64_t positions,         // at least the longest sequence
                   const int64_t* seed, uint32_t site, uint32_t threshold, float keep, int threads);

void attention_bwd(int dtype,
                   const void* dout,           // (T, H, D)
                   const void* qkv,            // (T, H + 2 kv_heads, D)
                   const void* out,            // (T, H, D)
                   const int32_t* cu_seqlens,  // (B + 1,)
                   void* dqkv,                 // (T, H + 2 kv_heads, D)
                   float* dbias,               // (H, 2 positions - 1), or null
                   float* dbias_parts,         // (H, 2 T) zeros, null where dbias is
                   int64_t T, int64_t B, int64_t H, int64_t kv_heads, int64_t D, float scale,
                   int64_t left, int64_t right, const float* rotary, int64_t half, bool pairs,
                   const float* bias, int64_t positions, const int64_t* seed, uint32_t site,
                   uint32_t threshold, float keep, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
