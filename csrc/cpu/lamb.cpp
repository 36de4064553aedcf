// LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2).
//
//   m <- m + (1 - beta1) (g - m),   v <- v + (1 - beta2) (g^2 - v)
//   update = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p
//   p <- p - rate * update
//
// The update is computed in both passes: writing and reading it would cost more than its division.
#include "lamb.h"

#include "scratch.h"
#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// Elements of a task, a multiple of kLanes. The squares of each are summed by themselves, then the
// sums are added in order.
constexpr int64_t kChunk = 1 << 15;
// elements per thread: fewer do not pay for starting one
constexpr int64_t kGrain = 1 << 15;
// Element i is added in lane i % kLanes. Squares of fp32 are exact in fp64, so that the sums do not
// depend on the width of a vector, nor on multiply-adds.
constexpr int64_t kLanes = 16;
constexpr int kVectors = kLanes / W;

struct Tensor {
  float* p;
  const float* g;
  float* m;
  float* v;
  int64_t size;
};

Tensor row_of(const int64_t* tensors, int64_t i) {
  const int64_t* row = tensors + 5 * i;
  return {reinterpret_cast<float*>(row[0]), reinterpret_cast<const float*>(row[1]),
          reinterpret_cast<float*>(row[2]), reinterpret_cast<float*>(row[3]), row[4]};
}

struct Update {
  float correct_m, correct_v, eps, decay;

  F operator()(F p, F m, F v) const {
    return m * correct_m / (sqrt(v) * correct_v + eps) + p * decay;
  }
};

Update update_of(const double* corrections, int64_t i, double eps, double decay) {
  return {static_cast<float>(corrections[2 * i]), static_cast<float>(corrections[2 * i + 1]),
          static_cast<float>(eps), static_cast<float>(decay)};
}

struct Squares {
  E of[2 * kVectors] = {};

  void add(F x, int k) {
    E low, high;
    widen(x, low, high);
    of[2 * k] += low * low;
    of[2 * k + 1] += high * high;
  }
  double total() const {
    double sum = 0;
    for (const E& half : of)
      for (int lane = 0; lane < W / 2; ++lane) sum += half[lane];
    return sum;
  }
};

// Calls body(at, n, k) for vectors of n elements from `at` on, which are added in vector k of
// the lanes.
template <typename Body>
inline void vectors(int64_t start, int64_t end, const Body& body) {
  int64_t at = start;
  for (; at + kLanes <= end; at += kLanes)
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) body(at + k * W, int64_t{W}, k);
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k)
    if (at + k * W < end) body(at + k * W, imin(W, end - at - k * W), k);
}

void moments_chunk(const Tensor& t, int64_t start, int64_t end, float toward_g, float toward_square,
                   const Update& update, double* squares) {
  Squares of_p, of_update;
  vectors(start, end, [&](int64_t at, int64_t n, int k) {
    const F p = load(t.p + at, n), g = load(t.g + at, n);
    F m = load(t.m + at, n), v = load(t.v + at, n);
    m += (g - m) * toward_g;
    v += (g * g - v) * toward_square;
    store(t.m + at, m, n);
    store(t.v + at, v, n);
    const F u = update(p, m, v);
    of_p.add(p, k);
    // 0 / 0 behind the end where eps is 0
    of_update.add(n >= W ? u : below(n) ? u : zero(), k);
  });
  squares[0] = of_p.total();
  squares[1] = of_update.total();
}

void update_chunk(const Tensor& t, int64_t start, int64_t end, float rate, const Update& update) {
  vectors(start, end, [&](int64_t at, int64_t n, int) {
    const F p = load(t.p + at, n);
    store(t.p + at, p - update(p, load(t.m + at, n), load(t.v + at, n)) * rate, n);
  });
}

int64_t chunks_of(const int64_t* tensors, int64_t i) {
  return ceil_div(tensors[5 * i + 4], kChunk);
}

// Calls chunk(i, start, end, number) for every chunk of all tensors; the chunks are numbered in
// order and shared out evenly.
template <typename Chunk>
inline void each_chunk(const int64_t* tensors, int64_t n, int threads, const Chunk& chunk) {
  int64_t elements = 0, chunks = 0;
  for (int64_t i = 0; i < n; ++i) elements += tensors[5 * i + 4], chunks += chunks_of(tensors, i);
  const int team = team_size(elements, kGrain, chunks, threads);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int part = 0; part < team; ++part) {
    const int64_t from = part * chunks / team, to = (part + 1) * chunks / team;
    for (int64_t i = 0, number = 0; i < n && number < to; ++i) {
      const int64_t size = tensors[5 * i + 4];
      for (int64_t start = 0; start < size; start += kChunk, ++number)
        if (from <= number && number < to) chunk(i, start, imin(start + kChunk, size), number);
    }
  }
}

}  // namespace

void lamb_moments(const int64_t* tensors, const double* corrections, double* squares, int64_t n,
                  double beta1, double beta2, double eps, double weight_decay, int threads) {
  const float toward_g = static_cast<float>(1 - beta1);
  const float toward_square = static_cast<float>(1 - beta2);
  int64_t chunks = 0;
  for (int64_t i = 0; i < n; ++i) chunks += chunks_of(tensors, i);
  // two sums in fp64 for each chunk
  const Scratch room(1, 4 * chunks);
  double* sums = reinterpret_cast<double*>(room[0]);
  each_chunk(tensors, n, threads, [&](int64_t i, int64_t start, int64_t end, int64_t number) {
    moments_chunk(row_of(tensors, i), start, end, toward_g, toward_square,
                  update_of(corrections, i, eps, weight_decay), sums + 2 * number);
  });
  for (int64_t i = 0; i < n; ++i) {
    double p = 0, update = 0;
    for (int64_t left = chunks_of(tensors, i); left > 0; --left, sums += 2)
      p += sums[0], update += sums[1];
    squares[2 * i] = p;
    squares[2 * i + 1] = update;
  }
}

void lamb_update(const int64_t* tensors, const double* corrections, const double* rates, int64_t n,
                 double eps, double weight_decay, int threads) {
  each_chunk(tensors, n, threads, [&](int64_t i, int64_t start, int64_t end, int64_t) {
    update_chunk(row_of(tensors, i), start, end, static_cast<float>(rates[i]),
                 update_of(corrections, i, eps, weight_decay));
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
