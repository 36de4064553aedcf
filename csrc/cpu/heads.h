// Code of attention and relation_loss: the lengths of a packed batch's sequences, a queue that
// gives heads to threads, and matrix products of one head, which stay in cache.
#pragma once

#include "gemm.h"
#include "math.h"

namespace fastbert {
namespace FASTBERT_ISA {

// floats of a block of scores
constexpr int64_t kScores = 32768;
// multiply-adds per thread: fewer do not pay for starting one
constexpr int64_t kHeadGrain = int64_t{1} << 18;

// the number of queries in a block
inline int64_t block_rows(int64_t L) {
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
      micro(K, a + r * at.row, at, b + j * steps, c + r * ldc + j, ldc, add, imin(kMR, rows - r));
}

// c (rows, N) = a b with a packed as panels of kMR rows. Sums of more than `slice` products are
// taken in parts, which keeps their precision.
inline void product_packed(int64_t rows, int64_t N, int64_t K, const float* a, const float* b,
                           float* c, int64_t ldc, int64_t slice) {
  for (int64_t j = 0; j < N; j += kNR)
    for (int64_t r = 0; r < rows; r += kMR)
      for (int64_t k = 0; k < K; k += slice)
        micro_panel(imin(slice, K - k), a + r * K + k * kMR, b + j * K + k * kNR, c + r * ldc + j,
                    ldc, k > 0);
}

// rows [from, to) of a sequence
struct Span {
  int64_t from, to;
};

// the i-th of `chunks` parts of L rows, in whole panels
inline Span part_of(int64_t L, int64_t i, int64_t chunks) {
  const int64_t part = round_up(ceil_div(L, chunks), kMR);
  return {i * part, imin((i + 1) * part, L)};
}

struct Sequences {
  const int32_t* cu;  // (B + 1,)
  int64_t B;

  int64_t length(int64_t b) const { return cu[b + 1] - cu[b]; }
  // The largest of value(length), such as the floats that a thread needs for a sequence: a shorter
  // one may need more than the longest, because its blocks have more queries.
  template <typename Value>
  int64_t most(const Value& value) const {
    int64_t found = 0;
    for (int64_t b = 0; b < B; ++b) found = imax(found, value(length(b)));
    return found;
  }
  // pairs of a query and a key
  int64_t pairs() const {
    int64_t total = 0;
    for (int64_t b = 0; b < B; ++b) total += length(b) * length(b);
    return total;
  }
  // the parts of each head's queries: with few heads threads share them, and each packs the keys
  // again
  int64_t chunks(int64_t H, int threads) const {
    const int64_t longest = most([](int64_t L) { return L; });
    return B * H < 2 * threads ? imin(threads, imax(1, longest / (2 * kMR))) : 1;
  }
};

// body(task, room) for every task, each by one thread, which has `room` floats of its own; `work`
// is the multiply-adds of all
template <typename Body>
inline void each_task(int64_t tasks, int64_t work, int64_t room, int threads, const Body& body) {
  const int team = team_size(work, kHeadGrain, tasks, threads);
  const Scratch rooms(team, room);
  int64_t next = 0;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int thread = 0; thread < team; ++thread)
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) break;
      body(task, rooms[thread]);
    }
}

// memset must not get a null pointer, not even for 0 bytes
template <typename E>
inline void zeros(E* p, int64_t count) {
  if (count > 0) __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(E));
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
