// The encoder for inference: the kernels of every layer one after the other on buffers that stay
// warm from layer to layer, with nothing of Python in between.
#include "encoder.h"

#include "attention.h"
#include "dropout_add_layer_norm.h"
#include "feed_forward.h"
#include "linear.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

constexpr int64_t kLayerFields = 12;

// the order of fastbert/runners/freeze.py
struct Layer {
  const float *qkv, *qkv_bias, *out, *out_bias, *norm1, *norm1_bias;
  const float *up, *up_bias, *down, *down_bias, *norm2, *norm2_bias;
};
static_assert(sizeof(Layer) == kLayerFields * sizeof(int64_t), "one address a field");

template <typename T>
void gather(const T* from, const int64_t* rows, int64_t R, int64_t C, T* to) {
  for (int64_t r = 0; r < R; ++r)
    __builtin_memcpy(to + r * C, from + rows[r] * C, static_cast<size_t>(C) * sizeof(T));
}

template <typename T>
class Encoder {
 public:
  // `room` tokens fit into the buffers
  Encoder(int dtype, int64_t T_, int64_t room, int64_t B, int64_t H, int64_t D, int64_t F_,
          float eps, bool tanh, int threads)
      : dtype_(dtype),
        tokens_(T_),
        B_(B),
        H_(H),
        D_(D),
        C_(H * D),
        F_wide_(F_),
        eps_(eps),
        tanh_(tanh),
        threads_(threads),
        wide_(1, floats(room * imax(3 * H * D, F_))),
        narrow_(5, floats(room * H * D)),
        stats_(2, room) {}

  void run(const T* x, const int32_t* cu, const Layer* layers, int64_t n, const int64_t* rows,
           int64_t R, T* y) const {
    const T* in = x;
    for (int64_t i = 0; i < n; ++i) {
      const bool last = i == n - 1;
      // a layer reads one of two buffers and writes the other
      T* out = last ? y : buffer(3 + i % 2);
      layer(layers[i], in, cu, last ? rows : nullptr, last ? R : 0, out);
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
    linear_fwd(dtype_, kFloat32, x, nullptr, nullptr, nullptr, 1, w, b, y, M, N, K, threads_);
  }
  void add_norm(const T* x, const T* residual, const float* w, const float* b, T* y,
                int64_t M) const {
    dropout_add_layer_norm_fwd(dtype_, x, residual, w, b, y, nullptr, stats_[0], stats_[1], M, C_,
                               eps_, nullptr, 0, 0, 1.0f, nullptr, threads_);
  }

  void layer(const Layer& w, const T* in, const int32_t* cu, const int64_t* rows, int64_t R,
             T* out) const {
    T* wide = reinterpret_cast<T*>(wide_[0]);
    T *context = buffer(0), *y = buffer(1), *middle = buffer(2);
    linear(in, w.qkv, w.qkv_bias, wide, tokens_, 3 * C_, C_);
    attention_fwd(dtype_, wide, cu, context, nullptr, tokens_, B_, H_, D_,
                  1.0f / sqrt1(static_cast<float>(D_)), false, nullptr, 0, 0, 1.0f, threads_);
    int64_t M = tokens_;
    const T* residual = in;
    if (rows) {
      // the wide buffer is free until the feed-forward
      gather(in, rows, R, C_, middle);
      gather(context, rows, R, C_, wide);
      context = wide;
      residual = middle;
      M = R;
    }
    linear(context, w.out, w.out_bias, y, M, C_, C_);
    add_norm(y, residual, w.norm1, w.norm1_bias, middle, M);
    feed_forward_up(dtype_, kFloat32, tanh_, middle, nullptr, w.up, w.up_bias, nullptr, wide, M,
                    F_wide_, C_, threads_);
    linear(wide, w.down, w.down_bias, y, M, C_, F_wide_);
    add_norm(y, middle, w.norm2, w.norm2_bias, out, M);
  }

  int dtype_;
  int64_t tokens_, B_, H_, D_, C_, F_wide_;
  float eps_;
  bool tanh_;
  int threads_;
  Scratch wide_, narrow_, stats_;
};

}  // namespace

void encoder_infer(int dtype, const void* x, const int32_t* cu_seqlens, const int64_t* layers,
                   int64_t n, const int64_t* rows, int64_t R, void* y, int64_t T, int64_t B,
                   int64_t H, int64_t D, int64_t F_, float eps, bool tanh, int threads) {
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    const Encoder<E> encoder(dtype, T, imax(T, R), B, H, D, F_, eps, tanh, threads);
    encoder.run(static_cast<const E*>(x), cu_seqlens, reinterpret_cast<const Layer*>(layers), n,
                rows, R, static_cast<E*>(y));
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
