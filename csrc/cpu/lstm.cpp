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

#include "math.h"
#include "steps.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// The row functions are calls: inlined into the loops over sequences they lack registers, and the
// recurrence takes 15 % longer (Zen 3, 256 units, 2026-12-01).

// A row's W units from their products `tile`. `h` and `c` are the row's states, of which c is
// replaced. Arrays are those of the token, from these units on, of which n exist; without kPart all
// W do.
template <bool kPart, typename E>
__attribute__((noinline)) void lstm_fwd_row(const float* tile, const E* gates, E* activated,
                                            float* c, float* h, E* y, float* cells, int64_t H,
                                            int64_t left) {
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
  const Recurrence<E>& layer;
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
    if (u + W <= H)
      lstm_fwd_row<false>(tile, gates + gate, kept, c, h, layer.y + unit, layer.cells + unit, H, W);
    else
      lstm_fwd_row<true>(tile, gates + gate, kept, c, h, layer.y + unit, layer.cells + unit, H,
                         H - u);
  }
};

// A row's gradients at one step, of units [from, to). dh and dc are those that the later step left,
// `before` is the cell of the step before; dc becomes the gradient of `before`, dz that of the
// products. Without kPart the units are whole vectors.
template <bool kPart, typename E>
__attribute__((noinline)) void lstm_bwd_row(const E* activated, const float* cell,
                                            const float* before, const E* dy, const float* dcell,
                                            const float* dh, float* dc, float* dz, E* dgates,
                                            int64_t H, int64_t from, int64_t to) {
  for (int64_t u = from; u < to; u += W) {
    const int64_t n = kPart ? to - u : W;
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
  const Recurrence<E>& layer;
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
    const E* const active = layer.activated + gate;
    const float *const cell = layer.cells + unit, *const more = dcells ? dcells + unit : nullptr;
    const int64_t whole = H / W * W;
    lstm_bwd_row<false>(active, cell, before, dy + unit, more, dh, dc, dz, dgates + gate, H, 0,
                        whole);
    lstm_bwd_row<true>(active, cell, before, dy + unit, more, dh, dc, dz, dgates + gate, H, whole,
                       H);
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
  const Scratch packed(D, StepWeights::forward_size(H));
  with_type(w_dtype, [&](auto w) {
    for (int64_t d = 0; d < D; ++d)
      StepWeights::pack_forward(static_cast<const decltype(w)*>(d ? w1 : w0), H, packed[d],
                                threads);
  });
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    const Recurrence<E> layer = {static_cast<E*>(y),
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
  const Scratch packed(D, StepWeights::backward_size(H));
  with_type(w_dtype, [&](auto w) {
    for (int64_t d = 0; d < D; ++d)
      StepWeights::pack_backward(static_cast<const decltype(w)*>(d ? w1 : w0), H, packed[d],
                                 threads);
  });
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    const Recurrence<E> layer = {static_cast<E*>(const_cast<void*>(y)),
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
