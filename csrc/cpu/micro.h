// The micro kernels of matrix products, which keep a tile of C in registers. An instruction set has
// more than a hundred of them: _micro.cpp alone compiles them, and no source that calls them again.
#pragma once

#include "product.h"

namespace fastbert {
namespace FASTBERT_ISA {

// vector registers of the tile: 6 x 2 of 16, or 14 x 2 (12 x 2 on ARM) of 32
#if FASTBERT_WIDTH == 16
constexpr int kMR = 14;
#elif defined(__aarch64__)
constexpr int kMR = 12;
#else
constexpr int kMR = 6;
#endif
constexpr int kNR = 2 * W;

// How the elements of a lie: (r, k) is a[r * row + k * step].
struct Rows {
  int64_t row;
  static constexpr int64_t step = 1;
};
struct Columns {
  static constexpr int64_t row = 1;
  int64_t step;
};

// c (rows, kNR) = or += a (rows, K) b (K, kNR) in fp32, for rows <= kMR; a is Rows or Columns.
// `rows` is the last argument: the others lie where the kernel of so many rows expects them.
template <typename Layout>
void micro(int64_t K, const float* a, Layout at, const float* b, float* c, int64_t ldc, bool add,
           int64_t rows);

// the same for a packed panel of kMR rows
void micro_panel(int64_t K, const float* a, const float* b, float* c, int64_t ldc, bool add);

// c = or += a b for `rows` panels of a, of `height` rows each, and `columns` panels of b. With
// kFetch and `fetch` the first rows fetch the next panel of b, a prepacked one in memory; the panel
// after the last is `next`.
template <Kind kKind, bool kFetch>
void micro_block(int64_t rows, int64_t columns, int64_t steps, int64_t height, const float* a,
                 const typename Units<kKind>::B* b, float* c, int64_t ldc, bool add, bool fetch,
                 const typename Units<kKind>::B* next);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
