// linear's products are the library's; this is the bias's gradient, a sum over rows.
#include "columns.cuh"
#include "entries.h"

namespace fastbert {
namespace {

constexpr int kBatch = 4;

// partial[block] = the sum of this block's rows of dy
template <typename T>
__global__ void __launch_bounds__(32 * kColumnThreads)
    linear_bwd_db_kernel(const T* __restrict__ dy,     // (N, F), rows `stride` apart
                         float* __restrict__ partial,  // (blocks, F)
                         int64_t N, int F, int64_t stride, bool wide) {
  using C = Columns<T>;
  const int col = C::col();
  const int64_t step = C::step();
  // if the stride is aligned but F is not, only the last pack is partial
  const bool whole = wide && col + C::kV <= F;
  float sums[C::kV] = {};
  for (int64_t first = C::first_row(); first < N; first += kBatch * step) {
    Pack<T, C::kV> packs[kBatch];
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      const int64_t row = first + r * step;
      // past the last row: with 0 columns the pack is zeros
      packs[r] = load_pack<C::kV>(dy + (row < N ? row : 0) * stride, col, row < N ? F : 0, whole);
    }
#pragma unroll
    for (int r = 0; r < kBatch; ++r)
#pragma unroll
      for (int i = 0; i < C::kV; ++i) sums[i] += widen(packs[r].at[i]);
  }
  C::store_sums(sums, partial, F);
}

}  // namespace

void linear_bwd_db(int dtype, const void* dy, int64_t stride, float* partial, float* db, int blocks,
                   int64_t T, int64_t N, int device, cudaStream_t stream) {
  const Launch launch("linear_bwd_db", T, N, device, stream);
  by_dtype(dtype, [&](auto t) {
    using E = decltype(t);
    using C = Columns<E>;
    const bool wide = aligned(stride, C::kV, dy);
    linear_bwd_db_kernel<E><<<C::grid(blocks, N), C::block(), 0, stream>>>(
        static_cast<const E*>(dy), partial, T, static_cast<int>(N), stride, wide);
  });
  launch.check();
  sum_partials(launch, partial, blocks, static_cast<int>(N), {db, kFloat32});
}

}  // namespace fastbert
