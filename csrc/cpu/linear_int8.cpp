// x weight^T + bias in integers. A unit of K is two neighbouring k, int16 in q and int8 in the
// weight, or four in 8 bits each where the instruction set multiplies such.
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

// columns in a unit of K
int64_t per_unit(int64_t levels) { return FASTBERT_DOT_BYTES && levels < 128 ? 4 : 2; }
// the distance of two rows of q: whole vectors
int64_t row_floats(int64_t columns, int64_t unit) { return round_up(ceil_div(columns, unit), W); }

// A packed weight: the header, the columns of x that the extra columns read, the scales of the
// rows, the excess of each row's sums, and the panels of B, each from a multiple of 64 bytes on.
// Units of four columns multiply q + 128: the excess is 128 times the row's sum of w, in the bits
// of a uint32. Units of two multiply q, and their excess is 0.
struct Header {
  int64_t K, extra, levels;
};
constexpr int64_t kSources = 64;
int64_t scales_at(int64_t extra) { return kSources + round_up(extra, 16) * 4; }
int64_t excess_at(int64_t N, int64_t extra) { return scales_at(extra) + round_up(N, 16) * 4; }
int64_t panels_at(int64_t N, int64_t extra) { return excess_at(N, extra) + round_up(N, 16) * 4; }
struct View {
  Header header;
  const int32_t* sources;
  const float *scale, *excess;
  const char* panels;

  View(const void* packed, int64_t N) {
    const char* p = static_cast<const char*>(packed);
    __builtin_memcpy(&header, p, sizeof(header));
    sources = reinterpret_cast<const int32_t*>(p + kSources);
    scale = reinterpret_cast<const float*>(p + scales_at(header.extra));
    excess = reinterpret_cast<const float*>(p + excess_at(N, header.extra));
    panels = p + panels_at(N, header.extra);
  }
  int64_t columns() const { return header.K + header.extra; }
  int64_t unit() const { return per_unit(header.levels); }
  int64_t units() const { return ceil_div(columns(), unit()); }
};

// the integers of kUnit * W floats of x from column k on, of which there are K; a zero is 128 if
// the unit has four
template <int kUnit, typename T>
F integers(const T* x, int64_t k, int64_t K, F factor, bool usable) {
  F v[kUnit];
  for (int i = 0; i < kUnit; ++i) {
    const int64_t at = k + i * W;
    v[i] = usable && at < K ? load(x + at, K - at) * factor : zero();
  }
#if FASTBERT_DOT_BYTES
  if constexpr (kUnit == 4) return bytes(v);
#endif
  return words(v[0], v[1]);
}

// writes q[sources[i]] to q[K + i]
template <typename Integer>
void repeat(Integer* q, int64_t K, const int32_t* sources, int64_t extra) {
  for (int64_t i = 0; i < extra; ++i) q[K + i] = q[sources[i]];
}

// writes the integers of x, then those of `extra` of its columns again, and zeros to the end of the
// row; returns a
template <int kUnit, typename T>
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
  for (int64_t u = 0; u < row_floats(K + extra, kUnit); u += W)
    store(q + u, integers<kUnit>(x, kUnit * u, K, factor, usable));
  if constexpr (kUnit == 4)
    repeat(reinterpret_cast<uint8_t*>(q), K, sources, extra);
  else
    repeat(reinterpret_cast<int16_t*>(q), K, sources, extra);
  return usable ? m / levels : bad == 0 ? 0.0f : __builtin_nanf("");
}

// x, which the compiler then does not fuse with an addition: every instruction set rounds it alike
FASTBERT_INLINE F rounded(F x) {
#if FASTBERT_X86 == 512
  asm("" : "+v"(x));
#elif FASTBERT_X86
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

template <typename T, Activation kActivation>
struct WriteInt8 {
  const float* a;
  const float *scale, *excess;
  const float* bias;
  T* y;
  int64_t ld;

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, const float* tile,
                  int64_t tile_ld) const {
    T* out = y + i * ld + j;
    const float *as = a + i, *scales = scale + j, *over = excess + j;
    const float* b = bias ? bias + j : nullptr;
    tile_vectors(rows, cols, [=, stride = ld](int64_t r, int64_t c, int64_t n) {
      const U sums = bits_as<U>(load(tile + r * tile_ld + c)) - bits_as<U>(load(over + c, n));
      F value = to_float(bits_as<I>(sums)) * as[r] * load(scales + c, n);
      if (b) value = rounded(value) + load(b + c, n);
      if constexpr (kActivation != kIdentity) value = activate<kActivation>(value).value;
      store(out + r * stride + c, value, n);
    });
  }
};

// panel q of the weight for units [u, to)
template <int kUnit>
void pack_panel(const int8_t* w, int64_t q, int64_t u, int64_t to, int64_t N, int64_t K,
                Bytes<kUnit>* out) {
  for (int64_t j = 0; j < kNR; ++j) {
    const int64_t line = q * kNR + j;
    const int8_t* p = w + imin(line, N - 1) * K;
    for (int64_t s = u; s < to; ++s)
      for (int64_t i = 0, k = kUnit * s; i < kUnit; ++i, ++k)
        out[(s - u) * kNR + j].of[i] = line < N && k < K ? p[k] : int8_t{0};
  }
}

// the inverse of pack_panel
template <int kUnit>
void unpack_panel(const Bytes<kUnit>* panel, int64_t q, int64_t u, int64_t to, int64_t N, int64_t K,
                  int8_t* w) {
  for (int64_t j = 0; j < imin(kNR, N - q * kNR); ++j) {
    int8_t* p = w + (q * kNR + j) * K;
    for (int64_t s = u; s < to; ++s)
      for (int64_t k = kUnit * s; k < imin(kUnit * s + kUnit, K); ++k)
        p[k] = panel[(s - u) * kNR + j].of[k - kUnit * s];
  }
}

// Calls body with a value of the type Bytes<unit>; the body reads the type alone.
template <typename Body>
void with_unit([[maybe_unused]] int64_t unit, const Body& body) {
#if FASTBERT_DOT_BYTES
  if (unit == 4) return body(Bytes<4>{});
#endif
  body(Bytes<2>{});
}

}  // namespace

// a row of words is the longer one
int64_t quantised_floats(int64_t M, int64_t columns) { return M * row_floats(columns, 2); }

int64_t columns_of(const void* packed) { return View(packed, 0).columns(); }

void quantise(int x_dtype, const void* x, const void* packed, int64_t M, int64_t K, float* q,
              float* a, int threads) {
  const View w(packed, 0);
  const auto levels = static_cast<float>(w.header.levels);
  const int team = team_size(M * K, kQuantiseGrain, M, threads);
  with_type(x_dtype, [&](auto t) {
    with_unit(w.unit(), [&](auto unit) {
      constexpr int kUnit = sizeof(unit);
      const auto* rows = static_cast<const decltype(t)*>(x);
      const int64_t stride = row_floats(w.columns(), kUnit);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
      for (int64_t i = 0; i < M; ++i)
        a[i] =
            quantise_row<kUnit>(rows + i * K, K, w.sources, w.header.extra, levels, q + i * stride);
    });
  });
}

void quantised_linear(int y_dtype, const float* q, const float* a, const void* packed,
                      const float* bias, Activation activation, void* y, int64_t M, int64_t N,
                      int threads) {
  const View w(packed, N);
  const Operand<float> rows = {matrix(q, row_floats(w.columns(), w.unit()), 1), M, false};
  with_type(y_dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = [&](const auto& write) {
      with_unit(w.unit(), [&](auto unit) {
        constexpr Kind kKind = sizeof(unit) == 4 ? kBytes : kWords;
        const Packed<kKind> weight = {reinterpret_cast<const decltype(unit)*>(w.panels)};
        gemm<kKind>(M, N, w.units(), rows, weight, threads, write);
      });
    };
    T* out = static_cast<T*>(y);
    if (activation == kIdentity)
      return run(WriteInt8<T, kIdentity>{a, w.scale, w.excess, bias, out, N});
    with_gelu(activation, [&](auto form) {
      run(WriteInt8<T, decltype(form)::value>{a, w.scale, w.excess, bias, out, N});
    });
  });
}

void linear_int8_fwd(int x_dtype, const void* x, const void* w, const float* scale,
                     const float* bias, void* y, int64_t M, int64_t N, int64_t K, int levels,
                     int threads) {
  const Scratch packed(1, ceil_div(linear_int8_packed_size(N, K, 0, levels), 4));
  const Scratch q(1, quantised_floats(M, K)), a(1, M);
  linear_int8_pack(w, scale, nullptr, packed[0], N, K, 0, levels, threads);
  quantise(x_dtype, x, packed[0], M, K, q[0], a[0], threads);
  quantised_linear(x_dtype, q[0], a[0], packed[0], bias, kIdentity, y, M, N, threads);
}

int64_t linear_int8_packed_size(int64_t N, int64_t K, int64_t extra, int levels) {
  const int64_t unit = per_unit(levels);
  return panels_at(N, extra) + packed_size(N, ceil_div(K + extra, unit), false) * unit;
}

void linear_int8_pack(const void* w, const float* scale, const int32_t* sources, void* packed,
                      int64_t N, int64_t K, int64_t extra, int levels, int threads) {
  char* p = static_cast<char*>(packed);
  const auto write = [p](int64_t at, const void* from, int64_t bytes) {
    if (bytes) __builtin_memcpy(p + at, from, static_cast<size_t>(bytes));
  };
  const Header header = {K, extra, levels};
  write(0, &header, sizeof(header));
  write(kSources, sources, extra * 4);
  write(scales_at(extra), scale, N * 4);
  const auto* weight = static_cast<const int8_t*>(w);
  const View view(packed, N);
  const int64_t columns = view.columns();
  auto* excess = reinterpret_cast<uint32_t*>(p + excess_at(N, extra));
  const int team = team_size(N * columns, kQuantiseGrain, N, threads);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t j = 0; j < N; ++j) {
    int32_t total = 0;
    for (int64_t k = 0; k < columns; ++k) total += weight[j * columns + k];
    excess[j] = view.unit() == 4 ? 128 * static_cast<uint32_t>(total) : 0;
  }
  with_unit(view.unit(), [&](auto unit) {
    auto* panels = reinterpret_cast<decltype(unit)*>(p + panels_at(N, extra));
    each_slice(N, columns, view.units(), threads,
               [&](int64_t q, int64_t u, int64_t to, int64_t at) {
                 pack_panel(weight, q, u, to, N, columns, panels + at);
               });
  });
}

void linear_int8_unpack(const void* packed, void* w, int64_t N, int threads) {
  const View view(packed, N);
  const int64_t columns = view.columns();
  auto* weight = static_cast<int8_t*>(w);
  with_unit(view.unit(), [&](auto unit) {
    const auto* panels = reinterpret_cast<const decltype(unit)*>(view.panels);
    each_slice(N, columns, view.units(), threads,
               [&](int64_t q, int64_t u, int64_t to, int64_t at) {
                 unpack_panel(panels + at, q, u, to, N, columns, weight);
               });
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
