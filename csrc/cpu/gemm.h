// C (M, N) = A (M, K) B (K, N) with any strides, fp32 sums, and an epilogue that gets each tile of
// C while it is in cache.
//
// Both operands are packed into panels, slice by slice of K: A as [slice][M / h][kc][h] and B as
// [slice][N / kNR][kc][kNR]. A block of C reads one contiguous piece per slice, in order. The inner
// loop keeps an h x kNR tile of C in registers; per step it loads kNR elements of B and broadcasts
// h of A (Goto, van de Geijn 2008). Packing converts bf16 to fp32 or, where the processor
// multiplies bf16 pairs, any type to pairs of two neighbouring k in one 32-bit unit. Weights are
// packed on every call, so no copy can be stale, unless the caller gives a `Packed` one.
//
// Threads split rows or columns of C, never K: a result does not depend on the number of threads.
#pragma once

#include "micro.h"
#include "pack.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {

// Steps of k of a slice, and rows and columns of a block of C: its A and B take 288 KB of the
// second-level cache. Slices of 768 steps gain 2 to 4 points, since tiles of C are written less
// often, but the rounding errors of such long sums exceed the bound of tests/models/test_parity.py.
constexpr int64_t kKC = 256;
constexpr int64_t kMC = 96;
constexpr int64_t kNC = 192;
// units of k packed at a time; a deeper K takes several passes, with a strip of C kept in fp32
constexpr int64_t kDepth = 3072;
// most floats of packed A in a thread
constexpr int64_t kPackedA = int64_t{8} << 20;
// most floats of packed B in a thread
constexpr int64_t kPackedB = int64_t{1} << 20;
// multiply-adds per thread: fewer do not pay for starting one
constexpr int64_t kGemmGrain = int64_t{1} << 20;

// the size of equal pieces of `total` that are at most `limit`
inline int64_t even(int64_t total, int64_t limit) {
  return imax(1, ceil_div(total, imax(1, ceil_div(total, limit))));
}

// units of a slice of K
inline int64_t slice_units(int64_t count) { return even(count, kKC); }

// panels [p0, p1) of an operand for units [from, to) of K, in slices of kc
template <bool kPairs, typename Lines>
inline void pack_slices(const Lines& operand, int64_t p0, int64_t p1, int64_t width, int64_t from,
                        int64_t to, int64_t kc, int64_t K, float* out) {
  for (int64_t u = from; u < to; u += kc) {
    const int64_t steps = imin(kc, to - u), k0 = kPairs ? 2 * u : u;
    operand.template pack<kPairs>(p0, p1, width, k0, imin(kPairs ? 2 * steps : steps, K - k0),
                                  out + (u - from) * (p1 - p0) * width);
  }
}

// B that is already packed: [slice][N / kNR][kc][kNR]
template <Kind kKind>
struct Packed {
  const typename Units<kKind>::B* p;
};
template <typename B>
constexpr bool kPrepacked = false;
template <Kind kKind>
constexpr bool kPrepacked<Packed<kKind>> = true;

inline int64_t packed_size(int64_t N, int64_t K, bool pairs) {
  return round_up(N, kNR) * units(K, pairs);
}

// Calls body(q, u, to, at) for units [u, to) of every slice of every panel q of B (N columns, K
// deep in `count` units); `at` is where they lie in Packed memory, in units.
template <typename Body>
inline void each_slice(int64_t N, int64_t K, int64_t count, int threads, const Body& body) {
  const int64_t panels = ceil_div(N, kNR), kc = slice_units(count);
  const int team = team_size(N * K, int64_t{1} << 16, panels, threads);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t q = 0; q < panels; ++q)
    for (int64_t u = 0; u < count; u += kc) {
      const int64_t to = imin(u + kc, count);
      body(q, u, to, (u * panels + (to - u) * q) * kNR);
    }
}

// A thread's part of C: panels [m0, m1) of h rows and [n0, n1) of kNR columns.
struct Part {
  int64_t m0, m1, n0, n1;
};

struct Shape {
  int64_t M, N, K, h;
};

template <Kind kKind, typename TA, typename B, typename Epilogue>
class Gemm {
 public:
  Gemm(const Operand<TA>& a, const B& b, const Epilogue& epilogue, Shape shape)
      : a_(a), b_(b), epilogue_(epilogue), s_(shape), count_(units(shape.K, kPairs)) {
    kc_ = slice_units(count_);
    depth_ = kc_ * even(ceil_div(count_, kc_), kDepth / kc_);
    mc_ = imax(1, kMC / s_.h);
    nc_ = imax(1, imin(kNC / kNR, kPackedB / (depth_ * kNR)));
    ma_ = imax(1, kPackedA / (depth_ * s_.h));
  }

  // floats that a thread needs for a part
  int64_t room(const Part& part) const { return packed_a(part) + packed_b() + tile(part) + 4 * W; }

  void run(const Part& part, float* room) const {
    float* a = room;
    float* b = a + packed_a(part);
    float* c = b + packed_b();
    for (int64_t m = part.m0; m < part.m1; m += ma_) {
      const int64_t m1 = imin(m + ma_, part.m1);
      for (int64_t k = 0; k < count_ || k == 0; k += depth_) strip(part, m, m1, k, a, b, c);
    }
  }

 private:
  static constexpr bool kPairs = kKind == kHalves;
  using UnitB = typename Units<kKind>::B;

  int64_t packed_a(const Part& part) const {
    return round_up(imin(ma_, part.m1 - part.m0) * depth_ * s_.h + W, 16);
  }
  int64_t packed_b() const { return kPrepacked<B> ? 0 : round_up(nc_ * depth_ * kNR, 16); }
  bool deep() const { return count_ > depth_; }
  // floats of one block of C or, if K takes several passes, of a strip of rows
  int64_t tile(const Part& part) const {
    const int64_t panels = imin(ma_, part.m1 - part.m0), columns = part.n1 - part.n0;
    return deep() ? panels * s_.h * columns * kNR : mc_ * s_.h * nc_ * kNR;
  }

  // the start of slice u of panels [n, n1) of B; b holds these panels from unit k on
  const UnitB* slice(int64_t u, int64_t n, int64_t n1, int64_t k, const float* b) const {
    if constexpr (kPrepacked<B>)
      return b_.p + (u * ceil_div(s_.N, kNR) + imin(kc_, count_ - u) * n) * kNR;
    else
      return b + (u - k) * (n1 - n) * kNR;
  }

  // adds units [k, k + depth_) to panels [m, m1) of rows, all columns of the part; GCC would copy
  // it into `run`, several times
  __attribute__((noinline)) void strip(const Part& part, int64_t m, int64_t m1, int64_t k, float* a,
                                       float* b, float* c) const {
    const int64_t to = imin(k + depth_, count_);
    pack_slices<kPairs>(a_, m, m1, s_.h, k, to, kc_, s_.K, a);
    for (int64_t n = part.n0; n < part.n1; n += nc_) {
      const int64_t n1 = imin(n + nc_, part.n1);
      if constexpr (!kPrepacked<B>) pack_slices<kPairs>(b_, n, n1, kNR, k, to, kc_, s_.K, b);
      const int64_t ld = (deep() ? part.n1 - part.n0 : n1 - n) * kNR;
      for (int64_t i = m; i < m1; i += mc_) {
        const int64_t i1 = imin(i + mc_, m1);
        float* tile = deep() ? c + (i - m) * s_.h * ld + (n - part.n0) * kNR : c;
        // slice by slice: a block reads one contiguous piece of each, which stays in cache
        for (int64_t u = k; u < to || u == 0; u += kc_) {
          const int64_t steps = imin(kc_, to - u);
          const float* rows = a + ((u - k) * (m1 - m) + steps * (i - m)) * s_.h;
          const UnitB* columns = slice(u, n, n1, k, b);
          // the columns that follow: those of the next slice, or of the next block
          const UnitB* next = nullptr;
          if (u + kc_ < to)
            next = slice(u + kc_, n, n1, k, b);
          else if (n1 < part.n1)
            next = slice(k, n1, n1, k, b);
          // only the first rows fetch them: for the others they are in cache
          micro_block<kKind, kPrepacked<B>>(i1 - i, n1 - n, steps, s_.h, rows, columns, tile, ld,
                                            u > 0, i == m, next);
        }
        if (to == count_)
          epilogue_(i * s_.h, imin(i1 * s_.h, s_.M) - i * s_.h, n * kNR,
                    imin(n1 * kNR, s_.N) - n * kNR, tile, ld);
      }
    }
  }

  const Operand<TA>& a_;
  const B& b_;
  const Epilogue& epilogue_;
  Shape s_;
  int64_t count_, depth_, kc_, mc_, nc_, ma_;
};

// Calls put(r, c, n) for each vector of a tile, with n = W for whole ones. `put` should capture by
// value: stores might change what a reference points to.
template <typename Put>
inline void tile_vectors(int64_t rows, int64_t cols, Put put) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    for (; c + W <= cols; c += W) put(r, c, int64_t{W});
    if (c < cols) put(r, c, cols - c);
  }
}

// The height of panels of A with little padding. From two thirds of kMR on a micro kernel runs at
// full speed (Zen 3), if its core has no other thread: a lower panel has to save padding.
inline int64_t panel_height(int64_t M) {
  int64_t best = kMR, least = INT64_MAX;
  for (int64_t h = kMR; h >= (2 * kMR + 2) / 3; --h) {
    const int64_t cost = ceil_div(M, h) * (2 * h + 1);
    if (cost < least) least = cost, best = h;
  }
  return imin(best, M);
}

// epilogue(i, rows, j, cols, tile, ld) gets C[i + r, j + c] = tile[r * ld + c], each element
// once; several threads call it
template <Kind kKind, typename TA, typename B, typename Epilogue>
inline void gemm(int64_t M, int64_t N, int64_t K, const Operand<TA>& a, const B& b, int threads,
                 const Epilogue& epilogue) {
  if (M == 0 || N == 0) return;
  const int64_t h = panel_height(M);
  const int64_t m_panels = ceil_div(M, h), n_panels = ceil_div(N, kNR);
  const Gemm<kKind, TA, B, Epilogue> work(a, b, epilogue, {M, N, K, h});
  const int team = team_size(M * N * imax(K, 1), kGemmGrain, m_panels * n_panels, threads);
  // a grid of parts, tm x tn: each thread packs its rows of A, and packs or reads its columns of B.
  // Reading takes about a quarter of packing
  constexpr int64_t kColumn = kPrepacked<B> ? 1 : 4;
  int tm = 1;
  int64_t least = INT64_MAX;
  for (int t = 1; t <= team; ++t) {
    if (team % t || t > m_panels || team / t > n_panels) continue;
    const int64_t cost = 4 * M * (team / t) + kColumn * N * t;
    if (cost < least) least = cost, tm = t;
  }
  const int tn = static_cast<int>(imin(team / tm, n_panels));
  const auto part = [&](int t) {
    const int64_t i = t / tn, j = t % tn;
    return Part{i * m_panels / tm, (i + 1) * m_panels / tm, j * n_panels / tn,
                (j + 1) * n_panels / tn};
  };
  int64_t room = 0;
  for (int t = 0; t < tm * tn; ++t) room = imax(room, work.room(part(t)));
  const Scratch buffers(tm * tn, room);
#pragma omp parallel for num_threads(tm* tn) schedule(static) if (tm * tn > 1)
  for (int t = 0; t < tm * tn; ++t) work.run(part(t), buffers[t]);
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
