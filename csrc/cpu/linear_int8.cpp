// x weight^T + bias in integers. A unit of K is two neighbouring k: int16 in q, int8 in the weight.
//
//   a = max |x| / levels,  q = round(x / a),  y = (sum_k q w) a scale + bias
#include "linear_int8.h"

#include "gemm.h"
#include "math.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// rows below this count as zeros: levels / max would overflow
constexpr float kTiny = 0x1p-100f;
// elements per thread: fewer do not pay for starting one
constexpr int64_t kQuantiseGrain = int64_t{1} << 14;

int64_t row_units(int64_t K) { return (K + 1) / 2; }
// the distance of two rows of q: whole vectors
int64_t row_floats(int64_t K) { return round_up(row_units(K), W); }

// A packed weight: the header, the columns of x that the extra columns read, the scales of the
// rows, and the panels of B, each from a multiple of 64 bytes on.
struct Header {
  int64_t K, extra;
};
constexpr int64_t kSources = 64;
int64_t scales_at(int64_t extra) { return kSources + round_up(extra, 16) * 4; }
int64_t panels_at(int64_t N, int64_t extra) { return scales_at(extra) + round_up(N, 16) * 4; }
struct View {
  Header header;
  const int32_t* sources;
  const float* scale;
  const Bytes* panels;

  View(const void* packed, int64_t N) {
    const char* p = static_cast<const char*>(packed);
    __builtin_memcpy(&header, p, sizeof(header));
    sources = reinterpret_cast<const int32_t*>(p + kSources);
    scale = reinterpret_cast<const float*>(p + scales_at(header.extra));
    panels = reinterpret_cast<const Bytes*>(p + panels_at(N, header.extra));
  }
  int64_t columns() const { return header.K + header.extra; }
};

// writes the integers of x, then those of `extra` of its columns again, and zeros to the end of the
// row; returns a
template <typename T>
float quantise_row(const T* x, int64_t K, const int32_t* sources, int64_t extra, float levels,
                   float* q) {
  F most = zero(), odd = zero();
  for (int64_t k = 0; k < K; k += W) {
    const F v = load(x + k, K - k);
    most = max(most, abs(v));
    odd += v - v;  // NaN if v is NaN or infinite
  }
  const float m = max(most), bad = sum(odd);
  const bool usable = bad == 0 && m >= kTiny;
  const F factor = set1(usable ? levels / m : 0.0f);
  for (int64_t u = 0; u < row_floats(K + extra); u += W) {
    const int64_t left = K - 2 * u;
    const F low = load(x + 2 * u, imin(imax(left, 0), W));
    const F high = left > W ? load(x + 2 * u + W, left - W) : zero();
    store(q + u, usable ? words(low * factor, high * factor) : zero());
  }
  int16_t* whole = reinterpret_cast<int16_t*>(q);
  for (int64_t i = 0; i < extra; ++i) whole[K + i] = whole[sources[i]];
  return usable ? m / levels : bad == 0 ? 0.0f : __builtin_nanf("");
}

template <typename T, Activation kActivation>
struct WriteInt8 {
  const float* a;
  const float* scale;
  const float* bias;
  T* y;
  int64_t ld;

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, const float* tile,
                  int64_t tile_ld) const {
    T* out = y + i * ld + j;
    const float *as = a + i, *scales = scale + j, *b = bias ? bias + j : nullptr;
    tile_vectors(rows, cols, [=, stride = ld](int64_t r, int64_t c, int64_t n) {
      const F sums = to_float(bits_as<I>(load(tile + r * tile_ld + c)));
      F value = sums * as[r] * load(scales + c, n);
      if (b) value += load(b + c, n);
      if constexpr (kActivation != kIdentity) value = gelu<kActivation == kGeluTanh>(value).value;
      store(out + r * stride + c, value, n);
    });
  }
};

// panel q of the weight for units [u, to)
void pack_panel(const int8_t* w, int64_t q, int64_t u, int64_t to, int64_t N, int64_t K,
                Bytes* out) {
  for (int64_t j = 0; j < kNR; ++j) {
    const int64_t line = q * kNR + j;
    const int8_t* p = w + imin(line, N - 1) * K;
    for (int64_t s = u; s < to; ++s) {
      const bool there = line < N, second = there && 2 * s + 1 < K;
      out[(s - u) * kNR + j] = {{there ? p[2 * s] : int8_t{0}, second ? p[2 * s + 1] : int8_t{0}}};
    }
  }
}

// the inverse of pack_panel
void unpack_panel(const Bytes* panel, int64_t q, int64_t u, int64_t to, int64_t N, int64_t K,
                  int8_t* w) {
  for (int64_t j = 0; j < imin(kNR, N - q * kNR); ++j) {
    int8_t* p = w + (q * kNR + j) * K;
    for (int64_t s = u; s < to; ++s)
      for (int64_t k = 2 * s; k < imin(2 * s + 2, K); ++k)
        p[k] = panel[(s - u) * kNR + j].of[k - 2 * s];
  }
}

}  // namespace

int64_t quantised_floats(int64_t M, int64_t columns) { return M * row_floats(columns); }

int64_t columns_of(const void* packed) { return View(packed, 0).columns(); }

void quantise(int x_dtype, const void* x, const void* packed, int64_t M, int64_t K, int levels,
              float* q, float* a, int threads) {
  const View w(packed, 0);
  const int64_t stride = row_floats(w.columns());
  const int team = team_size(M * K, kQuantiseGrain, M, threads);
  with_type(x_dtype, [&](auto t) {
    const auto* rows = static_cast<const decltype(t)*>(x);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t i = 0; i < M; ++i)
      a[i] = quantise_row(rows + i * K, K, w.sources, w.header.extra, static_cast<float>(levels),
                          q + i * stride);
  });
}

void quantised_linear(int y_dtype, const float* q, const float* a, const void* packed,
                      const float* bias, Activation activation, void* y, int64_t M, int64_t N,
                      int threads) {
  const View w(packed, N);
  const Operand<float> rows = {matrix(q, row_floats(w.columns()), 1), M, false};
  const Packed<kWords> weight = {w.panels};
  with_type(y_dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = [&](const auto& write) {
      gemm<kWords>(M, N, row_units(w.columns()), rows, weight, threads, write);
    };
    T* out = static_cast<T*>(y);
    if (activation == kIdentity)
      run(WriteInt8<T, kIdentity>{a, w.scale, bias, out, N});
    else if (activation == kGelu)
      run(WriteInt8<T, kGelu>{a, w.scale, bias, out, N});
    else
      run(WriteInt8<T, kGeluTanh>{a, w.scale, bias, out, N});
  });
}

void linear_int8_fwd(int x_dtype, const void* x, const void* w, const float* scale,
                     const float* bias, void* y, int64_t M, int64_t N, int64_t K, int levels,
                     int threads) {
  const Scratch packed(1, ceil_div(linear_int8_packed_size(N, K, 0), 4));
  const Scratch q(1, quantised_floats(M, K)), a(1, M);
  linear_int8_pack(w, scale, nullptr, packed[0], N, K, 0, threads);
  quantise(x_dtype, x, packed[0], M, K, levels, q[0], a[0], threads);
  quantised_linear(x_dtype, q[0], a[0], packed[0], bias, kIdentity, y, M, N, threads);
}

int64_t linear_int8_packed_size(int64_t N, int64_t K, int64_t extra) {
  const int64_t panels = packed_size(N, row_units(K + extra), false);
  return panels_at(N, extra) + panels * static_cast<int64_t>(sizeof(Bytes));
}

void linear_int8_pack(const void* w, const float* scale, const int32_t* sources, void* packed,
                      int64_t N, int64_t K, int64_t extra, int threads) {
  char* p = static_cast<char*>(packed);
  const auto write = [p](int64_t at, const void* from, int64_t bytes) {
    if (bytes) __builtin_memcpy(p + at, from, static_cast<size_t>(bytes));
  };
  const Header header = {K, extra};
  write(0, &header, sizeof(header));
  write(kSources, sources, extra * 4);
  write(scales_at(extra), scale, N * 4);
  const auto* weight = static_cast<const int8_t*>(w);
  auto* panels = reinterpret_cast<Bytes*>(p + panels_at(N, extra));
  each_slice(N, K, row_units(K + extra), threads,
             [&](int64_t q, int64_t u, int64_t to, int64_t at) {
               pack_panel(weight, q, u, to, N, K + extra, panels + at);
             });
}

void linear_int8_unpack(const void* packed, void* w, int64_t N, int threads) {
  const View view(packed, N);
  const int64_t K = view.columns();
  auto* weight = static_cast<int8_t*>(w);
  each_slice(N, K, row_units(K), threads, [&](int64_t q, int64_t u, int64_t to, int64_t at) {
    unpack_panel(view.panels + at, q, u, to, N, K, weight);
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
