// The recurrence of an LSTM layer (Hochreiter and Schmidhuber 1997, with Gers' forget gate):
//
//   i, f, o = sigmoid(z),  g = tanh(z),  z = gates_t + W h_(t-1)
//   c_t = f c_(t-1) + i g,  h_t = o tanh(c_t)
//
// A task is one direction of a group of sequences, longest first, so that those that have a step t
// come first. Its thread waits for no other one: there is no barrier in a step. W is packed once
// per call, in panels whose columns belong to few units of all four gates: the cell update follows
// each panel's product while that is in the first-level cache. All sums have a fixed order, so that
// a sequence's results do not depend on the group.
#include "lstm.h"

#include "heads.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// units of a block: its two panels have i and f, g and o of W units
constexpr int64_t kGates = 4, kBlock = kGates * W;
// numbers ahead to fetch: one cache line
constexpr int64_t kLine = 16;
// multiply-adds per thread: fewer do not pay for starting one
constexpr int64_t kStepGrain = int64_t{1} << 18;

// floats from a row of a buffer to the next: a power of two would put rows on the same cache lines
inline int64_t apart(int64_t columns) { return round_up(columns, 16) + 16; }

// The columns of the forward's panels, which are rows of W.
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

// Both directions' weights, packed.
class Weights {
 public:
  // floats of a direction in the forward: [blocks of units][2 panels][H][kNR]
  static int64_t forward_size(int64_t H) { return ceil_div(H, W) * kBlock * H + 4 * W; }
  // and in the backward, where W is not transposed: [panels of units][4 H][kNR]
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
struct Layer {
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

  // body(group, weights' number, room) of every task
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

// A row's W units from their products `tile`. `h` and `c` are the row's states, of which c is
// replaced. Arrays are those of the token, from these units on, of which n exist; without kPart all
// W do.
template <bool kPart, typename E>
inline void lstm_fwd_row(const float* tile, const E* gates, E* activated, float* c, float* h, E* y,
                         float* cells, int64_t H, int64_t left) {
  const int64_t n = kPart ? left : W;
  const F i = sigmoid(load(gates, n) + load(tile));
  const F f = sigmoid(load(gates + H, n) + load(tile + W));
  const F g = tanh(load(gates + 2 * H, n) + load(tile + 2 * W));
  const F o = sigmoid(load(gates + 3 * H, n) + load(tile + 3 * W));
  const F cell = f * load(c, n) + i * g, out = o * tanh(cell);
  store(c, cell, n), store(cells, cell, n);
  store(h, out, n), store(y, out, n);
  if (activated) {
    store(activated, i, n), store(activated + H, f, n);
    store(activated + 2 * H, g, n), store(activated + 3 * H, o, n);
  }
}

template <typename E>
struct Forward {
  const Layer<E>& layer;
  const E* gates;
  const float* weights[2];

  // floats of n sequences: two sets of h, one of c, the products of a block, the rows
  static int64_t room(int64_t n, int64_t H) { return n * (3 * apart(H) + kBlock + 2); }

  void run(const Group& group, float* room) const {
    const int64_t H = layer.H, ld = apart(H), n = group.size();
    float *h = room, *next = h + n * ld, *c = next + n * ld, *tile = c + n * ld;
    int64_t* const at = reinterpret_cast<int64_t*>(tile + n * kBlock);
    layer.begin(group, layer.h0, h, ld), layer.begin(group, layer.c0, c, ld);
    int64_t rows = n;
    for (int64_t t = 0; (rows = group.active(t, rows)) > 0; ++t) {
      const int64_t height = panel_height(rows);
      for (int64_t r = 0; r < rows; ++r) at[r] = layer.unit(group.row(r, t), group.direction);
      for (int64_t u = 0; u < H; u += W) {
        const float* panels = weights[group.direction] + u * kGates * H;
        if (t > 0 || layer.h0) {
          panel_product(rows, height, H, h, ld, panels, tile, kBlock);
          panel_product(rows, height, H, h, ld, panels + kNR * H, tile + kNR, kBlock);
        } else {
          zeros(tile, rows * kBlock);
        }
        for (int64_t r = 0; r < rows; ++r)
          update(at[r], group.direction, u, tile + r * kBlock, c + r * ld + u, next + r * ld + u);
      }
      float* before = h;
      h = next, next = before;
    }
  }

 private:
  // Units [u, u + W) of a sequence, whose row begins at `at` in y. The gates of the units that
  // follow, or of the next step, are fetched: each row has four runs of H numbers, too short for
  // the processor to do so by itself.
  void update(int64_t at, int64_t d, int64_t u, const float* tile, float* c, float* h) const {
    const int64_t H = layer.H, unit = at + u, gate = kGates * at + u;
    const int64_t step = kGates * layer.D * H;
    const int64_t ahead = u + kLine < H ? kLine : kLine - H + (d ? -step : step);
    for (int64_t k = 0; k < kGates; ++k) __builtin_prefetch(gates + gate + ahead + k * H);
    E* const kept = layer.activated ? layer.activated + gate : nullptr;
    const auto row = u + W <= H ? lstm_fwd_row<false, E> : lstm_fwd_row<true, E>;
    row(tile, gates + gate, kept, c, h, layer.y + unit, layer.cells + unit, H, H - u);
  }
};

// A row's gradients at one step. dh and dc are those that the later step left, `before` is the cell
// of the step before; dc becomes the gradient of `before`, dz that of the products.
template <typename E>
inline void lstm_bwd_row(const E* activated, const float* cell, const float* before, const E* dy,
                         const float* dcell, const float* dh, float* dc, float* dz, E* dgates,
                         int64_t H) {
  for (int64_t u = 0; u < H; u += W) {
    const int64_t n = H - u;
    const F i = load(activated + u, n), f = load(activated + H + u, n),
            g = load(activated + 2 * H + u, n), o = load(activated + 3 * H + u, n);
    const F out = tanh(load(cell + u, n)), into = load(dh + u, n) + load(dy + u, n);
    F inner = load(dc + u, n) + into * o * (1.0f - out * out);
    if (dcell) inner += load(dcell + u, n);
    const F grads[kGates] = {inner * g * i * (1.0f - i),
                             inner * (before ? load(before + u, n) : zero()) * f * (1.0f - f),
                             inner * i * (1.0f - g * g), into * out * o * (1.0f - o)};
    store(dc + u, inner * f, n);
    for (int64_t k = 0; k < kGates; ++k)
      store(dz + k * H + u, grads[k], n), store(dgates + k * H + u, grads[k], n);
  }
}

template <typename E>
struct Backward {
  const Layer<E>& layer;
  const E* dy;
  const float* dcells;
  const float* weights[2];
  E *dgates, *h_before;  // (T, D, 4, H); (T, D, H), the state before each token's step, or null
  float *dh0, *dc0;

  // floats of n sequences: dh in whole panels, dc, dz
  static int64_t room(int64_t n, int64_t H) {
    return n * (apart(round_up(H, kNR)) + apart(H) + apart(kGates * H));
  }

  void run(const Group& group, float* room) const {
    const int64_t H = layer.H, n = group.size(), d = group.direction;
    const int64_t ldh = apart(round_up(H, kNR)), ldc = apart(H), ldz = apart(kGates * H);
    float *dh = room, *dc = dh + n * ldh, *dz = dc + n * ldc;
    zeros(dh, n * ldh), zeros(dc, n * ldc);
    const int64_t steps = n > 0 ? group.length(0) : 0;
    for (int64_t t = steps - 1; t >= 0; --t) {
      const int64_t rows = group.active(t, n), height = panel_height(rows);
      for (int64_t r = 0; r < rows; ++r)
        step(group, r, t, dh + r * ldh, dc + r * ldc, dz + r * ldz);
      if (t > 0 || dh0)
        for (int64_t u = 0; u < H; u += kNR)
          panel_product(rows, height, kGates * H, dz, ldz, weights[d] + u * kGates * H, dh + u,
                        ldh);
    }
    for (int64_t k = 0; k < n; ++k) {
      const int64_t to = layer.state(group.sequence(k), d);
      const size_t bytes = static_cast<size_t>(H) * sizeof(float);
      if (dh0) __builtin_memcpy(dh0 + to, dh + k * ldh, bytes);
      if (dc0) __builtin_memcpy(dc0 + to, dc + k * ldc, bytes);
    }
  }

 private:
  void step(const Group& group, int64_t k, int64_t t, const float* dh, float* dc, float* dz) const {
    const int64_t row = group.row(k, t), d = group.direction, H = layer.H;
    const int64_t unit = layer.unit(row, d), gate = layer.gate(row, d);
    const int64_t initial = layer.state(group.sequence(k), d);
    const int64_t last = t > 0 ? layer.unit(group.row(k, t - 1), d) : 0;
    const float* before = layer.c0 ? layer.c0 + initial : nullptr;
    if (t > 0) before = layer.cells + last;
    lstm_bwd_row(layer.activated + gate, layer.cells + unit, before, dy + unit,
                 dcells ? dcells + unit : nullptr, dh, dc, dz, dgates + gate, H);
    if (!h_before) return;
    E* to = h_before + unit;
    if (t > 0)
      __builtin_memcpy(to, layer.y + last, static_cast<size_t>(H) * sizeof(E));
    else if (layer.h0)
      for (int64_t u = 0; u < H; u += W) store(to + u, load(layer.h0 + initial + u, H - u), H - u);
    else
      zeros(to, H);
  }
};

// writes tile as TW
template <typename TW>
struct Put {
  TW* out;
  int64_t ld;

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, const float* tile,
                  int64_t tile_ld) const {
    TW* to = out + i * ld + j;
    tile_vectors(rows, cols, [=, stride = ld](int64_t r, int64_t c, int64_t n) {
      store(to + r * stride + c, load(tile + r * tile_ld + c), n);
    });
  }
};

}  // namespace

void lstm_fwd(int dtype, int w_dtype, const void* gates, const void* w0, const void* w1,
              const int32_t* cu_seqlens, const int32_t* order, const float* h0, const float* c0,
              void* y, float* cells, void* activated, int64_t T, int64_t B, int64_t H, int64_t D,
              int threads) {
  const Scratch packed(D, Weights::forward_size(H));
  with_type(w_dtype, [&](auto w) {
    for (int64_t d = 0; d < D; ++d)
      Weights::pack_forward(static_cast<const decltype(w)*>(d ? w1 : w0), H, packed[d], threads);
  });
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    const Layer<E> layer = {static_cast<E*>(y),
                            cells,
                            static_cast<E*>(activated),
                            h0,
                            c0,
                            cu_seqlens,
                            order,
                            T,
                            B,
                            H,
                            D};
    const Forward<E> pass = {layer, static_cast<const E*>(gates), {packed[0], packed[D - 1]}};
    layer.each(&Forward<E>::room, threads,
               [&](const Group& group, float* room) { pass.run(group, room); });
    layer.finish(layer.y, D * H), layer.finish(cells, D * H);
    layer.finish(layer.activated, kGates * D * H);
  });
}

void lstm_bwd(int dtype, int w_dtype, const void* dy, const float* dcells, const void* activated,
              const void* y, const float* cells, const void* w0, const void* w1,
              const int32_t* cu_seqlens, const int32_t* order, const float* h0, const float* c0,
              void* dgates, void* dweights, float* dh0, float* dc0, int64_t T, int64_t B, int64_t H,
              int64_t D, int threads) {
  const Scratch packed(D, Weights::backward_size(H));
  with_type(w_dtype, [&](auto w) {
    for (int64_t d = 0; d < D; ++d)
      Weights::pack_backward(static_cast<const decltype(w)*>(d ? w1 : w0), H, packed[d], threads);
  });
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    const Layer<E> layer = {static_cast<E*>(const_cast<void*>(y)),
                            const_cast<float*>(cells),
                            static_cast<E*>(const_cast<void*>(activated)),
                            h0,
                            c0,
                            cu_seqlens,
                            order,
                            T,
                            B,
                            H,
                            D};
    const int64_t tokens = layer.tokens();
    const Scratch before(1, dweights ? tokens * D * H : 0);
    E* const h_before = dweights ? reinterpret_cast<E*>(before[0]) : nullptr;
    E* const to = static_cast<E*>(dgates);
    const Backward<E> pass = {
        layer, static_cast<const E*>(dy), dcells, {packed[0], packed[D - 1]}, to, h_before, dh0,
        dc0};
    layer.each(&Backward<E>::room, threads,
               [&](const Group& group, float* room) { pass.run(group, room); });
    layer.finish(to, kGates * D * H);
    if (!dweights) return;
    // one product over all tokens, not one in each step
    with_type(w_dtype, [&](auto w) {
      using TW = decltype(w);
      for (int64_t d = 0; d < D; ++d) {
        const Operand<E> a = {matrix(to + d * kGates * H, D * kGates * H, 1), kGates * H, true};
        const Operand<E> b = {matrix(h_before + d * H, D * H, 1), H, true};
        const Put<TW> put = {static_cast<TW*>(dweights) + d * kGates * H * H, H};
        gemm<kKindOf<E>>(kGates * H, H, tokens, a, b, threads, put);
      }
    });
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
