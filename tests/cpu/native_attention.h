// For native_check.cpp: attention against its equations in doubles.
#pragma once

#include <algorithm>

#include "native_check.h"

namespace {

// with dropout and rows behind the last sequence
struct Attention {
  const std::vector<int32_t> cu;
  i64 T, H, kv_heads, D;
  double scale;
  i64 left, right;
  // rotary angles of a pair grow by this each position, 0: none; the bias of a distance, 0: none
  double turn, bias;

  i64 heads() const { return H + 2 * kv_heads; }
  // head h's row of q, k or v
  i64 at(i64 row, i64 which, i64 h) const {
    const i64 head = which == 0 ? h : H + (which - 1) * kv_heads + h * kv_heads / H;
    return (row * heads() + head) * D;
  }
  double score_bias(i64 h, i64 distance) const { return bias * std::sin(h + 0.7 * distance); }

  // the row as position i turns it: elements d and d + D / 2 together; or turned back
  Doubles turned(const Array& qkv, i64 from, i64 i) const {
    Doubles x(D);
    for (i64 d = 0; d < D; ++d) x[d] = qkv[from + d];
    turn_row(x.data(), i);
    return x;
  }
  void turn_row(double* x, double i) const {
    if (turn == 0) return;
    for (i64 d = 0, half = D / 2; d < half; ++d) {
      const double c = std::cos(turn * (d + 1) * i), s = std::sin(turn * (d + 1) * i);
      const double a = x[d], b = x[d + half];
      x[d] = a * c - b * s, x[d + half] = b * c + a * s;
    }
  }
  // the sum over d of a[d] b[at + d]
  double dot(const Doubles& a, const Array& b, i64 at) const {
    double total = 0;
    for (i64 d = 0; d < D; ++d) total += a[d] * b[at + d];
    return total;
  }

  // one row's output and log-sum-exp, and its share of the gradients, of turned q and k still
  void row(const Array& qkv, const Array& dout, i64 b, i64 h, i64 i, Doubles& out, Doubles& lse,
           Doubles& dqkv, Doubles& dbias, i64 P) const {
    const i64 start = cu[b], length = cu[b + 1] - start, me = start + i;
    const i64 from = left < 0 ? 0 : std::max<i64>(0, i - left);
    const i64 to = right < 0 ? length : std::min(length, i + right + 1), L = to - from;
    Doubles p(L), factors(L), gradients(L), g(D);
    const Doubles mine = turned(qkv, at(me, 0, h), i);
    for (i64 d = 0; d < D; ++d) g[d] = dout[(me * H + h) * D + d];
    double top = -HUGE_VAL, total = 0, delta = 0;
    for (i64 j = 0; j < L; ++j) {
      const Doubles key = turned(qkv, at(start + from + j, 1, h), from + j);
      for (i64 d = 0; d < D; ++d) p[j] += scale * mine[d] * key[d];
      p[j] += score_bias(h, from + j - i);
      top = std::fmax(top, p[j]);
    }
    for (double& e : p) total += e = std::exp(e - top);
    lse[h * T + me] = top + std::log(total);
    for (i64 j = 0; j < L; ++j) {
      p[j] /= total, factors[j] = factor(from + j, i, b * H + h, kSite);
      gradients[j] = factors[j] * dot(g, qkv, at(start + from + j, 2, h));
      delta += p[j] * gradients[j];
    }
    for (i64 j = 0; j < L; ++j) {
      const i64 other = start + from + j;
      const i64 q = at(me, 0, h), k = at(other, 1, h), v = at(other, 2, h);
      const Doubles key = turned(qkv, k, from + j);
      const double ds = p[j] * (gradients[j] - delta), weight = p[j] * factors[j];
      dbias[h * (2 * P - 1) + from + j - i + P - 1] += ds;
      for (i64 d = 0; d < D; ++d) {
        out[(me * H + h) * D + d] += weight * qkv[v + d];
        dqkv[q + d] += scale * ds * key[d], dqkv[k + d] += scale * ds * mine[d];
        dqkv[v + d] += weight * g[d];
      }
    }
  }
};

void check_attention(int t, const std::string& form, const Attention& a) {
  const i64 B = static_cast<i64>(a.cu.size()) - 1, size = a.T * a.H * a.D, P = 110;
  const i64 wide = a.T * a.heads() * a.D;
  Array qkv = drawn(t, wide), dout = drawn(t, size);
  // the kernels must not read rows that belong to no sequence
  for (i64 i = a.cu[B] * a.H * a.D; i < size; ++i) dout.set(i, NAN);
  for (i64 i = a.cu[B] * a.heads() * a.D; i < wide; ++i) qkv.set(i, NAN);
  std::vector<float> table(P * a.D), bias(a.H * (2 * P - 1)), parts(a.H * 2 * a.T);
  for (i64 i = 0; i < P; ++i)
    for (i64 d = 0, half = a.D / 2; d < half; ++d) {
      table[(2 * i) * half + d] = static_cast<float>(std::cos(a.turn * (d + 1) * i));
      table[(2 * i + 1) * half + d] = static_cast<float>(std::sin(a.turn * (d + 1) * i));
    }
  for (i64 h = 0; h < a.H; ++h)
    for (i64 k = 0; k < 2 * P - 1; ++k)
      bias[h * (2 * P - 1) + k] = static_cast<float>(a.score_bias(h, k - P + 1));
  const float* rotary = a.turn != 0 ? table.data() : nullptr;
  const float* biases = a.bias != 0 ? bias.data() : nullptr;
  Array out(t, size), lse(kFloat32, a.H * a.T), dqkv(t, wide), dbias(kFloat32, a.H * (2 * P - 1));
  const float scale = static_cast<float>(a.scale), keep = static_cast<float>(kKeep);
  FASTBERT_ENTRY(attention_fwd)
  (t, qkv.data(), a.cu.data(), out.data(), lse.floats(), a.T, B, a.H, a.kv_heads, a.D, scale,
   a.left, a.right, rotary, a.D / 2, false, biases, P, &kSeed, kSite, kThreshold, keep, kThreads);
  FASTBERT_ENTRY(attention_bwd)
  (t, dout.data(), qkv.data(), out.data(), a.cu.data(), dqkv.data(),
   biases ? dbias.floats() : nullptr, biases ? parts.data() : nullptr, a.T, B, a.H, a.kv_heads, a.D,
   scale, a.left, a.right, rotary, a.D / 2, false, biases, P, &kSeed, kSite, kThreshold, keep,
   kThreads);
  Doubles output(size), sums(a.H * a.T), gradient(wide), of_bias(a.H * (2 * P - 1));
  for (i64 b = 0; b < B; ++b)
    for (i64 h = 0; h < a.H; ++h)
      for (i64 i = 0; i < a.cu[b + 1] - a.cu[b]; ++i)
        a.row(qkv, dout, b, h, i, output, sums, gradient, of_bias, P);
  for (i64 b = 0; b < B; ++b)
    for (i64 i = a.cu[b]; i < a.cu[b + 1]; ++i)
      for (i64 h = 0; h < a.H + a.kv_heads; ++h)
        a.turn_row(gradient.data() + (i * a.heads() + h) * a.D, a.cu[b] - i);
  check("attention_fwd" + form, t, out, output);
  check("attention_fwd lse" + form, kFloat32, lse, sums);
  check("attention_bwd" + form, t, dqkv, gradient);
  if (biases) check("attention_bwd dbias" + form, t, dbias, of_bias);
}

void check_attentions(int t) {
  const std::vector<int32_t> cu = {0, 45, 46, 46, 149};
  check_attention(t, "", {cu, 152, 3, 3, 33, 1 / std::sqrt(33.0), -1, -1, 0, 0});
  check_attention(t, " causal", {cu, 152, 3, 3, 64, 0.125, -1, 0, 0, 0});
  check_attention(t, " window", {cu, 152, 4, 2, 24, 0.2, 20, 3, 0.01, 0.5});
  check_attention(t, " of one key head", {cu, 152, 3, 1, 256, 0.0625, 30, -1, 0.01, 0});
}

}  // namespace
