// The gated feed-forward's two products with the gate in their epilogues, which run while a tile is
// in cache. The other products are in linear.cpp.
//
//   a = x wa^T + ba,  g = x wg^T + bg,  h = act(a) g,  y = h w2^T + b2
//   dh = dy w2,  da = dh g act'(a),  dg = dh act(a)
//
// One product gives a and g: a panel of kNR = 2 W columns has W rows of wa and the same W rows of
// wg. So every tile holds both values of its features, however the columns are split.
#include "gated_feed_forward.h"

#include "gemm.h"
#include "math.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// elements per thread: fewer do not pay for starting one
constexpr int64_t kGateGrain = int64_t{1} << 14;

// columns of the product for F features; the last panel may have columns that stand for none
inline int64_t gated_columns(int64_t F_) { return ceil_div(F_, W) * kNR; }

// the rows of both weights in the order of the product's columns
template <typename T>
struct Gated {
  const T *wa, *wg;
  int64_t row, features;
  static constexpr int64_t col = 1;

  const T* at(int64_t i) const {
    const int64_t feature = imin(i / kNR * W + i % W, features - 1);
    return (i % kNR < W ? wa : wg) + feature * row;
  }
};
template <typename T>
Operand<T, Gated<T>> gated(const void* wa, const void* wg, int64_t F_, int64_t C) {
  return {{static_cast<const T*>(wa), static_cast<const T*>(wg), C, F_}, gated_columns(F_), false};
}

template <typename Body>
inline void with_activation(Activation activation, const Body& body) {
  if (activation == kSilu)
    body(Chosen<kSilu>{});
  else if (activation == kGeluTanh)
    body(Chosen<kGeluTanh>{});
  else
    body(Chosen<kGelu>{});
}

// Both epilogues choose the activation once a tile: a choice at compile time of the product would
// compile all of the product three times.

template <typename T>
struct WriteUp {
  Activation activation;
  const float* bias;
  T* u;
  T* h;
  int64_t features;

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, const float* tile,
                  int64_t tile_ld) const {
    // of this tile: the first feature, and how many there are
    const int64_t first = j / 2, count = imin(cols / 2, features - first);
    const float* b = bias ? bias + first : nullptr;
    T* us = u ? u + 2 * i * features + first : nullptr;
    T* hs = h + i * features + first;
    with_activation(activation, [&](auto act) {
      tile_vectors(rows, count, [=, ld = features](int64_t r, int64_t f, int64_t n) {
        // f is a multiple of W, and the tile has two vectors for every W features
        const float* both = tile + r * tile_ld + 2 * f;
        F a = load(both), g = load(both + W);
        if (b) a += load(b + f, n), g += load(b + ld + f, n);
        if (us) {
          T* to = us + 2 * r * ld + f;
          __builtin_prefetch(to + 2 * ld, 1);
          __builtin_prefetch(to + 3 * ld, 1);
          store(to, a, n), store(to + ld, g, n);
        }
        T* to = hs + r * ld + f;
        __builtin_prefetch(to + ld, 1);
        store(to, activate<decltype(act)::value>(a).value * g, n);
      });
    });
  }
};

template <typename T>
struct WriteDown {
  Activation activation;
  const T* u;
  T* du;
  T* h;
  int64_t features;

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, const float* tile,
                  int64_t tile_ld) const {
    const int64_t start = 2 * i * features + j;
    const T* us = u + start;
    T* dus = du + start;
    T* hs = h ? h + i * features + j : nullptr;
    with_activation(activation, [&](auto act) {
      tile_vectors(rows, cols, [=, ld = features](int64_t r, int64_t f, int64_t n) {
        const int64_t at = 2 * r * ld + f;
        __builtin_prefetch(us + at + 2 * ld), __builtin_prefetch(us + at + 3 * ld);
        __builtin_prefetch(dus + at + 2 * ld, 1), __builtin_prefetch(dus + at + 3 * ld, 1);
        const Activated a = activate<decltype(act)::value>(load(us + at, n));
        const F g = load(us + at + ld, n), dh = load(tile + r * tile_ld + f);
        store(dus + at, dh * g * a.derivative, n);
        store(dus + at + ld, dh * a.value, n);
        if (hs) {
          __builtin_prefetch(hs + (r + 1) * ld + f, 1);
          store(hs + r * ld + f, a.value * g, n);
        }
      });
    });
  }
};

}  // namespace

void gated_feed_forward_up(int x_dtype, int w_dtype, int activation, const void* x, const void* wa,
                           const void* wg, const float* packed, const float* bias, void* u, void* h,
                           int64_t M, int64_t F_, int64_t C, int threads) {
  const int64_t N = gated_columns(F_);
  with_type(x_dtype, [&](auto t) {
    using T = decltype(t);
    const Operand<T> a = {matrix(static_cast<const T*>(x), C, 1), M, false};
    const WriteUp<T> write = {static_cast<Activation>(activation), bias, static_cast<T*>(u),
                              static_cast<T*>(h), F_};
    if (packed) return gemm<kKindOf<T>>(M, N, C, a, Packed<kKindOf<T>>{packed}, threads, write);
    with_type(w_dtype, [&](auto w) {
      gemm<kKindOf<T>>(M, N, C, a, gated<decltype(w)>(wa, wg, F_, C), threads, write);
    });
  });
}

void gate(int dtype, int activation, const void* u, void* h, int64_t M, int64_t F_, int threads) {
  const int team = team_size(M * F_, kGateGrain, M, threads);
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const T* us = static_cast<const T*>(u);
    T* hs = static_cast<T*>(h);
    with_activation(static_cast<Activation>(activation), [&](auto act) {
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
      for (int64_t i = 0; i < M; ++i)
        tile_vectors(1, F_, [=](int64_t, int64_t f, int64_t n) {
          const F a = load(us + 2 * i * F_ + f, n), g = load(us + (2 * i + 1) * F_ + f, n);
          store(hs + i * F_ + f, activate<decltype(act)::value>(a).value * g, n);
        });
    });
  });
}

void gated_feed_forward_down_bwd(int x_dtype, int w_dtype, int activation, const void* dy,
                                 const void* w2, const void* u, void* du, void* h, int64_t M,
                                 int64_t F_, int64_t C, int threads) {
  with_type(x_dtype, [&](auto t) {
    using T = decltype(t);
    const Operand<T> a = {matrix(static_cast<const T*>(dy), C, 1), M, false};
    const WriteDown<T> write = {static_cast<Activation>(activation), static_cast<const T*>(u),
                                static_cast<T*>(du), static_cast<T*>(h), F_};
    with_type(w_dtype, [&](auto w) {
      using TW = decltype(w);
      const Operand<TW> b = {matrix(static_cast<const TW*>(w2), F_, 1), F_, true};
      gemm<kKindOf<T>>(M, F_, C, a, b, threads, write);
    });
  });
}

int64_t gated_feed_forward_packed_size(int x_dtype, int64_t F_, int64_t C) {
  return packed_size(gated_columns(F_), C, FASTBERT_DOT_BF16 && x_dtype == kBFloat16);
}

void gated_feed_forward_pack(int x_dtype, int w_dtype, const void* wa, const void* wg,
                             float* packed, int64_t F_, int64_t C, int threads) {
  const int64_t N = gated_columns(F_);
  with_type(x_dtype, [&](auto t) {
    constexpr bool kPairs = kPaired<decltype(t)>;
    with_type(w_dtype, [&](auto w) {
      const auto b = gated<decltype(w)>(wa, wg, F_, C);
      each_slice(N, C, units(C, kPairs), threads,
                 [&](int64_t q, int64_t u, int64_t to, int64_t at) {
                   pack_slices<kPairs>(b, q, q + 1, kNR, u, to, to - u, C, packed + at);
                 });
    });
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
