// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

#ifndef FASTBERT_HELD_FIELDS
#define FASTBERT_HELD_FIELDS
namespace fastbert {
// A sequence's keys and values of all layers, in `floats`, and the tokens that are there. Each
// layer has room for 2 H kv_width(D) capacity floats; `capacity` is a multiple of kHeldStep.
struct Held {
  float* floats;
  int64_t capacity, tokens;
};
constexpr int64_t kHeldStep = 32;
constexpr int64_t kv_width(int64_t D) { return (D + kHeldStep - 1) / kHeldStep * kHeldStep; }
}  // namespace fastbert
#endif

namespace fastbert {
namespace FASTBERT_ISA {

// Adds the keys and values of the rows of qkv, of `dtype`, to layer `layer` of every sequence.
void keep_keys(int dtype,
               const void* qkv,            // (T, 3, H, D)
               const int32_t* cu_seqlens,  // (B + 1,)
               const Held* held,           // (B,): before these tokens
               int64_t layer, int64_t B, int64_t H, int64_t D, int threads);

// Attention of one query a sequence to the tokens before it and to itself, whose keys and values
// have been kept.
void attend_kept(int dtype,
                 const void* qkv,   // (B, 3, H, D)
                 const Held* held,  // (B,): before these tokens
                 void* out,         // (B, H, D)
                 int64_t layer, int64_t B, int64_t H, int64_t D, float scale, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
