// The softmax of one long row of logits, and its cross-entropy with a label.
//
// A row is read once from memory, in blocks that fit the first-level cache: first the maximum of a
// block, then its exponentials relative to the largest maximum so far.
#pragma once

#include "math.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int64_t kSoftmaxBlock = 1024;

// The maximum of z, how often it occurs, and the sum of e^(z - max) over all other logits. Kept
// apart, they keep the precision of a confident row, whose loss is far smaller than max, lse and 1.
struct SoftmaxRow {
  float max, times, rest;

  float sum() const { return times + rest; }
  float log_sum() const { return __builtin_log1pf(rest + (times - 1.0f)); }
  float lse() const { return max + log_sum(); }
  // -log p of a logit: log(sum) - (z - max)
  float loss(float z) const { return log_sum() - (z - max); }
  // p - 1 of a logit with the unscaled probability e = e^(z - max)
  float p_minus_1(float z, float e) const {
    return z == max ? -(rest + (times - 1.0f)) / sum() : e / sum() - 1.0f;
  }
};

inline float exp_nonpositive1(float x) { return exp_nonpositive(set1(x))[0]; }

// lanes from n on are -inf, n < W
template <typename T>
inline F load_logits(const T* z, int64_t n) {
  return below(n) ? load(z, n) : set1(-__builtin_inff());
}

// the largest of n logits, ignoring NaN: the sum becomes NaN later
template <typename T>
inline float block_max(const T* z, int64_t n) {
  F best[4];
  for (F& b : best) b = set1(-__builtin_inff());
  int64_t c = 0;
  for (; c + 4 * W <= n; c += 4 * W)
    for (int k = 0; k < 4; ++k) best[k] = max(load(z + c + k * W), best[k]);
  for (; c + W <= n; c += W) best[0] = max(load(z + c), best[0]);
  if (c < n) best[0] = max(load_logits(z + c, n - c), best[0]);
  return max(max(max(best[0], best[1]), max(best[2], best[3])));
}

// The contribution of n logits, none above `top`, to a row whose maximum so far is `top`. With
// kStore the terms e^(z - top) are stored in e, which may be z. kCount: a logit may equal top.
template <bool kStore, bool kCount, typename T>
inline SoftmaxRow block_exps(const T* z, float top, int64_t n, float* e) {
  // -inf - -inf would be NaN
  const float offset = top == -__builtin_inff() ? 0.0f : top;
  F rest[2] = {zero(), zero()};
  U times = set1(0u);
  const auto term = [&](F logit, int k) {
    const F value = exp_nonpositive(logit - offset);
    const I equal = logit == set1(top);
    if (kCount) times -= bits_as<U>(equal);
    rest[k] += kCount ? (equal ? zero() : value) : value;
    return value;
  };
  int64_t c = 0;
  for (; c + 2 * W <= n; c += 2 * W)
    for (int k = 0; k < 2; ++k) {
      const F value = term(load(z + c + k * W), k);
      if (kStore) store(e + c + k * W, value);
    }
  for (; c < n; c += W) {
    const F value = term(n - c < W ? load_logits(z + c, n - c) : load(z + c), 0);
    if (kStore) store(e + c, value, n - c);
  }
  return {top, sum(__builtin_convertvector(times, F)), sum(rest[0] + rest[1])};
}

// One pass over z (V). With kStore it stores e^(z - offset) in e (V) and each block's offset, the
// largest maximum so far, in offsets (ceil(V / kSoftmaxBlock)).
template <bool kStore, typename T>
inline SoftmaxRow softmax_pass(const T* z, int64_t V, float* e, float* offsets) {
  SoftmaxRow row = {-__builtin_inff(), 0.0f, 0.0f};
  for (int64_t start = 0; start < V; start += kSoftmaxBlock) {
    const int64_t n = imin(kSoftmaxBlock, V - start);
    const float best = block_max(z + start, n);
    if (best > row.max) row = {best, 0.0f, row.sum() * exp_nonpositive1(row.max - best)};
    float* terms = kStore ? e + start : nullptr;
    const SoftmaxRow block = best < row.max
                                 ? block_exps<kStore, false>(z + start, row.max, n, terms)
                                 : block_exps<kStore, true>(z + start, row.max, n, terms);
    row.times += block.times;
    row.rest += block.rest;
    if (kStore) offsets[start / kSoftmaxBlock] = row.max;
  }
  // an infinite maximum makes the sum NaN
  row.rest += row.max - row.max;
  return row;
}

// floats of room that softmax_grad_row needs
template <typename T>
inline int64_t softmax_room(int64_t V) {
  const int64_t offsets = round_up(ceil_div(V, kSoftmaxBlock), 16);
  return offsets + (sizeof(T) == sizeof(float) ? 0 : V);
}
inline float* softmax_exps(float* dz, float*) { return dz; }
inline float* softmax_exps(bf16*, float* spare) { return spare; }

// dz (V) = (p - onehot(label)) scale, with p = softmax(z); dz may be z itself. A label outside
// [0, V) gives NaN.
template <typename T>
inline SoftmaxRow softmax_grad_row(const T* z, int64_t label, float scale, int64_t V, T* dz,
                                   float* room) {
  const bool valid = label >= 0 && label < V;
  const float z_label = valid ? load1(z + label) : 0.0f;
  float* e = softmax_exps(dz, room + round_up(ceil_div(V, kSoftmaxBlock), 16));
  const SoftmaxRow row = softmax_pass<true>(z, V, e, room);
  if (!valid) scale = __builtin_nanf("");
  for (int64_t start = 0; start < V; start += kSoftmaxBlock) {
    const int64_t end = imin(start + kSoftmaxBlock, V);
    const F factor =
        set1(exp_nonpositive1(room[start / kSoftmaxBlock] - row.max) / row.sum() * scale);
    int64_t c = start;
    for (; c + W <= end; c += W) store(dz + c, load(e + c) * factor);
    if (c < end) store(dz + c, load(e + c, end - c) * factor, end - c);
  }
  if (valid)
    store1(dz + label, row.p_minus_1(z_label, exp_nonpositive1(z_label - row.max)) * scale);
  return row;
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
