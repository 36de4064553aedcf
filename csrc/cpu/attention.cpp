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

#include "gemm.h"
#include "math.h"
#include "philox.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// floats of a block of scores
constexpr int64_t kScores = 32768;
// multiply-adds per thread: fewer do not pay for starting one
constexpr int64_t kAttentionGrain = int64_t{1} << 18;

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

// the number of queries in a block
int64_t block_rows(int64_t L) {
  const int64_t ld = round_up(imax(L, 1), kNR);
  return round_up(imin(L, imax(4 * kMR, kScores / ld)), kMR);
}

// c (rows, N) = or += a (rows, K) b. b is packed in panels of `steps` >= K steps; `a` lies as Rows
// or Columns.
template <typename Layout>
inline void product(int64_t rows, int64_t N, int64_t K, const float* a, Layout at, const float* b,
                    int64_t steps, float* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < N; j += kNR)
    for (int64_t r = 0; r < rows; r += kMR)
      micro(imin(kMR, rows - r), K, a + r * at.row, at, b + j * steps, c + r * ldc + j, ldc, add);
}

// c (rows, N) = a b with a packed as panels of kMR rows
inline void product_packed(int64_t rows, int64_t N, int64_t K, const float* a, const float* b,
                           float* c, int64_t ldc) {
  for (int64_t j = 0; j < N; j += kNR)
    for (int64_t r = 0; r < rows; r += kMR)
      micro_panel<kFloats, false>(kMR, K, a + r * K, b + j * K, c + r * ldc + j, ldc, false);
}

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
      product_packed(rows, round_up(span, kNR), D, queries, keys, scores, ld);
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
    product_packed(rows, round_up(span, kNR), D, at.queries, at.keys, at.scores, ld);
    product_packed(rows, round_up(span, kNR), D, at.dout, at.values, at.grads, ld);
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
  const int32_t* cu;
  int64_t B, H, D;
  float scale;
  bool causal;

  int64_t longest() const {
    int64_t most = 0;
    for (int64_t b = 0; b < B; ++b) most = imax(most, cu[b + 1] - cu[b]);
    return most;
  }
  int64_t work() const {
    int64_t total = 0;
    for (int64_t b = 0; b < B; ++b) {
      const int64_t L = cu[b + 1] - cu[b];
      total += L * L * H * D;
    }
    return total;
  }
  // floats that a thread needs for any of the sequences. A shorter one may need more than the
  // longest, because its blocks have more queries
  template <typename Pass>
  int64_t room() const {
    int64_t most = 0;
    for (int64_t b = 0; b < B; ++b) most = imax(most, Pass::room(cu[b + 1] - cu[b], D));
    return most;
  }
  Head head(int64_t task) const {
    const int64_t b = task / H, L = cu[b + 1] - cu[b];
    return {cu[b], L, D, H, b, task % H, round_up(L, kNR), round_up(D, kNR), scale, causal};
  }
};

// memset must not get a null pointer, not even for 0 bytes
template <typename E>
void zeros(E* p, int64_t count) {
  if (count > 0) __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(E));
}

}  // namespace

void attention_fwd(int dtype, const void* qkv, const int32_t* cu_seqlens, void* out, float* lse,
                   int64_t T, int64_t B, int64_t H, int64_t D, float scale, bool causal,
                   const int64_t* seed, uint32_t site, uint32_t threshold, float keep,
                   int threads) {
  const Dropout dropout = {seed, site, threshold, keep, nullptr};
  const Batch batch = {cu_seqlens, B, H, D, scale, causal};
  const int64_t L = batch.longest();
  // few heads: threads share a head's queries, and each packs the keys again
  const int64_t chunks = B * H < 2 * threads ? imin(threads, imax(1, L / (2 * kMR))) : 1;
  const int64_t tasks = B * H * chunks;
  const int team = team_size(batch.work(), kAttentionGrain, tasks, threads);
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    auto* y = static_cast<E*>(out);
    const Forward<E> forward(static_cast<const E*>(qkv), y, lse, T, dropout);
    const Scratch rooms(team, batch.template room<Forward<E>>());
    int64_t next = 0;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int thread = 0; thread < team; ++thread)
      for (;;) {
        const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (task >= tasks) break;
        const Head head = batch.head(task / chunks);
        const int64_t part = round_up(ceil_div(head.L, chunks), kMR), from = task % chunks * part;
        if (from < head.L) forward.run(head, from, imin(from + part, head.L), rooms[thread]);
      }
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
  const Batch batch = {cu_seqlens, B, H, D, scale, causal};
  const int team = team_size(batch.work(), kAttentionGrain, B * H, threads);
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    auto* d = static_cast<E*>(dqkv);
    const Backward<E> backward(static_cast<const E*>(dout), static_cast<const E*>(qkv),
                               static_cast<const E*>(out), d, dropout);
    const Scratch rooms(team, batch.template room<Backward<E>>());
    int64_t next = 0;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int thread = 0; thread < team; ++thread)
      for (;;) {
        const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (task >= B * H) break;
        const Head head = batch.head(task);
        if (head.L > 0) backward.run(head, rooms[thread]);
      }
    const int64_t end = cu_seqlens[B];
    zeros(d + end * 3 * H * D, (T - end) * 3 * H * D);
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
