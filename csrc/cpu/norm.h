// What layer_norm, dropout_add_layer_norm and embed share: a row's statistics and output, and a
// backward whose sums over rows are taken in fixed partitions, whatever the thread count.
#pragma once

#include "scratch.h"
#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {

// below this many elements a second thread costs more than it computes
constexpr int64_t kNormGrain = 16384;
// dweight and dbias are summed in at most this many partitions of rows
constexpr int64_t kNormPartitions = 64;
constexpr int64_t kNormRows = 32;

// calls body(T{}) for the element type of this number
template <typename Body>
inline void with_type(int dtype, const Body& body) {
  if (dtype == kFloat32)
    body(float{});
  else
    body(bf16{});
}

// Calls body(c, n, k) for the columns [c, c + n) of each vector: whole vectors with n = W, where
// the branches on n fold away, then the tail. k counts 0 .. 3, for sums in four chains of
// additions.
template <typename Body>
inline void columns(int64_t C, const Body& body) {
  int64_t c = 0;
  for (; c + 4 * W <= C; c += 4 * W) {
    body(c, int64_t{W}, 0);
    body(c + W, int64_t{W}, 1);
    body(c + 2 * W, int64_t{W}, 2);
    body(c + 3 * W, int64_t{W}, 3);
  }
  for (; c + W <= C; c += W) body(c, int64_t{W}, 0);
  if (c < C) body(c, C - c, 0);
}

// four chains of additions
struct Chains {
  F of[4] = {};

  float total() const { return sum((of[0] + of[1]) + (of[2] + of[3])); }
};

// the lanes below n, as a factor
inline F lanes_below(int64_t n) {
  return n >= W ? set1(1.0f) : (iota() < set1(static_cast<uint32_t>(n)) ? set1(1.0f) : zero());
}

// put(c, n, y) with y = (z - mean) rstd weight + bias for z (C) of this total; weight and bias may
// be null (1 and 0)
template <typename Z, typename Put>
inline void norm_row(const Z* z, float total, const float* weight, const float* bias, int64_t C,
                     float eps, float* mean, float* rstd, const Put& put) {
  const float m = total / static_cast<float>(C);
  // centred second pass: E[z^2] - mean^2 cancels
  Chains squares;
  columns(C, [&](int64_t c, int64_t n, int k) {
    const F centred = (load(z + c, n) - m) * lanes_below(n);
    squares.of[k] += centred * centred;
  });
  const float r = 1.0f / sqrt1(squares.total() / static_cast<float>(C) + eps);
  columns(C, [&](int64_t c, int64_t n, int) {
    F value = (load(z + c, n) - m) * r;
    if (weight) value *= load(weight + c, n);
    if (bias) value += load(bias + c, n);
    put(c, n, value);
  });
  *mean = m;
  *rstd = r;
}

// One row's backward: adds dy xhat to dweight and dy to dbias, which have room for whole vectors,
// then calls put(c, n, dz) with dz = rstd (g - mean(g) - xhat mean(g xhat)), g = dy weight. A null
// weight stands for ones.
template <typename D, typename Z, typename Put>
inline void norm_bwd_row(const D* dy, const Z* z, const float* weight, float mean, float rstd,
                         int64_t C, float* dweight, float* dbias, const Put& put) {
  Chains total, product;
  columns(C, [&](int64_t c, int64_t n, int k) {
    const F d = load(dy + c, n);
    const F xhat = (load(z + c, n) - mean) * rstd;
    const F g = weight ? d * load(weight + c, n) : d;
    store(dweight + c, load(dweight + c) + d * xhat);
    store(dbias + c, load(dbias + c) + d);
    total.of[k] += g;
    product.of[k] += g * xhat;
  });
  const float mean_g = total.total() / static_cast<float>(C);
  const float mean_gx = product.total() / static_cast<float>(C);
  columns(C, [&](int64_t c, int64_t n, int) {
    const F d = load(dy + c, n);
    const F g = weight ? d * load(weight + c, n) : d;
    const F xhat = (load(z + c, n) - mean) * rstd;
    put(c, n, (g - mean_g - xhat * mean_gx) * rstd);
  });
}

// Runs row(i, dweight, dbias, room) for all N rows, in partitions with sums and `room` floats of
// their own, and adds the partitions' sums in order to dweight and dbias (C).
template <typename Row>
inline void norm_partitions(int64_t N, int64_t C, float* dweight, float* dbias, int64_t room,
                            int threads, const Row& row) {
  const int64_t parts = imax(1, imin(kNormPartitions, ceil_div(N, kNormRows)));
  const int team = team_size(N * C, kNormGrain, parts, threads);
  const int64_t wide = round_up(C, 16);
  const Scratch partials(parts, 2 * wide + room);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t part = 0; part < parts; ++part) {
    float* sums = partials[part];
    for (int64_t c = 0; c < 2 * wide; c += W) store(sums + c, zero());
    for (int64_t i = part * N / parts; i < (part + 1) * N / parts; ++i)
      row(i, sums, sums + wide, sums + 2 * wide);
  }
  for (int64_t c = 0; c < C; c += W) {
    F w = zero(), b = zero();
    for (int64_t part = 0; part < parts; ++part) {
      w += load(partials[part] + c);
      b += load(partials[part] + wide + c);
    }
    store(dweight + c, w, C - c);
    store(dbias + c, b, C - c);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
