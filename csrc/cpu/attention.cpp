// Attention inside packed sequences, for one (sequence, head) and one block of queries at a time.
// The block's scores against all keys stay in cache: the softmax is exact in two passes, and memory
// grows with the length L, not L^2. Products run on gemm.h's inner loop.
//
//   S = scale Q K^T,  P = softmax(S),  O = (P M) V,  M is dropout's factor: 0 or 1 / (1 - p)
//   dV = (P M)^T dO,  delta = rowsum(dO O),  dS = scale P (M dO V^T - delta)
//   dQ = dS K,  dK = dS^T Q
//
// Backward computes the softmax again from Q and K: exp(S - lse) would have the rounding error of
// lse.
#include "attention.h"

#include "heads.h"
#include "philox.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// One head of one sequence: its place and its sizes.
struct Head {
  int64_t start, L, D, H, b, h;
  int64_t ld;     // stride of the scores: L rounded up to whole panels
  int64_t depth;  // D rounded up to whole panels
  float scale;
  bool causal;

  template <typename T>
  const T* row(const T* qkv, int which) const {
    return qkv + ((start * 3 + which) * H + h) * D;
  }
  // q, k or v (`which` 0, 1 or 2) as an operand: line i is token i or, with `across`, column i
  template <typename T>
  Operand<T> operand(const T* qkv, int which, int64_t first, int64_t count, bool across) const {
    const int64_t stride = 3 * H * D;
    return {matrix(row(qkv, which) + first * stride, stride, 1), across ? D : count, across};
  }
  template <typename T>
  Operand<T> rows_of(const T* y, int64_t first, int64_t count, bool across) const {
    const T* p = y + ((start + first) * H + h) * D;
    return {matrix(p, H * D, 1), across ? D : count, across};
  }
  int64_t seen(int64_t i) const { return causal ? i + 1 : L; }
};

struct Softmax {
  float max, sum;
};

// s (n) becomes exp(scale s - max), and 0 from n up to `end`
inline Softmax softmax_row(float* s, int64_t n, int64_t end, float scale) {
  const F lowest = set1(-__builtin_inff());
  F top = lowest;
  for (int64_t j = 0; j < n; j += W) {
    F v = load(s + j) * scale;
    if (j + W > n) v = below(n - j) ? v : lowest;
    store(s + j, v);
    top = max(v, top);
  }
  const float m = max(top);
  F total = zero();
  for (int64_t j = 0; j < n; j += W) {
    const F e = exp_nonpositive(load(s + j) - m);
    store(s + j, e);
    total += e;
  }
  for (int64_t j = round_up(n, W); j < end; j += W) store(s + j, zero());
  return {m, sum(total)};
}

template <typename T>
class Forward {
 public:
  Forward(const T* qkv, T* out, float* lse, int64_t T_, const Dropout& dropout)
      : qkv_(qkv), out_(out), lse_(lse), tokens_(T_), dropout_(dropout) {}

  static int64_t room(int64_t L, int64_t D) {
    const int64_t ld = round_up(L, kNR), rows = block_rows(L), depth = round_up(D, kNR);
    return ld * D + depth * L + rows * (D + ld + depth) + round_up(L, kPhiloxWords) + 8 * W;
  }

  // queries [from, to) of a head
  void run(const Head& head, int64_t from, int64_t to, float* room) const {
    const int64_t L = head.L, D = head.D, ld = head.ld, most = block_rows(L);
    float* keys = room;
    float* values = keys + ld * D;
    float* scores = values + head.depth * L;
    float* result = scores + most * ld;
    float* factors = result + most * head.depth;
    float* queries = factors + round_up(L, kPhiloxWords);
    head.operand(qkv_, 1, 0, L, false).template pack<false>(0, ld / kNR, kNR, 0, D, keys);
    head.operand(qkv_, 2, 0, L, true).template pack<false>(0, head.depth / kNR, kNR, 0, L, values);
    for (int64_t i = from; i < to; i += most) {
      const int64_t rows = imin(most, to - i);
      const int64_t span = head.causal ? imin(L, i + rows) : L;  // keys that these queries see
      head.operand(qkv_, 0, i, rows, false)
          .template pack<false>(0, ceil_div(rows, kMR), kMR, 0, D, queries);
      product_packed(rows, round_up(span, kNR), D, queries, keys, scores, ld, D);
      for (int64_t r = 0; r < rows; ++r) {
        float* s = scores + r * ld;
        const Softmax soft = softmax_row(s, head.seen(i + r), span, head.scale);
        finish(head, i + r, soft, factors, s);
      }
      // V is packed in panels of L steps, of which `span` are used
      product(rows, head.depth, span, scores, Rows{ld}, values, L, result, head.depth, false);
      for (int64_t r = 0; r < rows; ++r) {
        T* o = out_ + ((head.start + i + r) * head.H + head.h) * D;
        for (int64_t d = 0; d < D; d += W) store(o + d, load(result + r * head.depth + d), D - d);
      }
    }
  }

 private:
  // turns exponentials into weights, applies dropout and stores the log-sum-exp
  void finish(const Head& head, int64_t i, const Softmax& soft, float* factors, float* s) const {
    const int64_t n = head.seen(i);
    const float inverse = 1.0f / soft.sum;
    const bool drops = dropout_.enabled();
    if (lse_) lse_[head.h * tokens_ + head.start + i] = soft.max + __builtin_logf(soft.sum);
    if (drops)
      philox_factors(dropout_, static_cast<uint32_t>(i),
                     static_cast<uint32_t>(head.b * head.H + head.h), dropout_.site, n, factors);
    for (int64_t j = 0; j < n; j += W) {
      const F p = load(s + j) * inverse;
      store(s + j, drops ? dropped(p, load(factors + j)) : p);
    }
  }

  const T* qkv_;
  T* out_;
  float* lse_;
  int64_t tokens_;
  const Dropout& dropout_;
};

template <typename T>
class Backward {
 public:
  Backward(const T* dout, const T* qkv, const T* out, T* dqkv, const Dropout& dropout)
      : dout_(dout), qkv_(qkv), out_(out), dqkv_(dqkv), dropout_(dropout) {}

  static int64_t room(int64_t L, int64_t D) {
    const int64_t ld = round_up(L, kNR), rows = block_rows(L), depth = round_up(D, kNR);
    return 2 * ld * D + 3 * depth * ld + rows * (2 * D + 2 * ld + 3 * depth) +
           round_up(L, kPhiloxWords) + 16 * W;
  }

  void run(const Head& head, float* room) const {
    const int64_t L = head.L, D = head.D, ld = head.ld, depth = head.depth, most = block_rows(L);
    Room at = {};
    float* next = room;
    const auto take = [&](int64_t floats) { return (next += floats) - floats; };
    at.keys = take(ld * D);
    at.values = take(ld * D);
    at.keys_across = take(depth * ld);
    at.dk = take(depth * ld);
    at.dv = take(depth * ld);
    at.scores = take(most * ld);
    at.grads = take(most * ld);
    at.result = take(most * depth);
    at.queries_across = take(most * depth);
    at.dout_across = take(most * depth);
    at.factors = take(round_up(L, kPhiloxWords));
    at.queries = take(most * D + 4 * W);
    at.dout = take(most * D + 4 * W);
    head.operand(qkv_, 1, 0, L, false).template pack<false>(0, ld / kNR, kNR, 0, D, at.keys);
    head.operand(qkv_, 2, 0, L, false).template pack<false>(0, ld / kNR, kNR, 0, D, at.values);
    head.operand(qkv_, 1, 0, L, true)
        .template pack<false>(0, depth / kNR, kNR, 0, L, at.keys_across);
    for (int64_t k = 0; k < depth * L; k += W) store(at.dk + k, zero()), store(at.dv + k, zero());
    for (int64_t i = 0; i < L; i += most) block(head, i, imin(most, L - i), at);
    for (int64_t j = 0; j < L; ++j) {
      write(head, at.dk + j * depth, j, 1);
      write(head, at.dv + j * depth, j, 2);
    }
  }

 private:
  struct Room {
    float *keys, *values, *keys_across, *dk, *dv, *scores, *grads, *result;
    float *queries, *dout, *queries_across, *dout_across, *factors;
  };

  // `rows` queries from i on
  void block(const Head& head, int64_t i, int64_t rows, const Room& at) const {
    const int64_t D = head.D, ld = head.ld, depth = head.depth, panels = ceil_div(rows, kMR);
    const int64_t span = head.causal ? imin(head.L, i + rows) : head.L;
    head.operand(qkv_, 0, i, rows, false).template pack<false>(0, panels, kMR, 0, D, at.queries);
    head.rows_of(dout_, i, rows, false).template pack<false>(0, panels, kMR, 0, D, at.dout);
    head.operand(qkv_, 0, i, rows, true)
        .template pack<false>(0, depth / kNR, kNR, 0, rows, at.queries_across);
    head.rows_of(dout_, i, rows, true)
        .template pack<false>(0, depth / kNR, kNR, 0, rows, at.dout_across);
    product_packed(rows, round_up(span, kNR), D, at.queries, at.keys, at.scores, ld, D);
    product_packed(rows, round_up(span, kNR), D, at.dout, at.values, at.grads, ld, D);
    for (int64_t r = 0; r < rows; ++r)
      row(head, i + r, span, at.factors, at.scores + r * ld, at.grads + r * ld);
    product(rows, depth, span, at.grads, Rows{ld}, at.keys_across, head.L, at.result, depth, false);
    for (int64_t r = 0; r < rows; ++r) write(head, at.result + r * depth, i + r, 0);
    product(span, depth, rows, at.scores, Columns{ld}, at.dout_across, rows, at.dv, depth, true);
    product(span, depth, rows, at.grads, Columns{ld}, at.queries_across, rows, at.dk, depth, true);
  }

  // in s scores become P M, in g dO V^T becomes dS
  void row(const Head& head, int64_t i, int64_t span, float* factors, float* s, float* g) const {
    const int64_t n = head.seen(i), D = head.D;
    const Softmax soft = softmax_row(s, n, span, head.scale);
    const float inverse = 1.0f / soft.sum, scale = head.scale;
    const int64_t place = ((head.start + i) * head.H + head.h) * D;
    F sums = zero();
    for (int64_t d = 0; d < D; d += W)
      sums += load(dout_ + place + d, D - d) * load(out_ + place + d, D - d);
    const float delta = sum(sums);
    const bool drops = dropout_.enabled();
    if (drops)
      philox_factors(dropout_, static_cast<uint32_t>(i),
                     static_cast<uint32_t>(head.b * head.H + head.h), dropout_.site, n, factors);
    for (int64_t j = 0; j < n; j += W) {
      const F p = load(s + j) * inverse;
      const F factor = drops ? load(factors + j) : set1(1.0f);
      F ds = p * (load(g + j) * factor - delta) * scale;
      if (j + W > n) ds = below(n - j) ? ds : zero();
      store(s + j, drops ? dropped(p, factor) : p);
      store(g + j, ds);
    }
    for (int64_t j = round_up(n, W); j < span; j += W) store(g + j, zero());
  }

  void write(const Head& head, const float* from, int64_t i, int which) const {
    T* to = dqkv_ + (((head.start + i) * 3 + which) * head.H + head.h) * head.D;
    for (int64_t d = 0; d < head.D; d += W) store(to + d, load(from + d), head.D - d);
  }

  const T* dout_;
  const T* qkv_;
  const T* out_;
  T* dqkv_;
  const Dropout& dropout_;
};

struct Batch {
  Sequences sequences;
  int64_t H, D;
  float scale;
  bool causal;

  Head head(int64_t task) const {
    const int64_t b = task / H, L = sequences.length(b);
    return {sequences.cu[b],  L,     D,     H, b, task % H, round_up(L, kNR),
            round_up(D, kNR), scale, causal};
  }
};

}  // namespace

void attention_fwd(int dtype, const void* qkv, const int32_t* cu_seqlens, void* out, float* lse,
                   int64_t T, int64_t B, int64_t H, int64_t D, float scale, bool causal,
                   const int64_t* seed, uint32_t site, uint32_t threshold, float keep,
                   int threads) {
  const Dropout dropout = {seed, site, threshold, keep, nullptr};
  const Batch batch = {{cu_seqlens, B}, H, D, scale, causal};
  const Sequences& sequences = batch.sequences;
  const int64_t chunks = sequences.chunks(H, threads);
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    auto* y = static_cast<E*>(out);
    const Forward<E> forward(static_cast<const E*>(qkv), y, lse, T, dropout);
    const int64_t room = sequences.most([&](int64_t L) { return Forward<E>::room(L, D); });
    each_task(B * H * chunks, sequences.pairs() * H * D, room, threads, [&](int64_t i, float* at) {
      const Head head = batch.head(i / chunks);
      const Span queries = part_of(head.L, i % chunks, chunks);
      if (queries.from < queries.to) forward.run(head, queries.from, queries.to, at);
    });
    const int64_t end = cu_seqlens[B];
    zeros(y + end * H * D, (T - end) * H * D);
    for (int64_t h = 0; lse && h < H; ++h) zeros(lse + h * T + end, T - end);
  });
}

void attention_bwd(int dtype, const void* dout, const void* qkv, const void* out,
                   const int32_t* cu_seqlens, void* dqkv, int64_t T, int64_t B, int64_t H,
                   int64_t D, float scale, bool causal, const int64_t* seed, uint32_t site,
                   uint32_t threshold, float keep, int threads) {
  const Dropout dropout = {seed, site, threshold, keep, nullptr};
  const Batch batch = {{cu_seqlens, B}, H, D, scale, causal};
  const Sequences& sequences = batch.sequences;
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    auto* d = static_cast<E*>(dqkv);
    const Backward<E> backward(static_cast<const E*>(dout), static_cast<const E*>(qkv),
                               static_cast<const E*>(out), d, dropout);
    const int64_t room = sequences.most([&](int64_t L) { return Backward<E>::room(L, D); });
    each_task(B * H, sequences.pairs() * H * D, room, threads, [&](int64_t i, float* at) {
      const Head head = batch.head(i);
      if (head.L > 0) backward.run(head, at);
    });
    const int64_t end = cu_seqlens[B];
    zeros(d + end * 3 * H * D, (T - end) * 3 * H * D);
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
