// The encoder for inference: the kernels of every layer one after the other on buffers that stay
// warm from layer to layer, with nothing of Python in between.
#include "encoder.h"

#include "attention.h"
#include "dropout_add_layer_norm.h"
#include "feed_forward.h"
#include "linear.h"
#include "linear_int8.h"
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
  bool tanh;
  float attention_eps, output_eps, scale;

  Settings(const int64_t* sizes, const float* numbers)
      : H(sizes[0]),
        D(sizes[1]),
        F(sizes[2]),
        tanh(sizes[3] != 0),
        attention_eps(numbers[0]),
        output_eps(numbers[1]),
        scale(numbers[2]) {}
};

template <typename T>
void gather(const T* from, const int64_t* rows, int64_t R, int64_t C, T* to) {
  for (int64_t r = 0; r < R; ++r)
    __builtin_memcpy(to + r * C, from + rows[r] * C, static_cast<size_t>(C) * sizeof(T));
}

template <typename T>
class Encoder {
 public:
  // `room` rows of `wide` and of `narrow` elements, and of `columns` integers, fit into the buffers
  Encoder(int dtype, bool int8, int64_t T_, int64_t room, int64_t B, int64_t C, int64_t wide,
          int64_t narrow, int64_t columns, int threads)
      : dtype_(dtype),
        int8_(int8),
        tokens_(T_),
        B_(B),
        C_(C),
        threads_(threads),
        wide_(1, floats(room * wide)),
        narrow_(5, floats(room * narrow)),
        stats_(2, room),
        quantised_(1, int8 ? quantised_floats(room, columns) : 0),
        scales_(1, int8 ? room : 0) {}

  void run(const T* x, const int32_t* cu, const Layer* layers, const int64_t* sizes,
           const float* numbers, int64_t n, const int64_t* rows, int64_t R, T* y) const {
    const T* in = x;
    for (int64_t i = 0; i < n; ++i) {
      const bool last = i == n - 1;
      // a layer reads one of two buffers and writes the other
      T* out = last ? y : buffer(3 + i % 2);
      const Settings settings(sizes + i * kLayerSizes, numbers + i * kLayerNumbers);
      layer(layers[i], settings, in, cu, last ? rows : nullptr, last ? R : 0, out);
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
  void up(const T* x, const Layer& w, const Settings& s, T* h, int64_t M) const {
    if (int8_)
      linear_int8(x, w.up, w.up_bias, s.tanh ? kGeluTanh : kGelu, h, M, s.F, C_);
    else
      feed_forward_up(dtype_, kFloat32, s.tanh, x, nullptr, w.up, w.up_bias, nullptr, h, M, s.F, C_,
                      threads_);
  }
  // y = b in every row: the output of a block without heads or columns
  void fill(const float* b, T* y, int64_t M) const {
    for (int64_t i = 0; i < M; ++i)
      for (int64_t c = 0; c < C_; ++c) store1(y + i * C_ + c, b[c]);
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

  void layer(const Layer& w, const Settings& s, const T* in, const int32_t* cu, const int64_t* rows,
             int64_t R, T* out) const {
    // pruned heads make the attention narrower than the layer
    const int64_t A = s.H * s.D;
    T* wide = reinterpret_cast<T*>(wide_[0]);
    T *context = buffer(0), *y = buffer(1), *middle = buffer(2);
    if (s.H) {
      linear(in, w.qkv, w.qkv_bias, wide, tokens_, 3 * A, C_);
      attention_fwd(dtype_, wide, cu, context, nullptr, tokens_, B_, s.H, s.H, s.D, s.scale, -1, -1,
                    nullptr, 0, false, nullptr, 0, nullptr, 0, 0, 1.0f, threads_);
    }
    int64_t M = tokens_;
    const T* residual = in;
    if (rows) {
      // the wide buffer is free until the feed-forward
      gather(in, rows, R, C_, middle);
      gather(context, rows, R, A, wide);
      context = wide;
      residual = middle;
      M = R;
    }
    if (s.H)
      linear(context, w.out, w.out_bias, y, M, C_, A);
    else
      fill(w.out_bias, y, M);
    add_norm(y, residual, w.attention_norm, w.attention_norm_bias, s.attention_eps, middle, M);
    if (s.F) {
      up(middle, w, s, wide, M);
      linear(wide, w.down, w.down_bias, y, M, C_, s.F);
    } else {
      fill(w.down_bias, y, M);
    }
    add_norm(y, middle, w.output_norm, w.output_norm_bias, s.output_eps, out, M);
  }

  int dtype_;
  bool int8_;
  int64_t tokens_, B_, C_;
  int threads_;
  Scratch wide_, narrow_, stats_, quantised_, scales_;
};

}  // namespace

void encoder_infer(int dtype, bool int8, const void* x, const int32_t* cu_seqlens,
                   const int64_t* layers, const int64_t* sizes, const float* numbers, int64_t n,
                   const int64_t* rows, int64_t R, void* y, int64_t T, int64_t B, int64_t C,
                   int threads) {
  int64_t wide = 0, narrow = C, columns = 0;
  const auto* table = reinterpret_cast<const Layer*>(layers);
  for (int64_t i = 0; i < n; ++i) {
    const Settings s(sizes + i * kLayerSizes, numbers + i * kLayerNumbers);
    wide = imax(wide, imax(3 * s.H * s.D, s.F));
    narrow = imax(narrow, s.H * s.D);
    if (!int8) continue;
    const float* weights[] = {table[i].qkv, table[i].out, table[i].up, table[i].down};
    for (const float* w : weights)
      if (w) columns = imax(columns, columns_of(w));
  }
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    const Encoder<E> encoder(dtype, int8, T, imax(T, R), B, C, wide, narrow, columns, threads);
    encoder.run(static_cast<const E*>(x), cu_seqlens, table, sizes, numbers, n, rows, R,
                static_cast<E*>(y));
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
