// Attention inside packed sequences, for one (sequence, head) and one block of queries at a time.
// The block's scores against the keys it sees stay in cache: the softmax is exact in two passes,
// and memory grows with the length L, not L^2. Keys outside of a window are not read, so that time
// grows with L times the window. Products run on gemm.h's inner loop.
//
//   S = scale Q K^T + bias,  P = softmax(S),  O = (P M) V,  M is dropout's factor: 0 or 1 / (1 - p)
//   dV = (P M)^T dO,  delta = rowsum(dO O),  dS = P (M dO V^T - delta)
//   dQ = scale dS K,  dK = scale dS^T Q,  dbias[j - i] = sum of dS(i, j)
//
// Backward computes the softmax again from Q and K: exp(S - lse) would have the rounding error of
// lse. Rotary positions are applied where q and k are read, and taken back where dQ and dK are
// written.
#include "attention.h"

#include "attend.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

template <typename T>
class Forward {
 public:
  Forward(const T* qkv, T* out, float* lse, int64_t T_, const Dropout& dropout)
      : qkv_(qkv), out_(out), lse_(lse), tokens_(T_), dropout_(dropout) {}

  static int64_t room(const Form& form, int64_t L) {
    const int64_t D = form.D, ld = form.ld(L), rows = form.block(L), depth = form.depth();
    const int64_t rotated = form.rotary ? (L + rows) * D : 0;
    return round_up(L, kNR) * D + depth * L + rows * (D + ld + depth) + rotated +
           Factors::room(ld) + 8 * W;
  }

  // queries [from, to) of a head
  void run(const Head& head, int64_t from, int64_t to, float* room) const {
    const Form& form = head.form;
    const int64_t L = head.L, D = form.D, depth = form.depth();
    const int64_t ld = form.ld(L), most = form.block(L);
    const Span all = head.keys(from, to - from);
    const int64_t count = all.to - all.from, panels = ceil_div(count, kNR);
    float* keys = room;
    float* values = keys + panels * kNR * D;
    float* scores = values + depth * count;
    float* result = scores + most * ld;
    float* factors = result + most * depth;
    float* queries = factors + Factors::room(ld);
    float* rotated = queries + most * D + 4 * W;
    head.with_rows(qkv_, 1, all.from, count, rotated, [&](const auto& of) {
      of(false).template pack<false>(0, panels, kNR, 0, D, keys);
    });
    head.operand(qkv_, 2, all.from, count, true)
        .template pack<false>(0, depth / kNR, kNR, 0, count, values);
    for (int64_t i = from; i < to; i += most) {
      const int64_t rows = imin(most, to - i);
      const Span span = head.keys(i, rows);
      const int64_t n = span.to - span.from, first = span.from - all.from;
      head.with_rows(qkv_, 0, i, rows, rotated, [&](const auto& of) {
        of(false).template pack<false>(0, ceil_div(rows, kMR), kMR, 0, D, queries);
      });
      product_packed(rows, round_up(n, kNR), D, queries, keys + first * D, scores, ld, D);
      for (int64_t r = 0; r < rows; ++r)
        weights(head, i + r, span, factors, scores + r * ld - span.from);
      // V is packed in panels of `count` steps, of which n are used
      product(rows, depth, n, scores, Rows{ld}, values + first * kNR, count, result, depth, false);
      for (int64_t r = 0; r < rows; ++r) {
        T* o = out_ + ((head.start + i + r) * form.H + head.h) * D;
        for (int64_t d = 0; d < D; d += W) store(o + d, load(result + r * depth + d), D - d);
      }
    }
  }

 private:
  // Query i's scores become weights with dropout; the log-sum-exp is stored. Key j is at s[j].
  void weights(const Head& head, int64_t i, Span span, float* room, float* s) const {
    const Span seen = head.seen(i);
    const Softmax soft = softmax_row(s, seen, span, head.form.scale, head.bias(i));
    const float inverse = 1.0f / soft.sum;
    if (lse_) lse_[head.h * tokens_ + head.start + i] = soft.max + __builtin_logf(soft.sum);
    const Factors factors(dropout_, head, i, seen, room);
    for (int64_t j = seen.from / W * W; j < seen.to; j += W) {
      const F p = load(s + j) * inverse;
      store(s + j, factors.drops ? dropped(p, factors[j]) : p);
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
  Backward(const T* dout, const T* qkv, const T* out, T* dqkv, float* dbias, int64_t T_,
           const Dropout& dropout)
      : dout_(dout),
        qkv_(qkv),
        out_(out),
        dqkv_(dqkv),
        dbias_(dbias),
        tokens_(T_),
        dropout_(dropout) {}

  static int64_t room(const Form& form, int64_t L) {
    const int64_t D = form.D, ld = form.ld(L), rows = form.block(L), depth = form.depth();
    const int64_t whole = round_up(L, kNR), rotated = form.rotary ? (L + rows) * D : 0;
    return 2 * whole * D + 3 * depth * whole + rows * (2 * D + 2 * ld + 3 * depth) + rotated +
           Factors::room(ld) + 16 * W;
  }

  // the query heads from `head` on that read its key
  void run(const Head& head, float* room) const {
    const Form& form = head.form;
    const int64_t L = head.L, D = form.D, depth = form.depth(), whole = round_up(L, kNR);
    const int64_t ld = form.ld(L), most = form.block(L);
    Room at = {};
    float* next = room;
    const auto take = [&](int64_t floats) { return (next += floats) - floats; };
    at.keys = take(whole * D);
    at.values = take(whole * D);
    at.keys_across = take(depth * whole);
    at.dk = take(depth * whole);
    at.dv = take(depth * whole);
    at.scores = take(most * ld);
    at.grads = take(most * ld);
    at.result = take(most * depth);
    at.queries_across = take(most * depth);
    at.dout_across = take(most * depth);
    at.factors = take(Factors::room(ld));
    at.queries = take(most * D + 4 * W);
    at.dout = take(most * D + 4 * W);
    at.rotated = take(0);
    head.with_rows(qkv_, 1, 0, L, at.rotated, [&](const auto& rows) {
      rows(false).template pack<false>(0, whole / kNR, kNR, 0, D, at.keys);
      rows(true).template pack<false>(0, depth / kNR, kNR, 0, L, at.keys_across);
    });
    head.operand(qkv_, 2, 0, L, false).template pack<false>(0, whole / kNR, kNR, 0, D, at.values);
    for (int64_t k = 0; k < depth * L; k += W) store(at.dk + k, zero()), store(at.dv + k, zero());
    for (int64_t q = 0; q < form.H / form.kv_heads; ++q) {
      const Head query = {form, head.start, L, head.b, head.h + q};
      for (int64_t i = 0; i < L; i += most) block(query, i, imin(most, L - i), at);
    }
    for (int64_t j = 0; j < L; ++j) {
      write(head, at.dk + j * depth, j, 1);
      write(head, at.dv + j * depth, j, 2);
    }
  }

 private:
  struct Room {
    float *keys, *values, *keys_across, *dk, *dv, *scores, *grads, *result;
    float *queries, *dout, *queries_across, *dout_across, *factors, *rotated;
  };

  // `rows` queries from i on
  void block(const Head& head, int64_t i, int64_t rows, const Room& at) const {
    const Form& form = head.form;
    const int64_t D = form.D, depth = form.depth(), ld = form.ld(head.L);
    const int64_t panels = ceil_div(rows, kMR);
    const Span span = head.keys(i, rows);
    const int64_t n = span.to - span.from, first = span.from;
    head.with_rows(qkv_, 0, i, rows, at.rotated, [&](const auto& queries) {
      queries(false).template pack<false>(0, panels, kMR, 0, D, at.queries);
      queries(true).template pack<false>(0, depth / kNR, kNR, 0, rows, at.queries_across);
    });
    head.rows_of(dout_, i, rows, false).template pack<false>(0, panels, kMR, 0, D, at.dout);
    head.rows_of(dout_, i, rows, true)
        .template pack<false>(0, depth / kNR, kNR, 0, rows, at.dout_across);
    const int64_t columns = round_up(n, kNR);
    product_packed(rows, columns, D, at.queries, at.keys + first * D, at.scores, ld, D);
    product_packed(rows, columns, D, at.dout, at.values + first * D, at.grads, ld, D);
    for (int64_t r = 0; r < rows; ++r)
      row(head, i + r, span, at.factors, at.scores + r * ld - first, at.grads + r * ld - first);
    product(rows, depth, n, at.grads, Rows{ld}, at.keys_across + first * kNR, head.L, at.result,
            depth, false);
    for (int64_t r = 0; r < rows; ++r) write(head, at.result + r * depth, i + r, 0);
    product(n, depth, rows, at.scores, Columns{ld}, at.dout_across, rows, at.dv + first * depth,
            depth, true);
    product(n, depth, rows, at.grads, Columns{ld}, at.queries_across, rows, at.dk + first * depth,
            depth, true);
  }

  // in s scores become P M, in g dO V^T becomes scale dS; key j is at s[j] and g[j]
  void row(const Head& head, int64_t i, Span span, float* room, float* s, float* g) const {
    const int64_t D = head.form.D;
    const Span seen = head.seen(i);
    const Softmax soft = softmax_row(s, seen, span, head.form.scale, head.bias(i));
    const float inverse = 1.0f / soft.sum, scale = head.form.scale;
    const int64_t place = ((head.start + i) * head.form.H + head.h) * D;
    F sums = zero();
    for (int64_t d = 0; d < D; d += W)
      sums += load(dout_ + place + d, D - d) * load(out_ + place + d, D - d);
    const float delta = sum(sums);
    const Factors factors(dropout_, head, i, seen, room);
    // the bias's gradient for query i's key 0
    float* db = dbias_ ? dbias_ + 2 * (head.h * tokens_ + head.start) + head.L - 1 - i : nullptr;
    const int64_t begin = seen.from / W * W;
    for (int64_t j = begin; j < seen.to; j += W) {
      const F p = load(s + j) * inverse;
      const F factor = factors.drops ? factors[j] : set1(1.0f);
      const F ds = inside(p * (load(g + j) * factor - delta), j, seen, zero());
      store(s + j, factors.drops ? dropped(p, factor) : p);
      store(g + j, ds * scale);
      if (db) store(db + j, load(db + j, seen.to - j) + ds, seen.to - j);
    }
    for (int64_t j = span.from; j < begin; j += W) store(g + j, zero());
    for (int64_t j = round_up(seen.to, W); j < span.to; j += W) store(g + j, zero());
  }

  // token i's gradient of q, k or v
  void write(const Head& head, const float* from, int64_t i, int which) const {
    const int64_t D = head.form.D;
    float turned[kMostD];
    if (which < 2 && head.form.rotary) {
      head.form.rotate(from, i, true, turned);
      from = turned;
    }
    T* to = head.row(dqkv_, which, i);
    for (int64_t d = 0; d < D; d += W) store(to + d, load(from + d), D - d);
  }

  const T* dout_;
  const T* qkv_;
  const T* out_;
  T* dqkv_;
  float* dbias_;  // (H, 2 T): of sequence b, its 2 L - 1 sums begin at 2 cu_seqlens[b]; or null
  int64_t tokens_;
  const Dropout& dropout_;
};

// The bias's gradient, from those of the sequences in turn.
void add_up(const Form& form, const Sequences& sequences, const float* parts, int64_t T, float* db,
            int threads) {
  const int64_t width = 2 * form.positions - 1;
  const int team = team_size(form.H * 2 * T, kHeadGrain, form.H, threads);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t h = 0; h < form.H; ++h) {
    float* to = db + h * width;
    zeros(to, width);
    for (int64_t b = 0; b < sequences.B; ++b) {
      const int64_t L = sequences.length(b), n = 2 * L - 1;
      const float* from = parts + 2 * (h * T + sequences.cu[b]);
      float* at = to + form.positions - L;
      for (int64_t k = 0; k < n; k += W)
        store(at + k, load(at + k, n - k) + load(from + k, n - k), n - k);
    }
  }
}

}  // namespace

void attention_fwd(int dtype, const void* qkv, const int32_t* cu_seqlens, void* out, float* lse,
                   int64_t T, int64_t B, int64_t H, int64_t kv_heads, int64_t D, float scale,
                   int64_t left, int64_t right, const float* rotary, int64_t half, bool pairs,
                   const float* bias, int64_t positions, const int64_t* seed, uint32_t site,
                   uint32_t threshold, float keep, int threads) {
  const Dropout dropout = {seed, site, threshold, keep, nullptr};
  const Form form = {H, kv_heads, D, scale, left, right, rotary, half, pairs, bias, positions};
  const Sequences sequences = {cu_seqlens, B};
  const int64_t chunks = sequences.chunks(H, threads);
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    auto* y = static_cast<E*>(out);
    const Forward<E> forward(static_cast<const E*>(qkv), y, lse, T, dropout);
    const int64_t room = sequences.most([&](int64_t L) { return Forward<E>::room(form, L); });
    each_task(B * H * chunks, sequences.pairs() * H * D, room, threads, [&](int64_t i, float* at) {
      const int64_t b = i / chunks / H, L = sequences.length(b);
      const Head head = {form, cu_seqlens[b], L, b, i / chunks % H};
      const Span queries = part_of(L, i % chunks, chunks);
      if (queries.from < queries.to) forward.run(head, queries.from, queries.to, at);
    });
    const int64_t end = cu_seqlens[B];
    zeros(y + end * H * D, (T - end) * H * D);
    for (int64_t h = 0; lse && h < H; ++h) zeros(lse + h * T + end, T - end);
  });
}

void attention_bwd(int dtype, const void* dout, const void* qkv, const void* out,
                   const int32_t* cu_seqlens, void* dqkv, float* dbias, float* dbias_parts,
                   int64_t T, int64_t B, int64_t H, int64_t kv_heads, int64_t D, float scale,
                   int64_t left, int64_t right, const float* rotary, int64_t half, bool pairs,
                   const float* bias, int64_t positions, const int64_t* seed, uint32_t site,
                   uint32_t threshold, float keep, int threads) {
  const Dropout dropout = {seed, site, threshold, keep, nullptr};
  const Form form = {H, kv_heads, D, scale, left, right, rotary, half, pairs, bias, positions};
  const Sequences sequences = {cu_seqlens, B};
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    auto* d = static_cast<E*>(dqkv);
    const Backward<E> backward(static_cast<const E*>(dout), static_cast<const E*>(qkv),
                               static_cast<const E*>(out), d, dbias_parts, T, dropout);
    const int64_t room = sequences.most([&](int64_t L) { return Backward<E>::room(form, L); });
    each_task(B * kv_heads, sequences.pairs() * H * D, room, threads, [&](int64_t i, float* at) {
      const int64_t b = i / kv_heads, L = sequences.length(b);
      const Head head = {form, cu_seqlens[b], L, b, i % kv_heads * (H / kv_heads)};
      if (L > 0) backward.run(head, at);
    });
    const int64_t end = cu_seqlens[B];
    zeros(d + end * form.stride(), (T - end) * form.stride());
  });
  if (dbias) add_up(form, sequences, dbias_parts, T, dbias, threads);
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
