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
constexpr int64_t kNormRows = 16;

// the lanes below n, as a factor
inline F lanes_below(int64_t n) {
  return n >= W ? set1(1.0f) : (iota() < set1(static_cast<uint32_t>(n)) ? set1(1.0f) : zero());
}

// y = (z - mean) rstd weight + bias for z (C) of this total; weight and bias may be null (1 and 0)
template <typename T>
inline void norm_row(const float* z, float total, const float* weight, const float* bias, int64_t C,
                     float eps, T* y, float* mean, float* rstd) {
  const float m = total / static_cast<float>(C);
  // centred second pass: E[z^2] - mean^2 cancels
  F squares = zero();
  for (int64_t c = 0; c < C; c += W) {
    const F centred = (load(z + c, C - c) - m) * lanes_below(C - c);
    squares += centred * centred;
  }
  const float r = 1.0f / sqrt1(sum(squares) / static_cast<float>(C) + eps);
  for (int64_t c = 0; c < C; c += W) {
    const int64_t n = C - c;
    F value = (load(z + c, n) - m) * r;
    if (weight) value *= load(weight + c, n);
    if (bias) value += load(bias + c, n);
    store(y + c, value, n);
  }
  *mean = m;
  *rstd = r;
}

// what dz of a row needs: its statistics, mean(g) and mean(g xhat)
struct NormRow {
  float mean, rstd, g, gx;
};

// Adds the row's dy xhat to dweight and dy to dbias, and returns the sums behind dz. A null weight
// stands for ones.
template <typename T, typename Z>
inline NormRow norm_bwd_sums(const T* dy, const Z* z, const float* weight, float mean, float rstd,
                             int64_t C, float* dweight, float* dbias) {
  F total = zero(), product = zero();
  for (int64_t c = 0; c < C; c += W) {
    const int64_t n = C - c;
    const F d = load(dy + c, n);
    const F xhat = (load(z + c, n) - mean) * rstd;
    const F g = weight ? d * load(weight + c, n) : d;
    store(dweight + c, load(dweight + c) + d * xhat);
    store(dbias + c, load(dbias + c) + d);
    total += g;
    product += g * xhat;
  }
  const float count = static_cast<float>(C);
  return {mean, rstd, sum(total) / count, sum(product) / count};
}

// dz of up to W columns: rstd (g - mean(g) - xhat mean(g xhat))
template <typename T, typename Z>
inline F norm_bwd_dz(const T* dy, const Z* z, const float* weight, int64_t n, const NormRow& row) {
  const F d = load(dy, n);
  const F g = weight ? d * load(weight, n) : d;
  const F xhat = (load(z, n) - row.mean) * row.rstd;
  return (g - row.g - xhat * row.gx) * row.rstd;
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
