// The kernels against plain loops in double, in every instruction set of this build that the
// machine has. There is no Python in it: tests/cpu/test_cross_build.py builds it for
// other processors and runs it in an emulator. embed, both feed-forwards and encoder_infer are left
// out: they are made of the same parts.
#include "native_attention.h"
#include "native_lstm.h"
#include "native_relations.h"

namespace {

constexpr double kEps = 1e-12;

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

// --- Muon: five steps of Newton and Schulz's iteration on three matrices (R, C) ---

void check_muon(i64 R, i64 C) {
  constexpr double kA = 3.4445, kB = -4.775, kC = 2.0315;
  constexpr i64 kSteps = 5, kMatrices = 3;
  Array x = drawn(kFloat32, kMatrices * R * C), out(kFloat32, kMatrices * R * C);
  Doubles expected;
  std::vector<i64> places;
  for (i64 m = 0; m < kMatrices; ++m) {
    places.push_back(reinterpret_cast<i64>(x.floats() + m * R * C));
    places.push_back(reinterpret_cast<i64>(out.floats() + m * R * C));
    Doubles X(R * C);
    double squares = 0;
    for (i64 i = 0; i < R * C; ++i) X[i] = x[m * R * C + i], squares += X[i] * X[i];
    for (double& value : X) value /= std::sqrt(squares);
    for (i64 step = 0; step < kSteps; ++step) {
      const auto rows = [&](i64 i, i64 k) { return X[i * C + k]; };
      const auto columns = [&](i64 j, i64 k) { return X[k * C + j]; };
      const Doubles A = product(R, R, C, rows, rows);
      const auto squared = [&](i64 i, i64 k) { return A[i * R + k]; };
      Doubles B = product(R, R, R, squared, squared);
      for (i64 i = 0; i < R * R; ++i) B[i] = kB * A[i] + kC * B[i];
      const Doubles BX = product(R, C, R, [&](i64 i, i64 k) { return B[i * R + k]; }, columns);
      for (i64 i = 0; i < R * C; ++i) X[i] = kA * X[i] + BX[i];
    }
    expected.insert(expected.end(), X.begin(), X.end());
  }
  FASTBERT_ENTRY(muon_orthogonalise)
  (places.data(), kMatrices, R, C, kSteps, kA, kB, kC, kThreads);
  check("muon_orthogonalise", kFloat32, out, expected);
}

// sizes with work for two threads that are no multiples of a vector, and the smallest sizes
void check_all(int t) {
  check_linear(t, 151, 131, 117), check_linear(t, 1, 2, 3), check_linear(t, 5, 37, 3200);
  check_attentions(t);
  check_relation_loss(t, 33, 64), check_relation_loss(t, 300, 8);
  check_lstm(t, 2, 21), check_lstm(t, 1, 270), check_lstm(t, 2, 1);
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
    check_muon(151, 203), check_muon(203, 151), check_muon(1, 2);
    for (int t : {kFloat32, kBFloat16}) check_all(t);
  }
  std::printf("worst: fp32 %.1e, bf16 %.1e\n", worst[0], worst[1]);
  return good ? 0 : 1;
}
