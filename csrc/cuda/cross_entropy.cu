// cross_entropy: a block per row. It holds up to 32760 logits in registers and reads them once; a
// longer row takes an online log-sum-exp and is read again for its gradient.
//
// backward computes the softmax again: exp(z - lse) would have the rounding error of lse, which is
// large for large logits.
#include <cmath>

#include "entries.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "types.cuh"

namespace fastbert {
namespace {

// largest z, and the sum of exp(z - largest)
struct Softmax {
  float largest, sum;

  __device__ void scale_to(float top) {
    // without a logit so far the maximum is -inf, which must not be subtracted, and the sum is 0
    sum *= largest == -INFINITY && sum == 0.f ? 0.f : expf(largest - top);
    largest = top;
  }
  __device__ void join_warp() {
    scale_to(warp_max(largest));
    sum = warp_sum(sum);
  }
};

// One row of `width` elements, of which V count, in packs that begin at multiples of 16 bytes even
// if the row does not: the first and the last pack may be partial.
template <typename T>
struct LogitRow {
  static constexpr int kV = kVec<T>;
  T* row;
  Table bias;  // (V,), or null
  int V, width;
  int before;  // elements between a multiple of 16 bytes and the row

  __device__ LogitRow(T* row, Table bias, int V, int width)
      : row(row), bias(bias), V(V), width(width) {
    before = static_cast<int>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T));
  }
  __device__ int packs() const { return (width + before + kV - 1) / kV; }
  __device__ int col(int pack) const { return pack * kV - before; }
  __device__ float logit(int col) const {
    float b[1] = {0.f};
    if (bias.data) bias.load<T>(0, col, V, false, b);
    return widen(row[col]) + b[0];
  }
  // z with the bias, -inf from V on
  __device__ void load(int col, float (&z)[kV]) const {
    if (col >= 0 && col + kV <= width) {
      fastbert::load(row, col, width, true, z);
      if (bias.data) {
        float b[kV];
        const bool wide =
            before == 0 && col + kV <= V && (reinterpret_cast<uintptr_t>(bias.data) & 15) == 0;
        bias.load<T>(0, col, V, wide, b);
#pragma unroll
        for (int i = 0; i < kV; ++i) z[i] += b[i];
      }
#pragma unroll
      for (int i = 0; i < kV; ++i) z[i] = col + i < V ? z[i] : -INFINITY;
    } else {
#pragma unroll
      for (int i = 0; i < kV; ++i) z[i] = col + i >= 0 && col + i < V ? logit(col + i) : -INFINITY;
    }
  }
  __device__ void store(int col, const float (&values)[kV]) const {
    if (col >= 0 && col + kV <= width) {
      // the columns follow the logits' alignment, and the gradient's may differ
      const bool wide = (reinterpret_cast<uintptr_t>(row + col) & 15) == 0;
      fastbert::store(row, col, width, wide, values);
    } else {
#pragma unroll
      for (int i = 0; i < kV; ++i)
        if (col + i >= 0 && col + i < width) row[col + i] = narrow<T>(values[i]);
    }
  }
};

// (softmax - onehot) factor; `powers` are exp(z - this thread's largest), and `scale` corrects them
template <int N>
__device__ inline void to_gradient(float (&powers)[N], int col, int64_t label, float scale,
                                   float factor) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    powers[i] = (powers[i] * scale - (col + i == label ? 1.f : 0.f)) * factor;
}

template <int THREADS>
__device__ inline Softmax join_block(Softmax mine) {
  __shared__ Softmax parts[THREADS / 32];
  mine.join_warp();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  mine = lane < THREADS / 32 ? parts[lane] : Softmax{-INFINITY, 0.f};
  mine.join_warp();
  return mine;
}

template <int N>
__device__ inline void join(Softmax& mine, float (&z)[N], bool keep) {
  float largest = mine.largest;
#pragma unroll
  for (int i = 0; i < N; ++i) largest = fmaxf(largest, z[i]);
  mine.scale_to(largest);
  const float shift = largest == -INFINITY ? 0.f : largest;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float power = expf(z[i] - shift);
    mine.sum += power;
    if (keep) z[i] = power;
  }
}

// A row in a thread's PACKS, or in a loop if there are none. BLOCKS fit on a multiprocessor
template <int THREADS, int PACKS_OF_16_BIT, int BLOCKS>
struct Block {
  static constexpr int kThreads = THREADS, kElements = 8 * PACKS_OF_16_BIT, kBlocks = BLOCKS;
};

// loss = log sum exp(z - max) + max - z[label],  gradient = (softmax(z) - onehot(label)) dloss
template <typename T, typename B>
__global__ void __launch_bounds__(B::kThreads, B::kBlocks)
    cross_entropy_kernel(const T* logits,        // (N, width), V of them used
                         Table bias,             // (V,), or null
                         const int64_t* labels,  // (N,)
                         const float* dloss,     // (N,), or null: ones
                         float* loss,            // (N,), or null
                         float* lse,             // (N,), or null
                         T* gradient,            // (N, width), may be logits; or null
                         int64_t ignore_index, int V, int width) {
  constexpr int kV = kVec<T>, kPacks = B::kElements / kV;
  const int64_t row = blockIdx.x, label = labels[row];
  const LogitRow<const T> from(logits + row * width, bias, V, width);
  const LogitRow<T> to(gradient ? gradient + row * width : nullptr, bias, V, width);
  if (label == ignore_index) {
    const float zeros[kV] = {};
    if (gradient)
      for (int p = threadIdx.x; p < to.packs(); p += B::kThreads) to.store(to.col(p), zeros);
    if (threadIdx.x == 0 && loss) loss[row] = lse[row] = 0.f;
    return;
  }
  // memory-safe: a label out of range gives NaN
  const bool valid = label >= 0 && label < V;
  const float factor = valid ? (dloss ? dloss[row] : 1.f) : NAN;
  // read before the gradient may overwrite it
  const float at_label = valid && threadIdx.x == 0 ? from.logit(static_cast<int>(label)) : NAN;
  Softmax mine{-INFINITY, 0.f};
  float z[kPacks > 0 ? kPacks : 1][kV];
  if constexpr (kPacks > 0) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      from.load(from.col(k * B::kThreads + threadIdx.x), z[k]);
#pragma unroll
      for (int i = 0; i < kV; ++i) mine.largest = fmaxf(mine.largest, z[k][i]);
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) join(mine, z[k], true);
  } else {
    for (int p = threadIdx.x; p < from.packs(); p += B::kThreads) {
      from.load(from.col(p), z[0]);
      join(mine, z[0], false);
    }
  }
  const Softmax all = join_block<B::kThreads>(mine);
  if (threadIdx.x == 0 && loss) {
    loss[row] = logf(all.sum) + (all.largest - at_label);
    lse[row] = all.largest + logf(all.sum);
  }
  if (!gradient) return;
  if constexpr (kPacks > 0) {
    const float shift = mine.largest == -INFINITY ? 0.f : expf(mine.largest - all.largest);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int col = from.col(k * B::kThreads + threadIdx.x);
      to_gradient(z[k], col, label, shift / all.sum, factor);
      to.store(col, z[k]);
    }
  } else {
    for (int p = threadIdx.x; p < from.packs(); p += B::kThreads) {
      const int col = from.col(p);
      from.load(col, z[0]);
#pragma unroll
      for (int i = 0; i < kV; ++i) z[0][i] = expf(z[0][i] - all.largest);
      to_gradient(z[0], col, label, 1.f / all.sum, factor);
      to.store(col, z[0]);
    }
  }
}

// the template budget: these blocks times three element types. An unaligned row takes a pack more
template <typename F>
void by_columns(int64_t width, F run) {
  if (width <= 1016)
    run(Block<128, 1, 8>{});
  else if (width <= 8184)
    run(Block<256, 4, 2>{});
  else if (width <= 32760)
    run(Block<1024, 4, 1>{});
  else
    run(Block<512, 0, 2>{});
}

}  // namespace

void cross_entropy(int dtype, const void* logits, const void* bias, int bias_dtype,
                   const int64_t* labels, const float* dloss, float* loss, float* lse,
                   void* gradient, int64_t ignore_index, int64_t N, int64_t V, int64_t width,
                   int device, cudaStream_t stream) {
  const Launch launch("cross_entropy", N, V, device, stream);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    by_columns(width, [&](auto b) {
      using B = decltype(b);
      cross_entropy_kernel<T, B><<<static_cast<unsigned>(N), B::kThreads, 0, stream>>>(
          static_cast<const T*>(logits), {bias, bias_dtype}, labels, dloss, loss, lse,
          static_cast<T*>(gradient), ignore_index, static_cast<int>(V), static_cast<int>(width));
    });
  });
  launch.check();
}

}  // namespace fastbert
