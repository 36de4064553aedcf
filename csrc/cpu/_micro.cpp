// The micro kernels of every height, kind and layout, and the choice of one by its height.
#include "micro.h"

namespace fastbert {
namespace FASTBERT_ISA {

// While the first kShares panels of rows multiply a panel of packed columns, each of them fetches a
// share of the next panel of columns. A product of few rows would wait for memory otherwise.
constexpr int64_t kShares = 4;
// steps of k per turn of the inner loop; a tile of 32 registers has work enough without
constexpr int kUnroll = kMR > 6 ? 2 : 8;

// a packed panel of kHeight rows
template <int kHeight>
struct Panel {
  static constexpr int64_t row = 1, step = kHeight;
};

// R rows of a tile of C, which GCC keeps in registers. It would keep an array in memory if a branch
// followed the loop that fills the array, so the sums are members. It would keep an object in
// memory if a call took the object's address, so every use is inlined.
template <int R, Kind kKind>
struct Sums {
  using Sum = typename Units<kKind>::Sum;
  Sum low = {}, high = {};
  Sums<R - 1, kKind> rest;

  FASTBERT_INLINE void step(const float* a, int64_t row, F b0, F b1) {
    multiply_add<kKind>(low, high, a, b0, b1);
    if constexpr (R > 1) rest.step(a + row, row, b0, b1);
  }
  template <bool kAdd>
  FASTBERT_INLINE void put(float* c, int64_t ldc) const {
    store(c, bits_as<F>(kAdd ? bits_as<Sum>(load(c)) + low : low));
    store(c + W, bits_as<F>(kAdd ? bits_as<Sum>(load(c + W)) + high : high));
    if constexpr (R > 1) rest.template put<kAdd>(c + ldc, ldc);
  }
};
template <Kind kKind>
struct Sums<0, kKind> {};

// c (R, kNR) = or += a (R, K) b (K, kNR). The loop holds the loads of b, and per row a broadcast
// and the multiply-adds: nothing else, since one instruction more per step costs 3 to 5 % where
// another thread shares the core (tests/cpu/test_cpu_machine_code.py counts them). With kAhead it
// also fetches the share of a panel of B that starts at `ahead` into the second-level cache.
template <int R, Kind kKind, typename Layout, bool kAhead = false>
__attribute__((noinline)) void micro_kernel(int64_t K, const float* a, Layout at,
                                            const typename Units<kKind>::B* b, float* c,
                                            int64_t ldc, bool add, const char* ahead = nullptr) {
  using U = Units<kKind>;
  // cache lines to fetch in a turn: a share of what the turn reads of b, or one
  constexpr int64_t kLine = 64, kRead = kUnroll * kNR * sizeof(*b);
  constexpr int64_t kLines = kRead > kShares * kLine ? kRead / (kShares * kLine) : 1;
  Sums<R, kKind> sums;
  for (; K >= kUnroll; K -= kUnroll, a += kUnroll * at.step, b += kUnroll * kNR) {
    if constexpr (kAhead) {
#pragma GCC unroll 8
      for (int64_t line = 0; line < kLines; ++line) __builtin_prefetch(ahead + line * kLine, 0, 2);
      ahead += kLines * kLine;
    }
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
      const auto* line = b + u * kNR;
      sums.step(a + u * at.step, at.row, U::load_b(line), U::load_b(line + W));
    }
  }
  for (; K > 0; --K, a += at.step, b += kNR) sums.step(a, at.row, U::load_b(b), U::load_b(b + W));
  if (add)
    sums.template put<true>(c, ldc);
  else
    sums.template put<false>(c, ldc);
}

namespace {

template <typename Layout, int R = kMR>
inline void of_rows(int64_t K, const float* a, Layout at, const float* b, float* c, int64_t ldc,
                    bool add, int64_t rows) {
  if constexpr (R > 1)
    if (rows < R) return of_rows<Layout, R - 1>(K, a, at, b, c, ldc, add, rows);
  micro_kernel<R, kFloats>(K, a, at, b, c, ldc, add);
}

template <Kind kKind, bool kAhead, int R = kMR>
inline void of_height(int64_t height, int64_t K, const float* a, const typename Units<kKind>::B* b,
                      float* c, int64_t ldc, bool add, const char* ahead = nullptr) {
  if constexpr (R > 1)
    if (height < R) return of_height<kKind, kAhead, R - 1>(height, K, a, b, c, ldc, add, ahead);
  micro_kernel<R, kKind, Panel<R>, kAhead>(K, a, Panel<R>{}, b, c, ldc, add, ahead);
}

}  // namespace

template <typename Layout>
void micro(int64_t K, const float* a, Layout at, const float* b, float* c, int64_t ldc, bool add,
           int64_t rows) {
  of_rows(K, a, at, b, c, ldc, add, rows);
}
template void micro(int64_t, const float*, Rows, const float*, float*, int64_t, bool, int64_t);
template void micro(int64_t, const float*, Columns, const float*, float*, int64_t, bool, int64_t);

void micro_panel(int64_t K, const float* a, const float* b, float* c, int64_t ldc, bool add) {
  micro_kernel<kMR, kFloats>(K, a, Panel<kMR>{}, b, c, ldc, add);
}

template <Kind kKind, bool kFetch>
void micro_block(int64_t rows, int64_t columns, int64_t steps, int64_t height, const float* a,
                 const typename Units<kKind>::B* b, float* c, int64_t ldc, bool add,
                 [[maybe_unused]] bool fetch,
                 [[maybe_unused]] const typename Units<kKind>::B* next) {
  for (int64_t q = 0; q < columns; ++q) {
    const auto* panel = b + q * steps * kNR;
    [[maybe_unused]] const auto* ahead = q + 1 < columns ? panel + steps * kNR : next;
    for (int64_t p = 0; p < rows; ++p) {
      const float* row = a + p * steps * height;
      float* tile = c + p * height * ldc + q * kNR;
      if constexpr (kFetch)
        if (fetch && p < kShares && ahead) {
          const auto* share = reinterpret_cast<const char*>(ahead + p * steps * kNR / kShares);
          of_height<kKind, true>(height, steps, row, panel, tile, ldc, add, share);
          continue;
        }
      of_height<kKind, false>(height, steps, row, panel, tile, ldc, add);
    }
  }
}
#define FASTBERT_BLOCKS(kind)                                                                \
  template void micro_block<kind, false>(int64_t, int64_t, int64_t, int64_t, const float*,   \
                                         const Units<kind>::B*, float*, int64_t, bool, bool, \
                                         const Units<kind>::B*);                             \
  template void micro_block<kind, true>(int64_t, int64_t, int64_t, int64_t, const float*,    \
                                        const Units<kind>::B*, float*, int64_t, bool, bool,  \
                                        const Units<kind>::B*);
FASTBERT_BLOCKS(kFloats)
FASTBERT_BLOCKS(kWords)
#if FASTBERT_DOT_BF16
FASTBERT_BLOCKS(kHalves)
#endif
#if FASTBERT_DOT_BYTES
FASTBERT_BLOCKS(kBytes)
#endif

}  // namespace FASTBERT_ISA
}  // namespace fastbert
