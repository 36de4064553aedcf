// The encoder for inference: the kernels of every layer one after the other on buffers that stay
// warm from layer to layer, with nothing of Python in between.
#include "encoder.h"

#include "attention.h"
#include "decode.h"
#include "dropout_add_layer_norm.h"
#include "feed_forward.h"
#include "gated_feed_forward.h"
#include "linear.h"
#include "linear_int8.h"
#include "norm.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

struct Layer {
#define FASTBERT_MEMBER(name) const float* name;
  FASTBERT_LAYER_FIELDS(FASTBERT_MEMBER)
#undef FASTBERT_MEMBER
};

// a layer's row of the settings; kLayerSizes and kLayerNumbers count them
struct Settings {
  int64_t H, D, F;
  Activation activation;
  int64_t kv_heads;
  bool pre_norm, gated, rms;
  float attention_eps, output_eps, scale;

  Settings(const int64_t* sizes, const float* numbers)
      : H(sizes[0]),
        D(sizes[1]),
        F(sizes[2]),
        activation(static_cast<Activation>(sizes[3])),
        kv_heads(sizes[4]),
        pre_norm(sizes[5] != 0),
        gated(sizes[6] != 0),
        rms(sizes[7] != 0),
        attention_eps(numbers[0]),
        output_eps(numbers[1]),
        scale(numbers[2]) {}

  int64_t qkv_columns() const { return (H + 2 * kv_heads) * D; }
  // int8 products leave both halves of a gated feed-forward beside their product
  int64_t up_columns(bool int8) const { return int8 && gated ? 3 * F : F; }
};

// kLayerForms counts these
struct Form {
  int64_t left = -1, right = -1;
  const float* rotary = nullptr;
  int64_t half = 0, pairs = 0;
  const float* bias = nullptr;
  int64_t positions = 0;
};

template <typename T>
void gather(const T* from, const int64_t* rows, int64_t R, int64_t C, T* to) {
  for (int64_t r = 0; r < R; ++r)
    __builtin_memcpy(to + r * C, from + rows[r] * C, static_cast<size_t>(C) * sizeof(T));
}

// sum += x, then y = norm(sum), or the sum itself without a weight
template <typename T>
void add_and_norm_row(const T* x, float* sum, const float* weight, const float* bias, bool rms,
                      int64_t C, float eps, T* y) {
  const auto [total, squares] = column_sums<2>(C, [&](int64_t c, int64_t n, int k, Chains* sums) {
    const F value = load(sum + c, n) + load(x + c, n);
    store(sum + c, value, n);
    sums[0].of[k] += value;
    sums[1].of[k] += value * value;
  });
  const auto put = [y](int64_t c, int64_t n, F value) { store(y + c, value, n); };
  float mean, rstd;
  if (!weight)
    columns(C, [&](int64_t c, int64_t n, int) { put(c, n, load(sum + c, n)); });
  else if (rms)
    scale_row(sum, 0.0f, reciprocal_root(squares, C, eps), weight, nullptr, C, put);
  else
    norm_row(sum, total, weight, bias, C, eps, &mean, &rstd, put);
}

template <typename T>
class Encoder {
 public:
  // `room` rows of `wide` and of `narrow` elements, and of `columns` integers, fit into the buffers
  Encoder(int dtype, bool int8, bool pre_norm, int64_t T_, int64_t room, int64_t B, int64_t C,
          int64_t wide, int64_t narrow, int64_t columns, const Held* held, int threads)
      : dtype_(dtype),
        int8_(int8),
        tokens_(T_),
        B_(B),
        C_(C),
        held_(held),
        threads_(threads),
        wide_(1, floats(room * wide)),
        narrow_(5, floats(room * narrow)),
        stats_(2, room),
        sums_(2, pre_norm ? room * C : 0),
        quantised_(1, int8 ? quantised_floats(room, columns) : 0),
        scales_(1, int8 ? room : 0) {}

  void run(const T* x, const int32_t* cu, const Layer* layers, const int64_t* sizes,
           const float* numbers, const Form* forms, int64_t n, const int64_t* rows, int64_t R,
           T* y) const {
    const T* in = x;
    for (int64_t i = 0; i < n; ++i) {
      const bool last = i == n - 1;
      // a layer reads one of two buffers and writes the other
      T* out = last ? y : buffer(3 + i % 2);
      const Settings settings(sizes + i * kLayerSizes, numbers + i * kLayerNumbers);
      const Form form = forms ? forms[i] : Form{};
      if (settings.pre_norm && i == 0)
        __builtin_memset(sums_[0], 0, static_cast<size_t>(tokens_ * C_) * sizeof(float));
      layer(i, layers[i], settings, form, in, cu, last ? rows : nullptr, last ? R : 0, last, out);
      in = out;
    }
  }

 private:
  static int64_t floats(int64_t elements) {
    return ceil_div(elements * static_cast<int64_t>(sizeof(T)), 4) + W;
  }
  T* buffer(int64_t i) const { return reinterpret_cast<T*>(narrow_[i]); }

  void linear(const T* x, const float* w, const float* b, T* y, int64_t M, int64_t N,
              int64_t K) const {
    if (int8_)
      linear_int8(x, w, b, kIdentity, y, M, N, K);
    else
      linear_fwd(dtype_, kFloat32, x, nullptr, nullptr, nullptr, 1, w, b, y, M, N, K, threads_);
  }
  // the hidden features, in `wide` or behind what is there
  T* up(const T* x, const Layer& w, const Settings& s, T* wide, int64_t M) const {
    if (int8_ && s.gated) {
      linear_int8(x, w.up, w.up_bias, kIdentity, wide, M, 2 * s.F, C_);
      T* h = wide + 2 * M * s.F;
      gate(dtype_, s.activation, wide, h, M, s.F, threads_);
      return h;
    }
    if (int8_)
      linear_int8(x, w.up, w.up_bias, s.activation, wide, M, s.F, C_);
    else if (s.gated)
      gated_feed_forward_up(dtype_, kFloat32, s.activation, x, nullptr, nullptr, w.up, w.up_bias,
                            nullptr, wide, M, s.F, C_, threads_);
    else
      feed_forward_up(dtype_, kFloat32, s.activation, x, nullptr, w.up, w.up_bias, nullptr, wide, M,
                      s.F, C_, threads_);
    return wide;
  }
  // y = b in every row: the output of a block without heads or columns
  void fill(const float* b, T* y, int64_t M) const {
    for (int64_t i = 0; i < M; ++i)
      for (int64_t c = 0; c < C_; ++c) store1(y + i * C_ + c, b ? b[c] : 0.0f);
  }
  void linear_int8(const T* x, const float* w, const float* b, Activation activation, T* y,
                   int64_t M, int64_t N, int64_t K) const {
    float *q = quantised_[0], *a = scales_[0];
    quantise(dtype_, x, w, M, K, q, a, threads_);
    quantised_linear(dtype_, q, a, w, b, activation, y, M, N, threads_);
  }
  void add_norm(const T* x, const T* residual, const float* w, const float* b, float eps, T* y,
                int64_t M) const {
    dropout_add_layer_norm_fwd(dtype_, x, residual, w, b, y, nullptr, stats_[0], stats_[1], M, C_,
                               eps, nullptr, 0, 0, 1.0f, nullptr, threads_);
  }
  // the step before a block of a pre-norm layer: `sum` is what all blocks before it have given
  void add_and_norm(const T* x, float* sum, const float* w, const float* b, bool rms, float eps,
                    T* y, int64_t M) const {
    const int team = team_size(M * C_, kNormGrain, M, threads_);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t i = 0; i < M; ++i)
      add_and_norm_row(x + i * C_, sum + i * C_, w, b, rms, C_, eps, y + i * C_);
  }

  // attention inside the sequences, or of new tokens to those that were kept
  void attend(int64_t i, const Settings& s, const Form& f, const T* qkv, const int32_t* cu,
              T* context) const {
    if (held_) keep_keys(dtype_, qkv, cu, held_, i, B_, s.H, s.D, threads_);
    if (held_ && B_ && held_[0].tokens)
      attend_kept(dtype_, qkv, held_, context, i, B_, s.H, s.D, s.scale, threads_);
    else
      attention_fwd(dtype_, qkv, cu, context, nullptr, tokens_, B_, s.H, s.kv_heads, s.D, s.scale,
                    f.left, f.right, f.rotary, f.half, f.pairs != 0, f.bias, f.positions, nullptr,
                    0, 0, 1.0f, threads_);
  }

  // A pre-norm layer reads and gives what is yet to be added to the sum; the last one gives the
  // sum.
  void layer(int64_t i, const Layer& w, const Settings& s, const Form& f, const T* in,
             const int32_t* cu, const int64_t* rows, int64_t R, bool last, T* out) const {
    // pruned heads make the attention narrower than the layer
    const int64_t A = s.H * s.D;
    T* wide = reinterpret_cast<T*>(wide_[0]);
    T *context = buffer(0), *y = buffer(1), *middle = buffer(2);
    float* sum = sums_[0];
    const T* residual = in;
    if (s.pre_norm) {
      add_and_norm(in, sum, w.attention_norm, w.attention_norm_bias, s.rms, s.attention_eps, middle,
                   tokens_);
      in = middle;
    }
    if (s.H) {
      linear(in, w.qkv, w.qkv_bias, wide, tokens_, s.qkv_columns(), C_);
      attend(i, s, f, wide, cu, context);
    }
    int64_t M = tokens_;
    if (rows) {
      // the wide buffer is free until the feed-forward
      if (s.pre_norm) {
        gather(sum, rows, R, C_, sums_[1]);
        sum = sums_[1];
      } else {
        gather(in, rows, R, C_, middle);
        residual = middle;
      }
      gather(context, rows, R, A, wide);
      context = wide;
      M = R;
    }
    if (s.H)
      linear(context, w.out, w.out_bias, y, M, C_, A);
    else
      fill(w.out_bias, y, M);
    if (s.pre_norm)
      add_and_norm(y, sum, w.output_norm, w.output_norm_bias, s.rms, s.output_eps, middle, M);
    else
      add_norm(y, residual, w.attention_norm, w.attention_norm_bias, s.attention_eps, middle, M);
    T* given = s.pre_norm && !last ? out : y;
    if (s.F)
      linear(up(middle, w, s, wide, M), w.down, w.down_bias, given, M, C_, s.F);
    else
      fill(w.down_bias, given, M);
    if (!s.pre_norm)
      add_norm(y, middle, w.output_norm, w.output_norm_bias, s.output_eps, out, M);
    else if (last)
      add_and_norm(y, sum, nullptr, nullptr, false, 0, out, M);
  }

  int dtype_;
  bool int8_;
  int64_t tokens_, B_, C_;
  const Held* held_;
  int threads_;
  Scratch wide_, narrow_, stats_, sums_, quantised_, scales_;
};

}  // namespace

void encoder_infer(int dtype, bool int8, const void* x, const int32_t* cu_seqlens,
                   const int64_t* layers, const int64_t* sizes, const float* numbers,
                   const int64_t* forms, int64_t n, const int64_t* rows, int64_t R,
                   const int64_t* held, void* y, int64_t T, int64_t B, int64_t C, int threads) {
  int64_t wide = 0, narrow = C, columns = 0;
  bool pre_norm = false;
  const auto* table = reinterpret_cast<const Layer*>(layers);
  static_assert(sizeof(Form) == kLayerForms * sizeof(int64_t));
  static_assert(sizeof(Held) == 3 * sizeof(int64_t));
  for (int64_t i = 0; i < n; ++i) {
    const Settings s(sizes + i * kLayerSizes, numbers + i * kLayerNumbers);
    wide = imax(wide, imax(s.qkv_columns(), s.up_columns(int8)));
    narrow = imax(narrow, s.H * s.D);
    pre_norm = pre_norm || s.pre_norm;
    if (!int8) continue;
    const float* weights[] = {table[i].qkv, table[i].out, table[i].up, table[i].down};
    for (const float* w : weights)
      if (w) columns = imax(columns, columns_of(w));
  }
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    const Encoder<E> encoder(dtype, int8, pre_norm, T, imax(T, R), B, C, wide, narrow, columns,
                             reinterpret_cast<const Held*>(held), threads);
    encoder.run(static_cast<const E*>(x), cu_seqlens, table, sizes, numbers,
                reinterpret_cast<const Form*>(forms), n, rows, R, static_cast<E*>(y));
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
