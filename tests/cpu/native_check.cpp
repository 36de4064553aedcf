// The kernels against plain loops in double, in every instruction set of this build that the
// machine has. There is no Python in it: tests/cpu/test_cross_build.py builds it for
// other processors and runs it in an emulator. embed, both feed-forwards and encoder_infer are left
// out: they are made of the same parts.
#include <algorithm>

#include "native_relations.h"

namespace {

constexpr double kEps = 1e-12;
constexpr i64 kSeed = 0x123456789ABCDEF;
constexpr uint32_t kSite = 7, kThreshold = uint32_t{1} << 30;  // a quarter is dropped
constexpr double kKeep = 4.0 / 3.0;

// --- dropout: one word of Philox4x32-10, as philox.h defines it ---

uint32_t philox(i64 seed, const uint32_t counter[4], int word) {
  uint32_t c[4], low = static_cast<uint32_t>(seed),
                 high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  std::memcpy(c, counter, sizeof(c));
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c[0], second = uint64_t{0xCD9E8D57} * c[2];
    c[0] = static_cast<uint32_t>(second >> 32) ^ c[1] ^ low;
    c[1] = static_cast<uint32_t>(second);
    c[2] = static_cast<uint32_t>(first >> 32) ^ c[3] ^ high;
    c[3] = static_cast<uint32_t>(first);
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
  return c[word];
}

double factor(i64 col, i64 c1, i64 c2, i64 c3) {
  const uint32_t counter[] = {static_cast<uint32_t>(col / 4), static_cast<uint32_t>(c1),
                              static_cast<uint32_t>(c2), static_cast<uint32_t>(c3)};
  return philox(kSeed, counter, col % 4) >= kThreshold ? kKeep : 0.0;
}

void check_philox() {
  // the known answer of Random123 for zeros
  const uint32_t zeros[4] = {}, known[] = {0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8};
  std::vector<uint32_t> words(128);
  FASTBERT_ENTRY(philox_row)(words.data(), 128, kSeed, 5, kSite);
  bool same = true;
  for (int word = 0; word < 4; ++word) same = same && philox(0, zeros, word) == known[word];
  for (uint32_t i = 0; i < 128; ++i) {
    const uint32_t counter[] = {i / 4, 5, kSite, 0};
    same = same && words[i] == philox(kSeed, counter, i % 4);
  }
  std::printf("%s%s philox\n", same ? "" : "WRONG: ", kIsas[current].name);
  good = good && same;
}

// --- products ---

// c (M, N) = sum over k of a(m, k) b(n, k)
template <typename A, typename B>
Doubles product(i64 M, i64 N, i64 K, const A& a, const B& b) {
  Doubles c(M * N);
  for (i64 i = 0; i < M * N; ++i)
    for (i64 k = 0; k < K; ++k) c[i] += a(i / N, k) * b(i % N, k);
  return c;
}

void check_linear(int t, i64 M, i64 N, i64 K) {
  Array x = drawn(t, M * K), w = drawn(t, N * K), dy = drawn(t, M * N), bias = drawn(kFloat32, N);
  Array y(t, M * N), again(t, M * N), dx(t, M * K), dw(t, N * K), db(kFloat32, N);
  void *p = x.data(), *q = w.data(), *d = dy.data();
  Array packed(kFloat32, FASTBERT_ENTRY(linear_packed_size)(t, N, K));
  FASTBERT_ENTRY(linear_pack)(t, t, q, q, q, N, packed.floats(), N, K, kThreads);
  const auto forward = [&](const float* pack, Array& out) {
    FASTBERT_ENTRY(linear_fwd)
    (t, t, p, q, q, q, N, pack, bias.floats(), out.data(), M, N, K, kThreads);
  };
  forward(nullptr, y), forward(packed.floats(), again);
  FASTBERT_ENTRY(linear_bwd_dx)(t, t, d, q, q, q, N, 1.0f, dx.data(), M, N, K, kThreads);
  FASTBERT_ENTRY(linear_bwd_dw)(t, t, d, p, 1.0f, dw.data(), M, N, K, kThreads);
  FASTBERT_ENTRY(linear_bwd_db)(t, d, 1.0f, db.floats(), M, N, kThreads);
  const auto at = [](const Array& m, i64 row, i64 col) {
    return [&m, row, col](i64 i, i64 k) { return m[i * row + k * col]; };
  };
  Doubles expected = product(M, N, K, at(x, K, 1), at(w, K, 1)), sums(N);
  for (i64 i = 0; i < M * N; ++i) expected[i] += bias[i % N], sums[i % N] += dy[i];
  check("linear_fwd", t, y, expected);
  check("linear_fwd packed", t, again, expected);
  check("linear_bwd_dx", t, dx, product(M, K, N, at(dy, N, 1), at(w, 1, K)));
  check("linear_bwd_dw", t, dw, product(N, K, M, at(dy, 1, N), at(x, 1, K)));
  check("linear_bwd_db", t, db, sums);
}

struct Gelu {
  double value, derivative;
};

Gelu gelu(double x, bool tanh) {
  if (!tanh) {
    const double cdf = 0.5 * std::erfc(-x / std::sqrt(2.0));
    return {x * cdf, cdf + x * std::exp(-0.5 * x * x) / std::sqrt(8.0 * std::atan(1.0))};
  }
  const double slope = std::sqrt(0.5 / std::atan(1.0)),
               s = 1.0 / (1.0 + std::exp(-2.0 * slope * (x + 0.044715 * x * x * x)));
  return {x * s, s + x * s * (1.0 - s) * 2.0 * slope * (1.0 + 3.0 * 0.044715 * x * x)};
}

void check_bias_gelu(int t, i64 N, i64 C, bool tanh) {
  Array x = drawn(t, N * C, 2.0), bias = drawn(kFloat32, C), dy = drawn(t, N * C);
  Array y(t, N * C), dx(t, N * C), dbias(kFloat32, C);
  FASTBERT_ENTRY(bias_gelu_fwd)(t, x.data(), bias.floats(), y.data(), N, C, tanh, kThreads);
  FASTBERT_ENTRY(bias_gelu_bwd)
  (t, dy.data(), x.data(), bias.floats(), dx.data(), dbias.floats(), N, C, tanh, kThreads);
  Doubles value(N * C), gradient(N * C), sums(C);
  for (i64 i = 0; i < N * C; ++i) {
    const Gelu g = gelu(x[i] + bias[i % C], tanh);
    value[i] = g.value, gradient[i] = dy[i] * g.derivative, sums[i % C] += gradient[i];
  }
  const std::string form = tanh ? " tanh" : " erf";
  check("bias_gelu_fwd" + form, t, y, value);
  check("bias_gelu_bwd dx" + form, t, dx, gradient);
  check("bias_gelu_bwd dbias" + form, t, dbias, sums);
}

// --- layer norms ---

// LN of rows z (N, C), and its backward for dy
struct Norm {
  Doubles y, dz, dweight, dbias;

  Norm(const Doubles& z, const Array& weight, const Array& bias, const Doubles& dy, i64 C)
      : y(z), dz(z), dweight(C), dbias(C) {
    for (size_t start = 0; start < z.size(); start += C) {
      double m = 0, square = 0, g = 0, gx = 0;
      for (i64 c = 0; c < C; ++c) m += z[start + c] / C;
      for (i64 c = 0; c < C; ++c) square += (z[start + c] - m) * (z[start + c] - m) / C;
      const double r = 1.0 / std::sqrt(square + kEps);
      for (i64 c = 0; c < C; ++c) {
        const double xhat = (z[start + c] - m) * r, d = dy[start + c];
        y[start + c] = xhat * weight[c] + bias[c];
        dweight[c] += d * xhat, dbias[c] += d;
        g += d * weight[c] / C, gx += d * weight[c] * xhat / C;
      }
      for (i64 c = 0; c < C; ++c) {
        const double xhat = (z[start + c] - m) * r;
        dz[start + c] = (dy[start + c] * weight[c] - g - xhat * gx) * r;
      }
    }
  }
};

Doubles doubles(const Array& a) {
  Doubles made(a.size());
  for (i64 i = 0; i < a.size(); ++i) made[i] = a[i];
  return made;
}

void check_layer_norm(int t, i64 N, i64 C) {
  Array x = drawn(t, N * C), w = drawn(kFloat32, C), b = drawn(kFloat32, C), dy = drawn(t, N * C);
  Array y(t, N * C), dx(t, N * C), mean(kFloat32, N), rstd(kFloat32, N);
  Array dw(kFloat32, C), db(kFloat32, C);
  FASTBERT_ENTRY(layer_norm_fwd)
  (t, x.data(), w.floats(), b.floats(), y.data(), mean.floats(), rstd.floats(), N, C, kEps,
   kThreads);
  FASTBERT_ENTRY(layer_norm_bwd)
  (t, dy.data(), x.data(), w.floats(), mean.floats(), rstd.floats(), dx.data(), dw.floats(),
   db.floats(), N, C, kThreads);
  const Norm norm(doubles(x), w, b, doubles(dy), C);
  check("layer_norm_fwd", t, y, norm.y);
  check("layer_norm_bwd dx", t, dx, norm.dz);
  check("layer_norm_bwd dweight", t, dw, norm.dweight);
  check("layer_norm_bwd dbias", t, db, norm.dbias);
}

void check_rms_norm(int t, i64 N, i64 C) {
  Array x = drawn(t, N * C), w = drawn(kFloat32, C), dy = drawn(t, N * C);
  Array y(t, N * C), dx(t, N * C), rstd(kFloat32, N), dw(kFloat32, C);
  FASTBERT_ENTRY(rms_norm_fwd)
  (t, x.data(), w.floats(), y.data(), rstd.floats(), N, C, kEps, kThreads);
  FASTBERT_ENTRY(rms_norm_bwd)
  (t, dy.data(), x.data(), w.floats(), rstd.floats(), dx.data(), dw.floats(), N, C, kThreads);
  Doubles value(N * C), gradient(N * C), dweight(C);
  for (i64 start = 0; start < N * C; start += C) {
    double square = 0, along = 0;
    for (i64 i = start; i < start + C; ++i) square += x[i] * x[i] / C;
    const double r = 1.0 / std::sqrt(square + kEps);
    for (i64 c = 0; c < C; ++c) {
      const i64 i = start + c;
      value[i] = x[i] * r * w[c], dweight[c] += dy[i] * x[i] * r;
      along += dy[i] * w[c] * x[i] * r / C;
    }
    for (i64 c = 0; c < C; ++c)
      gradient[start + c] = (dy[start + c] * w[c] - x[start + c] * r * along) * r;
  }
  check("rms_norm_fwd", t, y, value);
  check("rms_norm_bwd dx", t, dx, gradient);
  check("rms_norm_bwd dweight", t, dw, dweight);
}

void check_dropout_add_layer_norm(int t, i64 N, i64 C) {
  Array x = drawn(t, N * C), residual = drawn(t, N * C), dy = drawn(t, N * C);
  Array of_sum = drawn(t, N * C);
  Array w = drawn(kFloat32, C), b = drawn(kFloat32, C);
  Doubles sum = doubles(residual), mask(N * C);
  for (i64 i = 0; i < N * C; ++i)
    mask[i] = factor(i % C, i / C, kSite, 0), sum[i] += mask[i] * x[i];
  Array y(t, N * C), z(t, N * C), mean(kFloat32, N), rstd(kFloat32, N);
  Array dx(t, N * C), dresidual(t, N * C), dw(kFloat32, C), db(kFloat32, C);
  const float scale = static_cast<float>(kKeep);
  FASTBERT_ENTRY(dropout_add_layer_norm_fwd)
  (t, x.data(), residual.data(), w.floats(), b.floats(), y.data(), z.data(), mean.floats(),
   rstd.floats(), N, C, kEps, &kSeed, kSite, kThreshold, scale, nullptr, kThreads);
  FASTBERT_ENTRY(dropout_add_layer_norm_bwd)
  (t, dy.data(), z.data(), w.floats(), mean.floats(), rstd.floats(), of_sum.data(), dx.data(),
   dresidual.data(), dw.floats(), db.floats(), N, C, &kSeed, kSite, kThreshold, scale, nullptr,
   kThreads);
  Norm norm(sum, w, b, doubles(dy), C);
  Doubles dropped(N * C);
  for (i64 i = 0; i < N * C; ++i) dropped[i] = mask[i] * (norm.dz[i] += of_sum[i]);
  check("dropout_add_layer_norm_fwd", t, y, norm.y);
  check("dropout_add_layer_norm_bwd dx", t, dx, dropped);
  check("dropout_add_layer_norm_bwd dresidual", t, dresidual, norm.dz);
  check("dropout_add_layer_norm_bwd dweight", t, dw, norm.dweight);
  check("dropout_add_layer_norm_bwd dbias", t, db, norm.dbias);
}

// --- attention, with dropout and rows behind the last sequence ---

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

void check_cross_entropy(int t, i64 N, i64 V) {
  Array logits = drawn(t, N * V, 3.0), dloss = drawn(kFloat32, N), inplace = logits;
  Array loss(kFloat32, N), lse(kFloat32, N), dlogits(t, N * V);
  std::vector<i64> labels(N);
  for (i64 i = 0; i < N; ++i) labels[i] = i % 5 == 1 ? -100 : i * 37 % V;
  FASTBERT_ENTRY(cross_entropy_fwd)
  (t, logits.data(), labels.data(), loss.floats(), lse.floats(), N, V, -100, kThreads);
  FASTBERT_ENTRY(cross_entropy_bwd)
  (t, dloss.floats(), logits.data(), labels.data(), dlogits.data(), N, V, -100, kThreads);
  Doubles losses(N), sums(N), unscaled(N * V), gradient(N * V);
  for (i64 i = 0; i < N; ++i) {
    if (labels[i] < 0) continue;
    double total = 0;
    for (i64 v = 0; v < V; ++v) total += std::exp(logits[i * V + v]);
    sums[i] = std::log(total), losses[i] = sums[i] - logits[i * V + labels[i]];
    for (i64 v = 0; v < V; ++v) {
      unscaled[i * V + v] = std::exp(logits[i * V + v]) / total - (v == labels[i]);
      gradient[i * V + v] = dloss[i] * unscaled[i * V + v];
    }
  }
  check("cross_entropy_fwd", kFloat32, loss, losses);
  check("cross_entropy_fwd lse", kFloat32, lse, sums);
  check("cross_entropy_bwd", t, dlogits, gradient);
  FASTBERT_ENTRY(cross_entropy_inplace)
  (t, inplace.data(), labels.data(), loss.floats(), lse.floats(), N, V, -100, kThreads);
  check("cross_entropy_inplace", t, inplace, unscaled);
  check("cross_entropy_inplace loss", kFloat32, loss, losses);
}

// --- LAMB: a step from drawn moments ---

void check_lamb(i64 size) {
  constexpr double kBeta1 = 0.9, kBeta2 = 0.98, kEpsilon = 1e-6, kDecay = 0.01, kRate = 0.03;
  const double corrections[] = {1.5, 2.5};
  Array p = drawn(kFloat32, size, 0.1), g = drawn(kFloat32, size);
  Array m = drawn(kFloat32, size), v = drawn(kFloat32, size);
  Doubles next(size), first(size), second(size), squares(2);
  for (i64 i = 0; i < size; ++i) {
    v.set(i, v[i] * v[i]);
    first[i] = kBeta1 * m[i] + (1 - kBeta1) * g[i];
    second[i] = kBeta2 * v[i] + (1 - kBeta2) * g[i] * g[i];
    const double root = std::sqrt(second[i]) * corrections[1];
    const double update = first[i] * corrections[0] / (root + kEpsilon) + kDecay * p[i];
    next[i] = p[i] - kRate * update;
    squares[0] += p[i] * p[i], squares[1] += update * update;
  }
  const auto address = [](Array& array) { return reinterpret_cast<i64>(array.data()); };
  const i64 row[] = {address(p), address(g), address(m), address(v), size};
  double sums[2];
  FASTBERT_ENTRY(lamb_moments)
  (row, corrections, sums, 1, kBeta1, kBeta2, kEpsilon, kDecay, kThreads);
  FASTBERT_ENTRY(lamb_update)(row, corrections, &kRate, 1, kEpsilon, kDecay, kThreads);
  check("lamb p", kFloat32, p, next);
  check("lamb m", kFloat32, m, first);
  check("lamb v", kFloat32, v, second);
  for (int i : {0, 1}) {
    Array sum(kFloat32, 1);
    sum.set(0, sums[i]);
    check("lamb squares", kFloat32, sum, {squares[i]});
  }
}

// sizes with work for two threads that are no multiples of a vector, and the smallest sizes
void check_all(int t) {
  check_linear(t, 151, 131, 117), check_linear(t, 1, 2, 3), check_linear(t, 5, 37, 3200);
  check_attentions(t);
  check_relation_loss(t, 33, 64), check_relation_loss(t, 300, 8);
  check_layer_norm(t, 301, 133), check_layer_norm(t, 2, 7);
  check_rms_norm(t, 301, 133), check_rms_norm(t, 2, 7);
  check_dropout_add_layer_norm(t, 301, 133);
  check_bias_gelu(t, 301, 133, false), check_bias_gelu(t, 301, 133, true);
  check_cross_entropy(t, 41, 2053), check_cross_entropy(t, 3, 2);
}

}  // namespace

// runs the named instruction sets, by default those that the compiler's runtime finds
int main(int count, char** words) {
  const std::vector<std::string> named(words + 1, words + count);
  for (current = 0; current < kCount; ++current) {
    const Isa& isa = kIsas[current];
    if (named.empty() ? !isa.runs() : !std::count(named.begin(), named.end(), isa.name)) continue;
    check_philox();
    check_lamb(70001), check_lamb(7);
    for (int t : {kFloat32, kBFloat16}) check_all(t);
  }
  std::printf("worst: fp32 %.1e, bf16 %.1e\n", worst[0], worst[1]);
  return good ? 0 : 1;
}
