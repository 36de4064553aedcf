// x weight^T + bias and its gradients: three products, which pack their operands differently.
#include "linear.h"

#include "gemm.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// writes alpha tile + bias as T
template <typename T>
struct Write {
  T* y;
  int64_t ld;
  const float* bias;
  float alpha;

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, const float* tile,
                  int64_t tile_ld) const {
    T* out = y + i * ld + j;
    const float* b = bias ? bias + j : nullptr;
    tile_vectors(rows, cols, [=, stride = ld, factor = alpha](int64_t r, int64_t c, int64_t n) {
      T* to = out + r * stride + c;
      __builtin_prefetch(to + stride, 1);
      F value = load(tile + r * tile_ld + c) * factor;
      if (b) value += load(b + c, n);
      store(to, value, n);
    });
  }
};

// Writes alpha tile to memory that nothing reads soon: a store that goes through the caches would
// first read what it overwrites.
struct Stream {
  float* y;
  int64_t ld;
  float alpha;

  static bool takes(const float* y, int64_t rows, int64_t ld) {
    return ld % W == 0 && reinterpret_cast<uintptr_t>(y) % sizeof(F) == 0 &&
           static_cast<size_t>(rows * ld) * sizeof(float) >= kLarge;
  }

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, const float* tile,
                  int64_t tile_ld) const {
    float* out = y + i * ld + j;
    tile_vectors(rows, cols, [=, stride = ld, factor = alpha](int64_t r, int64_t c, int64_t) {
      stream(out + r * stride + c, load(tile + r * tile_ld + c) * factor);
    });
    stream_end();
  }
};

template <typename TW>
Matrix<TW> pieces(const void* w0, const void* w1, const void* w2, int64_t each, int64_t K) {
  return {{static_cast<const TW*>(w0), static_cast<const TW*>(w1), static_cast<const TW*>(w2)},
          K,
          1,
          each};
}

}  // namespace

void linear_fwd(int x_dtype, int w_dtype, const void* x, const void* w0, const void* w1,
                const void* w2, int64_t each, const float* packed, const float* bias, void* y,
                int64_t M, int64_t N, int64_t K, int threads) {
  with_type(x_dtype, [&](auto t) {
    using T = decltype(t);
    const Operand<T> a = {matrix(static_cast<const T*>(x), K, 1), M, false};
    const Write<T> write = {static_cast<T*>(y), N, bias, 1.0f};
    if (packed) return gemm<kKindOf<T>>(M, N, K, a, Packed<kKindOf<T>>{packed}, threads, write);
    with_type(w_dtype, [&](auto w) {
      using TW = decltype(w);
      const Operand<TW> b = {pieces<TW>(w0, w1, w2, each, K), N, false};
      gemm<kKindOf<T>>(M, N, K, a, b, threads, write);
    });
  });
}

void linear_bwd_dx(int x_dtype, int w_dtype, const void* dy, const void* w0, const void* w1,
                   const void* w2, int64_t each, float alpha, void* dx, int64_t M, int64_t N,
                   int64_t K, int threads) {
  with_type(x_dtype, [&](auto t) {
    using T = decltype(t);
    const Operand<T> a = {matrix(static_cast<const T*>(dy), N, 1), M, false};
    const Write<T> write = {static_cast<T*>(dx), K, nullptr, alpha};
    with_type(w_dtype, [&](auto w) {
      using TW = decltype(w);
      const Operand<TW> b = {pieces<TW>(w0, w1, w2, each, K), K, true};
      gemm<kKindOf<T>>(M, K, N, a, b, threads, write);
    });
  });
}

void linear_bwd_dw(int x_dtype, int w_dtype, const void* dy, const void* x, float alpha,
                   void* dweight, int64_t M, int64_t N, int64_t K, int threads) {
  with_type(x_dtype, [&](auto t) {
    using T = decltype(t);
    const Operand<T> a = {matrix(static_cast<const T*>(dy), N, 1), N, true};
    const Operand<T> b = {matrix(static_cast<const T*>(x), K, 1), K, true};
    with_type(w_dtype, [&](auto w) {
      using TW = decltype(w);
      TW* out = static_cast<TW*>(dweight);
      if constexpr (__is_same(TW, float))
        if (Stream::takes(out, N, K))
          return gemm<kKindOf<T>>(N, K, M, a, b, threads, Stream{out, K, alpha});
      const Write<TW> write = {out, K, nullptr, alpha};
      gemm<kKindOf<T>>(N, K, M, a, b, threads, write);
    });
  });
}

void linear_bwd_db(int x_dtype, const void* dy, float alpha, float* dbias, int64_t M, int64_t N,
                   int threads) {
  // columns are independent: each task sums a stripe of them over all rows
  constexpr int64_t kStripe = 4 * W, kBlock = 64;
  const int64_t stripes = ceil_div(N, kStripe);
  const int team = team_size(M * N, int64_t{1} << 16, stripes, threads);
  with_type(x_dtype, [&](auto t) {
    const auto* p = static_cast<const decltype(t)*>(dy);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t s = 0; s < stripes; ++s) {
      const int64_t j = s * kStripe, n = N - j;
      F sums[4] = {};
      // in blocks: the rounding error of a long sum stays near that of a short one
      for (int64_t from = 0; from < M; from += kBlock) {
        F block[4] = {};
        for (int64_t i = from; i < imin(M, from + kBlock); ++i)
          for (int k = 0; k < 4; ++k)
            if (k * W < n) block[k] += load(p + i * N + j + k * W, n - k * W);
        for (int k = 0; k < 4; ++k) sums[k] += block[k];
      }
      for (int k = 0; k < 4; ++k)
        if (k * W < n) store(dbias + j + k * W, sums[k] * alpha, n - k * W);
    }
  });
}

int64_t linear_packed_size(int x_dtype, int64_t N, int64_t K) {
  return packed_size(N, K, FASTBERT_DOT_BF16 && x_dtype == kBFloat16);
}

void linear_pack(int x_dtype, int w_dtype, const void* w0, const void* w1, const void* w2,
                 int64_t each, float* packed, int64_t N, int64_t K, int threads) {
  with_type(x_dtype, [&](auto t) {
    constexpr bool kPairs = kPaired<decltype(t)>;
    const int64_t count = units(K, kPairs);
    with_type(w_dtype, [&](auto w) {
      using TW = decltype(w);
      const Operand<TW> b = {pieces<TW>(w0, w1, w2, each, K), N, false};
      each_slice(N, K, count, threads, [&](int64_t q, int64_t u, int64_t to, int64_t at) {
        pack_slices<kPairs>(b, q, q + 1, kNR, u, to, to - u, K, packed + at);
      });
    });
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
