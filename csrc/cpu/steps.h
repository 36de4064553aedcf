// Code of lstm's two passes: packed weights, tasks of a direction and a group of sequences, arrays.
#pragma once

#include "heads.h"

namespace fastbert {
namespace FASTBERT_ISA {

// units of a block: its two panels have i and f, g and o of W units
constexpr int64_t kGates = 4, kBlock = kGates * W;
// numbers ahead to fetch: one cache line
constexpr int64_t kLine = 16;
// multiply-adds per thread: fewer do not pay for starting one
constexpr int64_t kStepGrain = int64_t{1} << 18;

// floats from a row of a buffer to the next: a power of two would put rows on the same cache lines
inline int64_t apart(int64_t columns) { return round_up(columns, 16) + 16; }

// The columns of the forward's panels, which are rows of W_hh.
template <typename TW>
struct Units4 {
  const TW* w;  // (4, H, H)
  int64_t H;
  static constexpr int64_t col = 1;

  const TW* at(int64_t i) const {
    const int64_t gate = i % kBlock / W, unit = i / kBlock * W + i % W;
    return w + (gate * H + imin(unit, H - 1)) * H;
  }
};

// How a direction's weight is packed.
class StepWeights {
 public:
  // floats of a direction in the forward: [blocks of units][2 panels][H][kNR]
  static int64_t forward_size(int64_t H) { return ceil_div(H, W) * kBlock * H + 4 * W; }
  // and in the backward, where W_hh is not transposed: [panels of units][4 H][kNR]
  static int64_t backward_size(int64_t H) { return ceil_div(H, kNR) * kNR * kGates * H + 4 * W; }

  template <typename TW>
  static void pack_forward(const TW* w, int64_t H, float* out, int threads) {
    const Units4<TW> lines = {w, H};
    each(2 * ceil_div(H, W), H * H * kGates, threads,
         [&](int64_t p) { pack_lines<false>(lines, p * kNR, kNR, kNR, 0, H, out + p * kNR * H); });
  }
  template <typename TW>
  static void pack_backward(const TW* w, int64_t H, float* out, int threads) {
    const Operand<TW> columns = {matrix(w, H, 1), H, true};
    each(ceil_div(H, kNR), H * H * kGates, threads, [&](int64_t p) {
      columns.template pack<false>(p, p + 1, kNR, 0, kGates * H, out + p * kNR * kGates * H);
    });
  }

 private:
  template <typename Pack>
  static void each(int64_t panels, int64_t work, int threads, const Pack& pack) {
    const int team = team_size(work, kStepGrain, panels, threads);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t p = 0; p < panels; ++p) pack(p);
  }
};

// c (rows, kNR) = a (rows, K) times a packed panel (K, kNR), the sums in slices of kKC steps
inline void panel_product(int64_t rows, int64_t height, int64_t K, const float* a, int64_t lda,
                          const float* panel, float* c, int64_t ldc) {
  const int64_t slice = slice_units(K);
  for (int64_t k = 0; k < K; k += slice)
    for (int64_t r = 0; r < rows; r += height)
      micro(imin(slice, K - k), a + r * lda + k, Rows{lda}, panel + k * kNR, c + r * ldc, ldc,
            k > 0, imin(height, rows - r));
}

// Which sequences a task has. Those of a group are dealt forth and back, which balances tokens.
struct Group {
  const int32_t *cu, *order;
  int64_t B, group, groups, direction;

  int64_t sequence(int64_t k) const {
    return order[k * groups + (k % 2 ? groups - 1 - group : group)];
  }
  int64_t size() const {
    const int64_t whole = B / groups, rest = B % groups;
    return whole + ((whole % 2 ? groups - 1 - group : group) < rest);
  }
  int64_t length(int64_t k) const {
    const int64_t b = sequence(k);
    return cu[b + 1] - cu[b];
  }
  // the packed row of step t
  int64_t row(int64_t k, int64_t t) const {
    const int64_t b = sequence(k);
    return direction ? cu[b + 1] - 1 - t : cu[b] + t;
  }
  // the sequences of more than t tokens, of which there are at most `most`
  int64_t active(int64_t t, int64_t most) const {
    while (most > 0 && length(most - 1) <= t) --most;
    return most;
  }
};

// The layer's arrays and sizes.
template <typename E>
struct Recurrence {
  E* y;             // (T, D, H)
  float* cells;     // (T, D, H)
  E* activated;     // (T, D, 4, H), or null
  const float* h0;  // (D, B, H), or null
  const float* c0;
  const int32_t *cu, *order;
  int64_t T, B, H, D;

  // numbers of a row of y, of a row of gates, and of a state, for a direction
  int64_t unit(int64_t row, int64_t d) const { return (row * D + d) * H; }
  int64_t gate(int64_t row, int64_t d) const { return kGates * unit(row, d); }
  int64_t state(int64_t b, int64_t d) const { return (d * B + b) * H; }
  int64_t tokens() const { return cu[B]; }

  // body(group, room) of every task
  template <typename Body>
  void each(int64_t (*room)(int64_t n, int64_t H), int threads, const Body& body) const {
    if (B == 0) return;
    const int team = team_size(tokens() * D * kGates * H * H, kStepGrain, D * B, threads);
    // with two directions half as many groups: larger ones read the weights less often
    const int64_t groups = imin(B, D == 2 && team % 2 == 0 ? team / 2 : team);
    const int64_t tasks = groups * D, n = ceil_div(B, groups);
    const Scratch rooms(tasks, room(n, H));
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t i = 0; i < tasks; ++i) body(Group{cu, order, B, i / D, groups, i % D}, rooms[i]);
  }
  // zeros in the rows after the last sequence of an array with `columns` in a row
  template <typename A>
  void finish(A* array, int64_t columns) const {
    if (array) zeros(array + tokens() * columns, (T - tokens()) * columns);
  }
  // copies a group's initial states into rows of a buffer, zeros where there is none
  void begin(const Group& group, const float* from, float* to, int64_t ld) const {
    for (int64_t k = 0; k < group.size(); ++k) {
      float* row = to + k * ld;
      if (from)
        __builtin_memcpy(row, from + state(group.sequence(k), group.direction),
                         static_cast<size_t>(H) * sizeof(float));
      else
        zeros(row, H);
    }
  }
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert
