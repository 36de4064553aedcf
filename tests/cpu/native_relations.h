// For native_check.cpp: relation_loss against plain loops in double.
#pragma once

#include "native_check.h"

namespace {

struct Relations {
  const std::vector<int32_t> cu;
  i64 T, H;

  // one row's largest product, sum of exponentials and softmax
  void row(const Array& z, i64 D, i64 start, i64 L, i64 h, i64 i, Doubles& stats,
           Doubles& p) const {
    p.assign(L, 0.0);
    double top = -HUGE_VAL, total = 0;
    for (i64 j = 0; j < L; ++j) {
      for (i64 d = 0; d < D; ++d)
        p[j] += z[((start + i) * H + h) * D + d] * z[((start + j) * H + h) * D + d];
      top = std::fmax(top, p[j]);
    }
    for (double& e : p) total += e = std::exp((e - top) / std::sqrt(D));
    for (double& e : p) e /= total;
    stats[h * T + start + i] = top, stats[(H + h) * T + start + i] = total;
  }
};

void check_relation_loss(int t, i64 D, i64 Dt) {
  const Relations r = {{0, 45, 46, 46, 149}, 152, 3};
  const i64 B = static_cast<i64>(r.cu.size()) - 1, T = r.T, H = r.H;
  Array z = drawn(t, T * H * D), target = drawn(t, T * H * Dt);
  // the kernels must not read rows that belong to no sequence
  for (i64 i = r.cu[B] * H * D; i < z.size(); ++i) z.set(i, NAN);
  for (i64 i = r.cu[B] * H * Dt; i < target.size(); ++i) target.set(i, NAN);
  Array loss(kFloat32, 1), of_z(kFloat32, 2 * H * T), of_target(kFloat32, 2 * H * T);
  Array dz(t, T * H * D);
  constexpr double kLoss = 0.25;
  FASTBERT_ENTRY(relation_loss_fwd)
  (t, z.data(), target.data(), r.cu.data(), loss.floats(), of_z.floats(), of_target.floats(), T, B,
   H, D, Dt, kThreads);
  FASTBERT_ENTRY(relation_loss_bwd)
  (t, kLoss, z.data(), target.data(), of_z.floats(), of_target.floats(), r.cu.data(), dz.data(), T,
   B, H, D, Dt, kThreads);
  Doubles total(1), stats(2 * H * T), of_teacher(2 * H * T), gradient(T * H * D), p, q;
  for (i64 b = 0; b < B; ++b)
    for (i64 h = 0; h < H; ++h) {
      const i64 start = r.cu[b], L = r.cu[b + 1] - start;
      for (i64 i = 0; i < L; ++i) {
        r.row(z, D, start, L, h, i, stats, p), r.row(target, Dt, start, L, h, i, of_teacher, q);
        for (i64 j = 0; j < L; ++j) {
          total[0] += q[j] * std::log(q[j] / p[j]);
          const i64 at = ((start + i) * H + h) * D, to = ((start + j) * H + h) * D;
          const double ds = kLoss * (p[j] - q[j]) / std::sqrt(D);
          for (i64 d = 0; d < D; ++d)
            gradient[at + d] += ds * z[to + d], gradient[to + d] += ds * z[at + d];
        }
      }
    }
  check("relation_loss_fwd", kFloat32, loss, total);
  check("relation_loss_fwd stats", kFloat32, of_z, stats);
  check("relation_loss_fwd teacher's stats", kFloat32, of_target, of_teacher);
  check("relation_loss_bwd", t, dz, gradient);
}

}  // namespace
