// The feed-forward's two products with GELU in their epilogues, which run while a tile is in cache.
// The other products are in linear.cpp.
//
//   u = x w1^T + b1,  h = gelu(u),  y = h w2^T + b2;    du = (dy w2) gelu'(u)
#include "feed_forward.h"

#include "gemm.h"
#include "math.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

template <typename T, Activation kForm>
struct WriteUp {
  const float* b1;
  T* u;
  T* h;
  int64_t ld;

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, const float* tile,
                  int64_t tile_ld) const {
    const int64_t start = i * ld + j;
    const float* b = b1 ? b1 + j : nullptr;
    T* us = u ? u + start : nullptr;
    T* hs = h + start;
    tile_vectors(rows, cols, [=, stride = ld](int64_t r, int64_t c, int64_t n) {
      const int64_t at = r * stride + c;
      F value = load(tile + r * tile_ld + c);
      if (b) value += load(b + c, n);
      if (us) {
        __builtin_prefetch(us + at + stride, 1);
        store(us + at, value, n);
      }
      __builtin_prefetch(hs + at + stride, 1);
      store(hs + at, activate<kForm>(value).value, n);
    });
  }
};

template <typename T, Activation kForm>
struct WriteDown {
  const T* u;
  T* du;
  T* h;
  int64_t ld;

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, const float* tile,
                  int64_t tile_ld) const {
    const int64_t start = i * ld + j;
    const T* us = u + start;
    T* dus = du + start;
    T* hs = h ? h + start : nullptr;
    tile_vectors(rows, cols, [=, stride = ld](int64_t r, int64_t c, int64_t n) {
      const int64_t at = r * stride + c;
      __builtin_prefetch(us + at + stride);
      __builtin_prefetch(dus + at + stride, 1);
      const Activated g = activate<kForm>(load(us + at, n));
      store(dus + at, load(tile + r * tile_ld + c) * g.derivative, n);
      if (hs) {
        __builtin_prefetch(hs + at + stride, 1);
        store(hs + at, g.value, n);
      }
    });
  }
};

}  // namespace

void feed_forward_up(int x_dtype, int w_dtype, int activation, const void* x, const void* w1,
                     const float* packed, const float* b1, void* u, void* h, int64_t M, int64_t F_,
                     int64_t C, int threads) {
  with_type(x_dtype, [&](auto t) {
    using T = decltype(t);
    const Operand<T> a = {matrix(static_cast<const T*>(x), C, 1), M, false};
    with_gelu(activation, [&](auto form) {
      const WriteUp<T, decltype(form)::value> write = {b1, static_cast<T*>(u), static_cast<T*>(h),
                                                       F_};
      if (packed) return gemm<kKindOf<T>>(M, F_, C, a, Packed<kKindOf<T>>{packed}, threads, write);
      with_type(w_dtype, [&](auto w) {
        using TW = decltype(w);
        const Operand<TW> b = {matrix(static_cast<const TW*>(w1), C, 1), F_, false};
        gemm<kKindOf<T>>(M, F_, C, a, b, threads, write);
      });
    });
  });
}

void feed_forward_down_bwd(int x_dtype, int w_dtype, int activation, const void* dy, const void* w2,
                           const void* u, void* du, void* h, int64_t M, int64_t F_, int64_t C,
                           int threads) {
  with_type(x_dtype, [&](auto t) {
    using T = decltype(t);
    const Operand<T> a = {matrix(static_cast<const T*>(dy), C, 1), M, false};
    with_gelu(activation, [&](auto form) {
      const WriteDown<T, decltype(form)::value> write = {
          static_cast<const T*>(u), static_cast<T*>(du), static_cast<T*>(h), F_};
      with_type(w_dtype, [&](auto w) {
        using TW = decltype(w);
        const Operand<TW> b = {matrix(static_cast<const TW*>(w2), F_, 1), F_, true};
        gemm<kKindOf<T>>(M, F_, C, a, b, threads, write);
      });
    });
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
