// Keys and values that are kept while texts are generated, and attention of one new token to them.
//
// Both lie as attention.cpp packs them: keys in panels of kNR tokens, [panel][D][kNR], and values
// in panels of kNR columns, [panel][capacity][kNR]. So the inner loops are attention's, which add
// up in the same order: a token's context is bitwise that of the whole sequence in one call.
#include "decode.h"

#include "attend.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

static_assert(kHeldStep % kNR == 0);

// One head of one layer in a sequence's memory.
struct Kept {
  float *keys, *values;
  int64_t capacity, D;

  Kept(const Held& held, int64_t layer, int64_t H, int64_t D_, int64_t h)
      : capacity(held.capacity), D(D_) {
    const int64_t each = kv_width(D) * capacity;
    keys = held.floats + (2 * layer * H + h) * each;
    values = keys + H * each;
  }
  template <typename T>
  void put(int64_t place, const T* key, const T* value) const {
    float* k = keys + place / kNR * kNR * D + place % kNR;
    for (int64_t d = 0; d < D; ++d) k[d * kNR] = load1(key + d);
    for (int64_t d = 0; d < D; d += kNR) {
      float* v = values + d * capacity + place * kNR;
      for (int64_t i = 0; i < kNR && d + i < D; i += W)
        store(v + i, load(value + d + i, D - d - i));
    }
  }
};

}  // namespace

void keep_keys(int dtype, const void* qkv, const int32_t* cu_seqlens, const Held* held,
               int64_t layer, int64_t B, int64_t H, int64_t D, int threads) {
  with_type(dtype, [&](auto t) {
    const auto* from = static_cast<const decltype(t)*>(qkv);
    each_task(B * H, cu_seqlens[B] * H * D, 0, threads, [&](int64_t task, float*) {
      const int64_t b = task / H, h = task % H;
      const Kept kept(held[b], layer, H, D, h);
      for (int64_t i = cu_seqlens[b]; i < cu_seqlens[b + 1]; ++i) {
        const auto* key = from + ((3 * i + 1) * H + h) * D;
        kept.put(held[b].tokens + i - cu_seqlens[b], key, key + H * D);
      }
    });
  });
}

void attend_kept(int dtype, const void* qkv, const Held* held, void* out, int64_t layer, int64_t B,
                 int64_t H, int64_t D, float scale, int threads) {
  const int64_t depth = round_up(D, kNR);
  int64_t most = 0, total = 0;
  for (int64_t b = 0; b < B; ++b) {
    most = imax(most, held[b].tokens + 1);
    total += held[b].tokens + 1;
  }
  const int64_t ld = round_up(most, kNR);
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    each_task(B * H, 2 * total * H * D, 2 * depth + ld, threads, [&](int64_t task, float* room) {
      const int64_t b = task / H, h = task % H, L = held[b].tokens + 1;
      const Kept kept(held[b], layer, H, D, h);
      float *query = room, *result = query + depth, *scores = result + depth;
      const T* q = static_cast<const T*>(qkv) + (3 * b * H + h) * D;
      for (int64_t d = 0; d < D; d += W) store(query + d, load(q + d, D - d));
      product(1, round_up(L, kNR), D, query, Rows{depth}, kept.keys, D, scores, ld, false);
      const Softmax soft = softmax_row(scores, {0, L}, {0, L}, scale, nullptr);
      const float inverse = 1.0f / soft.sum;
      for (int64_t j = 0; j < L; j += W) store(scores + j, load(scores + j) * inverse);
      product(1, depth, L, scores, Rows{ld}, kept.values, kept.capacity, result, depth, false);
      T* o = static_cast<T*>(out) + (b * H + h) * D;
      for (int64_t d = 0; d < D; d += W) store(o + d, load(result + d), D - d);
    });
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
