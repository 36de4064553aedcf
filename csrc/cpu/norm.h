// Helpers of layer_norm, rms_norm, dropout_add_layer_norm and embed: a row's statistics and output,
// and a backward that sums over rows in fixed partitions, whatever the thread count.
#pragma once

#include <array>

#include "philox.h"
#include "scratch.h"
#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {

// elements per thread: fewer do not pay for starting one
constexpr int64_t kNormGrain = 16384;
// dweight and dbias are summed in at most this many partitions of rows
constexpr int64_t kNormPartitions = 64;
constexpr int64_t kNormRows = 32;
// this many columns are summed in fp32, and their sums in fp64: long rows stay exact
constexpr int64_t kNormColumns = 8192;

// Calls body(c, n, k) for the columns [c, c + n) of each vector, from `from` to C: first whole
// vectors with the constant n = W, then the tail. k is 0 .. 3, for sums in four chains of
// additions.
template <typename Body>
inline void columns(int64_t from, int64_t C, const Body& body) {
  int64_t c = from;
  for (; c + 4 * W <= C; c += 4 * W) {
    body(c, int64_t{W}, 0);
    body(c + W, int64_t{W}, 1);
    body(c + 2 * W, int64_t{W}, 2);
    body(c + 3 * W, int64_t{W}, 3);
  }
  for (; c + W <= C; c += W) body(c, int64_t{W}, 0);
  if (c < C) body(c, C - c, 0);
}

template <typename Body>
inline void columns(int64_t C, const Body& body) {
  columns(0, C, body);
}

// four chains of additions
struct Chains {
  F of[4] = {};

  float total() const { return sum((of[0] + of[1]) + (of[2] + of[3])); }
};

// One or two sums over all columns: body(c, n, k, sums) adds to sums[i].of[k]. Sums of kNormColumns
// columns are added in fp64.
template <int Sums, typename Body>
inline std::array<float, Sums> column_sums(int64_t C, const Body& body) {
  double totals[Sums] = {};
  for (int64_t from = 0; from < C; from += kNormColumns) {
    Chains sums[Sums];
    columns(from, imin(C, from + kNormColumns),
            [&](int64_t c, int64_t n, int k) { body(c, n, k, sums); });
    for (int i = 0; i < Sums; ++i) totals[i] += sums[i].total();
  }
  std::array<float, Sums> rounded;
  for (int i = 0; i < Sums; ++i) rounded[i] = static_cast<float>(totals[i]);
  return rounded;
}

// 1 in the lanes below n, else 0
inline F lanes_below(int64_t n) { return n >= W ? set1(1.0f) : (below(n) ? set1(1.0f) : zero()); }

// `put` is passed by value here and below and should capture by value: stores might change what a
// reference points to, so it would be read again for every vector.

// Calls put(c, n, y) with y = (z - mean) rstd weight + bias for z (C); weight and bias may be null
// (1 and 0).
template <typename Z, typename Put>
inline void scale_row(const Z* z, float mean, float rstd, const float* weight, const float* bias,
                      int64_t C, Put put) {
  columns(C, [&](int64_t c, int64_t n, int) {
    const F xhat = (load(z + c, n) - mean) * rstd;
    const F w = weight ? load(weight + c, n) : set1(1.0f);
    // one expression, so that it is one multiply-add: rounded once
    put(c, n, bias ? xhat * w + load(bias + c, n) : xhat * w);
  });
}

// 1 / sqrt(squares / C + eps)
inline float reciprocal_root(float squares, int64_t C, float eps) {
  return 1.0f / sqrt1(squares / static_cast<float>(C) + eps);
}

// The LayerNorm of a row z (C) with the sum `total`, by scale_row, which calls `put`.
template <typename Z, typename Put>
inline void norm_row(const Z* z, float total, const float* weight, const float* bias, int64_t C,
                     float eps, float* mean, float* rstd, Put put) {
  const float m = total / static_cast<float>(C);
  // a second pass over centred values: E[z^2] - mean^2 would cancel
  const auto [squares] = column_sums<1>(C, [&](int64_t c, int64_t n, int k, Chains* sums) {
    const F centred = (load(z + c, n) - m) * lanes_below(n);
    sums->of[k] += centred * centred;
  });
  const float r = reciprocal_root(squares, C, eps);
  scale_row(z, m, r, weight, bias, C, put);
  *mean = m;
  *rstd = r;
}

// Runs row(i, z, factors) for all N rows: z is room for the row in fp32, factors are its dropout
// factors, null without dropout.
template <typename Row>
inline void norm_rows(int64_t N, int64_t C, const Dropout& dropout, int threads, const Row& row) {
  const int team = team_size(N * C, kNormGrain, N, threads);
  const int64_t room = round_up(C, kPhiloxWords);
  const Scratch buffers(team, 2 * room);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int part = 0; part < team; ++part) {
    float* z = buffers[part];
    float* factors = dropout.enabled() ? z + room : nullptr;
    for (int64_t i = part * N / team; i < (part + 1) * N / team; ++i) {
      if (factors) row_factors(dropout, i, C, factors);
      row(i, z, factors);
    }
  }
}

// Backward of R rows, `stride` apart in dy and z. Adds dy xhat to dweight and dy to dbias, which
// have room for whole vectors, and calls put(r, c, n, dz). A null weight stands for ones. R = 2
// halves the traffic of the sums.
//
//   dz = rstd (g - mean(g) - xhat mean(g xhat)),  g = dy weight
//
// Centred = false is RMSNorm: without mean(g); mean and dbias are not read.
template <int R, bool Centred = true, typename D, typename Z, typename Put>
inline void norm_bwd_rows(const D* dy, const Z* z, int64_t stride, const float* weight,
                          const float* mean, const float* rstd, int64_t C, float* dweight,
                          float* dbias, Put put) {
  float mean_g[R], mean_gx[R], m[R], s[R];
  for (int r = 0; r < R; ++r) {
    m[r] = Centred ? mean[r] : 0.0f, s[r] = rstd[r];
    const auto [total, product] = column_sums<2>(C, [&](int64_t c, int64_t n, int k, Chains* sums) {
      const F d = load(dy + r * stride + c, n);
      const F g = weight ? d * load(weight + c, n) : d;
      if (Centred) sums[0].of[k] += g;
      sums[1].of[k] += g * ((load(z + r * stride + c, n) - m[r]) * s[r]);
    });
    mean_g[r] = total / static_cast<float>(C);
    mean_gx[r] = product / static_cast<float>(C);
  }
  columns(C, [&](int64_t c, int64_t n, int) {
    const F w = weight ? load(weight + c, n) : set1(1.0f);
    F dw = load(dweight + c), db = Centred ? load(dbias + c) : zero();
    for (int r = 0; r < R; ++r) {
      const F d = load(dy + r * stride + c, n);
      const F xhat = (load(z + r * stride + c, n) - m[r]) * s[r];
      dw += d * xhat;
      db += d;
      put(r, c, n, (d * w - mean_g[r] - xhat * mean_gx[r]) * s[r]);
    }
    store(dweight + c, dw);
    if (Centred) store(dbias + c, db);
  });
}

// a compile-time number that is passed as an argument
template <int R>
struct Count {
  static constexpr int value = R;
};

// Runs rows(i, Count<R>, dweight, dbias, room) for all N rows, R = 1 or 2 of them from i on. Each
// partition has its own sums and `room` floats. dweight and dbias (C) are the partitions' sums,
// added in order; dbias may be null.
template <typename Rows>
inline void norm_partitions(int64_t N, int64_t C, float* dweight, float* dbias, int64_t room,
                            int threads, const Rows& rows) {
  const int64_t parts = imax(1, imin(kNormPartitions, ceil_div(N, kNormRows)));
  const int team = team_size(N * C, kNormGrain, parts, threads);
  const int64_t wide = round_up(C, 16);
  const Scratch partials(parts, 2 * wide + room);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t part = 0; part < parts; ++part) {
    float* sums = partials[part];
    for (int64_t c = 0; c < 2 * wide; c += W) store(sums + c, zero());
    int64_t i = part * N / parts;
    const int64_t end = (part + 1) * N / parts;
    for (; i + 2 <= end; i += 2) rows(i, Count<2>{}, sums, sums + wide, sums + 2 * wide);
    if (i < end) rows(i, Count<1>{}, sums, sums + wide, sums + 2 * wide);
  }
  for (int64_t c = 0; c < C; c += W) {
    F w = zero(), b = zero();
    for (int64_t part = 0; part < parts; ++part) {
      w += load(partials[part] + c);
      b += load(partials[part] + wide + c);
    }
    store(dweight + c, w, C - c);
    if (dbias) store(dbias + c, b, C - c);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
