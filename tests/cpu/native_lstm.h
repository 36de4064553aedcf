// For native_check.cpp: lstm against plain loops in double.
#pragma once

#include "native_check.h"

namespace {

struct Recurrence {
  const std::vector<int32_t> cu, order;
  i64 T, D, H;
  Array gates, h0, c0, dy, dcells;
  std::vector<Array> weights;
  // results in the layouts of the kernel
  Doubles y, cells, dgates, dweights, dh0, dc0;

  i64 batch() const { return static_cast<i64>(cu.size()) - 1; }
  i64 unit(i64 row, i64 d, i64 u) const { return (row * D + d) * H + u; }
  i64 gate(i64 row, i64 d, i64 k, i64 u) const { return ((row * D + d) * 4 + k) * H + u; }
  double weight(i64 d, i64 k, i64 u, i64 v) const { return weights[d][(k * H + u) * H + v]; }

  // one direction of one sequence, forward and backward
  void walk(i64 d, i64 b) {
    const i64 L = cu[b + 1] - cu[b], first = (d * batch() + b) * H;
    const auto row = [&](i64 t) { return d ? cu[b + 1] - 1 - t : cu[b] + t; };
    const auto h_before = [&](i64 t, i64 u) {
      return t ? y[unit(row(t - 1), d, u)] : h0[first + u];
    };
    const auto c_before = [&](i64 t, i64 u) {
      return t ? cells[unit(row(t - 1), d, u)] : c0[first + u];
    };
    Doubles active(L * 4 * H), dh(H), dc(H);
    for (i64 t = 0; t < L; ++t)
      for (i64 u = 0; u < H; ++u) {
        double* a = &active[(t * H + u) * 4];
        for (i64 k = 0; k < 4; ++k) {
          a[k] = gates[gate(row(t), d, k, u)];
          for (i64 v = 0; v < H; ++v) a[k] += weight(d, k, u, v) * h_before(t, v);
          a[k] = k == 2 ? std::tanh(a[k]) : 1 / (1 + std::exp(-a[k]));
        }
        const double c = a[1] * c_before(t, u) + a[0] * a[2];
        cells[unit(row(t), d, u)] = c, y[unit(row(t), d, u)] = a[3] * std::tanh(c);
      }
    for (i64 t = L - 1; t >= 0; --t) {
      Doubles before(H);
      for (i64 u = 0; u < H; ++u) {
        const i64 at = unit(row(t), d, u);
        const double *a = &active[(t * H + u) * 4], out = std::tanh(cells[at]);
        const double into = dh[u] + dy[at];
        const double inner = dc[u] + dcells[at] + into * a[3] * (1 - out * out);
        const double dz[] = {inner * a[2] * a[0] * (1 - a[0]),
                             inner * c_before(t, u) * a[1] * (1 - a[1]),
                             inner * a[0] * (1 - a[2] * a[2]), into * out * a[3] * (1 - a[3])};
        dc[u] = inner * a[1];
        for (i64 k = 0; k < 4; ++k) {
          dgates[gate(row(t), d, k, u)] = dz[k];
          for (i64 v = 0; v < H; ++v) {
            dweights[((d * 4 + k) * H + u) * H + v] += dz[k] * h_before(t, v);
            before[v] += dz[k] * weight(d, k, u, v);
          }
        }
      }
      dh = before;
    }
    for (i64 u = 0; u < H; ++u) dh0[first + u] = dh[u], dc0[first + u] = dc[u];
  }
};

void check_lstm(int t, i64 D, i64 H) {
  const i64 B = 8, T = 53, N = T * D * H, S = D * B * H, K = D * 4 * H * H;
  Recurrence r = {{0, 13, 14, 14, 23, 23 + 6, 37, 46, 51},
                  {0, 3, 6, 5, 4, 7, 1, 2},
                  T,
                  D,
                  H,
                  drawn(t, 4 * N),
                  drawn(kFloat32, S),
                  drawn(kFloat32, S),
                  drawn(t, N),
                  drawn(kFloat32, N),
                  {},
                  Doubles(N),
                  Doubles(N),
                  Doubles(4 * N),
                  Doubles(K),
                  Doubles(S),
                  Doubles(S)};
  for (i64 d = 0; d < D; ++d) r.weights.push_back(drawn(t, 4 * H * H, 1 / std::sqrt(H)));
  // the kernels must not read rows that belong to no sequence
  for (i64 i = r.cu[B] * D * H; i < N; ++i) {
    r.dy.set(i, NAN), r.dcells.set(i, NAN);
    for (i64 k = 0; k < 4; ++k) r.gates.set(4 * i + k, NAN);
  }
  Array y(t, N), cells(kFloat32, N), activated(t, 4 * N), dgates(t, 4 * N), dweights(t, K);
  Array dh0(kFloat32, S), dc0(kFloat32, S);
  void* const w[] = {r.weights[0].data(), r.weights[D - 1].data()};
  FASTBERT_ENTRY(lstm_fwd)
  (t, t, r.gates.data(), w[0], w[1], r.cu.data(), r.order.data(), r.h0.floats(), r.c0.floats(),
   y.data(), cells.floats(), activated.data(), T, B, H, D, kThreads);
  FASTBERT_ENTRY(lstm_bwd)
  (t, t, r.dy.data(), r.dcells.floats(), activated.data(), y.data(), cells.floats(), w[0], w[1],
   r.cu.data(), r.order.data(), r.h0.floats(), r.c0.floats(), dgates.data(), dweights.data(),
   dh0.floats(), dc0.floats(), T, B, H, D, kThreads);
  for (i64 d = 0; d < D; ++d)
    for (i64 b = 0; b < B; ++b) r.walk(d, b);
  check("lstm_fwd", t, y, r.y);
  // what a dtype loses between the steps shows in results of fp32 too: the bound is the inputs'
  check("lstm_fwd cells", t, cells, r.cells);
  check("lstm_bwd", t, dgates, r.dgates), check("lstm_bwd dweights", t, dweights, r.dweights);
  check("lstm_bwd dh0", t, dh0, r.dh0), check("lstm_bwd dc0", t, dc0, r.dc0);
}

}  // namespace
