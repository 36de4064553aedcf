// Whole rows in registers, for the ops that normalise: a warp holds a row of up to 768 elements
// (fp32: 256), a block one of up to 8192.
#pragma once

#include "partials.cuh"
#include "philox.cuh"
#include "reduce.cuh"
#include "types.cuh"

namespace fastbert {

// ELEMENTS of a row in each of its THREADS. A persistent backward holds two sums and two rows:
// BLOCKS of WIDTH threads fit on a multiprocessor without spilling.
template <int THREADS, int ELEMENTS, int WIDTH, int BLOCKS>
struct Shape {
  static constexpr int kThreads = THREADS, kElements = ELEMENTS;
  static constexpr int kForwardBlock = THREADS > 128 ? THREADS : 128;
  static constexpr int kForwardRows = kForwardBlock / THREADS;
  static constexpr int kBackwardBlock = WIDTH, kBackwardBlocks = BLOCKS;
  static constexpr int kBackwardRows = WIDTH / THREADS;
};

// the template budget of every op of rows: these shapes for each element type
template <typename T, typename F>
void by_width(int64_t C, F run) {
  if (C <= 256) return run(Shape<32, 8, 384, 2>{});
  // in fp32 a warp's share of 768 columns would spill in a backward
  if constexpr (sizeof(T) == 2)
    if (C <= 768) return run(Shape<32, 24, 384, 1>{});
  if (C <= 1024) return run(Shape<128, 8, 128, 5>{});
  run(Shape<512, 16, 512, 1>{});
}

// A thread's part of a row: chunk k is kVec columns from `col(k)` on, adjacent to those of the
// neighbouring threads, so that a warp reads 512 bytes at a time.
template <typename T, typename S>
struct Row {
  static constexpr int kV = kVec<T>, kChunks = S::kElements / kV;
  float at[kChunks][kV];

  static __device__ int col(int k) {
    return (k * S::kThreads + static_cast<int>(threadIdx.x) % S::kThreads) * kV;
  }
  __device__ void load(const T* row, int C, bool wide) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) fastbert::load(row, col(k), C, wide, at[k]);
  }
  template <typename O>
  __device__ void store(O* row, int C, bool wide) const {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) fastbert::store(row, col(k), C, wide, at[k]);
  }
  __device__ void add(const T* row, int C, bool wide) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      float more[kV];
      fastbert::load(row, col(k), C, wide, more);
#pragma unroll
      for (int i = 0; i < kV; ++i) at[k][i] += more[i];
    }
  }
  __device__ void add(const Table& table, int64_t row, int C, bool wide) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      float more[kV];
      table.load<T>(row, col(k), C, wide, more);
#pragma unroll
      for (int i = 0; i < kV; ++i) at[k][i] += more[i];
    }
  }
  __device__ float operator()(int k, int i) const { return at[k][i]; }
  __device__ void fill(float value) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
#pragma unroll
      for (int i = 0; i < kV; ++i) at[k][i] = value;
  }
  __device__ void drop(const Dropout& dropout, int64_t row) {
    if (!dropout.enabled()) return;
    const uint32_t number = dropout.number(row);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) dropout.apply(number, col(k), at[k]);
  }
  // at becomes (at - mean) rstd; the variance sums centred values: E[x^2] - mean^2 would cancel
  __device__ float2 normalise(int C, float eps) {
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
#pragma unroll
      for (int i = 0; i < kV; ++i) sum += col(k) + i < C ? at[k][i] : 0.f;
    const float mean = row_sum<S::kThreads>(sum) / C;
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        at[k][i] -= mean;
        squares += col(k) + i < C ? at[k][i] * at[k][i] : 0.f;
      }
    const float rstd = rsqrtf(row_sum<S::kThreads>(squares) / C + eps);
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
#pragma unroll
      for (int i = 0; i < kV; ++i) at[k][i] *= rstd;
    return make_float2(mean, rstd);
  }
  // at becomes at rstd with rstd = 1 / sqrt(mean(at^2) + eps); at is 0 outside the row
  __device__ float normalise_rms(int C, float eps) {
    float squares = 0.f;
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
#pragma unroll
      for (int i = 0; i < kV; ++i) squares += at[k][i] * at[k][i];
    const float rstd = rsqrtf(row_sum<S::kThreads>(squares) / C + eps);
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
#pragma unroll
      for (int i = 0; i < kV; ++i) at[k][i] *= rstd;
    return rstd;
  }
  // at becomes at weight + bias; either may be null
  __device__ void affine(const Table& weight, const Table& bias, int C, bool wide) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      float w[kV];
      if (weight.data) {
        weight.load<T>(0, col(k), C, wide, w);
#pragma unroll
        for (int i = 0; i < kV; ++i) at[k][i] *= w[i];
      }
      if (bias.data) {
        bias.load<T>(0, col(k), C, wide, w);
#pragma unroll
        for (int i = 0; i < kV; ++i) at[k][i] += w[i];
      }
    }
  }
};

// this thread's row in the grid of a forward
template <typename S>
__device__ inline int64_t forward_row() {
  return static_cast<int64_t>(blockIdx.x) * S::kForwardRows + threadIdx.x / S::kThreads;
}

// A persistent block's sums over its rows, for the gradients of weight and bias. Centred = false is
// RMSNorm: no mean, no bias.
template <typename T, typename S, bool Centred = true>
struct Sums {
  using R = Row<T, S>;
  R weight, bias;

  __device__ void start() {
    weight.fill(0.f);
    bias.fill(0.f);
  }
  // dy in g becomes dz, for y = xhat weight + bias and xhat = (z - mean) rstd; with g = dy weight
  //   dz = rstd (g - mean(g) - xhat mean(g xhat)),   not centred: without mean(g), mean = 0
  // dy xhat and dy are added to the sums. dy is 0 outside the row
  template <typename Z>
  __device__ void backward(R& g, const Z& z, const Table& w, float mean, float rstd, int C,
                           bool wide) {
    float plain = 0.f, along = 0.f;
#pragma unroll
    for (int k = 0; k < R::kChunks; ++k) {
      float scale[R::kV];
      if (w.data) w.load<T>(0, R::col(k), C, wide, scale);
#pragma unroll
      for (int i = 0; i < R::kV; ++i) {
        const float xhat = (z(k, i) - mean) * rstd;
        weight.at[k][i] += g.at[k][i] * xhat;
        if constexpr (Centred) bias.at[k][i] += g.at[k][i];
        if (w.data) g.at[k][i] *= scale[i];
        if constexpr (Centred) plain += g.at[k][i];
        along += g.at[k][i] * xhat;
      }
    }
    if constexpr (Centred) {
      const float2 sums = row_sums<S::kThreads>(plain, along);
      plain = sums.x / C;
      along = sums.y / C;
    } else {
      along = row_sum<S::kThreads>(along) / C;
    }
#pragma unroll
    for (int k = 0; k < R::kChunks; ++k)
#pragma unroll
      for (int i = 0; i < R::kV; ++i)
        g.at[k][i] = rstd * (g.at[k][i] - plain - (z(k, i) - mean) * rstd * along);
  }
  // stores the sums in partial (2, blocks, C), (1, blocks, C) if not centred; `shared`: room for C
  // floats if a warp holds a row
  __device__ void store(float* partial, float* shared, int C, bool wide) {
    float* at = partial + static_cast<int64_t>(blockIdx.x) * C;
    store_one(weight, at, shared, C, wide);
    if constexpr (Centred)
      store_one(bias, at + static_cast<int64_t>(gridDim.x) * C, shared, C, wide);
  }

 private:
  static __device__ void store_one(R& sum, float* to, float* shared, int C, bool wide) {
    if constexpr (S::kThreads == 32) {
      constexpr int kWarps = S::kBackwardBlock / 32;
      // the warps add one after the other, in a fixed order; warp 0 is last and stores
      for (int warp = kWarps - 1; warp >= 0; --warp) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) / 32 != warp) continue;
#pragma unroll
        for (int k = 0; k < R::kChunks; ++k) {
          float before[R::kV];
          if (warp < kWarps - 1) {
            fastbert::load(shared, R::col(k), C, wide, before);
#pragma unroll
            for (int i = 0; i < R::kV; ++i) sum.at[k][i] += before[i];
          }
          fastbert::store(warp ? shared : to, R::col(k), C, wide, sum.at[k]);
        }
      }
    } else {
      sum.store(to, C, wide);
    }
  }
};

// A row that a backward keeps in its element type: half the registers in 16 bit.
template <typename T, typename S>
struct RawRow {
  using R = Row<T, S>;
  Pack<T, R::kV> at[R::kChunks];

  __device__ void load(const T* row, int C, bool wide) {
#pragma unroll
    for (int k = 0; k < R::kChunks; ++k) at[k] = load_pack<R::kV>(row, R::col(k), C, wide);
  }
  __device__ float operator()(int k, int i) const { return widen(at[k].at[i]); }
};

// a persistent backward: this thread's first row, the step to its next one, bytes of shared memory
template <typename S>
__device__ inline int64_t backward_row() {
  return static_cast<int64_t>(blockIdx.x) * S::kBackwardRows + threadIdx.x / S::kThreads;
}
template <typename S>
__device__ inline int64_t backward_step() {
  return static_cast<int64_t>(gridDim.x) * S::kBackwardRows;
}
template <typename S>
size_t backward_shared(int64_t C) {
  return S::kThreads == 32 ? C * sizeof(float) : 0;
}

}  // namespace fastbert
