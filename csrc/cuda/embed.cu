// embed: gather, add, LayerNorm and dropout in one pass; backward without atomics.
//
// backward writes dz once, and embed_scatter sums it by id. A stable sort of the ids fixes the
// order of every sum. A block reads kChunk sorted positions and writes the sums of the segments of
// equal ids that lie inside. At most two segments cross its borders: it stores their partial sums,
// which a second kernel adds up.
#include <cmath>

#include "entries.h"
#include "rows.cuh"

namespace fastbert {
namespace {

// table[ids[row]]; without ids table[row]. An id out of range gives NaN
struct Lookup {
  const int64_t* ids;  // (N,), or null
  Table table;         // (size, C), or null: adds nothing
  int64_t size;
};

struct Lookups {
  Lookup word, position, type;
};

template <typename R>
__device__ inline void add_looked_up(R& z, const Lookup& lookup, int64_t row, int C, bool wide) {
  if (!lookup.table.data) return;
  const int64_t id = lookup.ids ? lookup.ids[row] : row;
  if (!lookup.ids || (id >= 0 && id < lookup.size))
    z.add(lookup.table, id, C, wide);
  else
    z.fill(NAN);
}

template <typename R>
__device__ inline void total(R& z, const Lookups& from, int64_t row, int C, bool wide) {
  z.fill(0.f);
  add_looked_up(z, from.word, row, C, wide);
  add_looked_up(z, from.position, row, C, wide);
  add_looked_up(z, from.type, row, C, wide);
}

// y = dropout(LayerNorm(word[ids] + position[positions] + type[types]))
template <typename T, typename S>
__global__ void __launch_bounds__(S::kForwardBlock)
    embed_fwd_kernel(Lookups from,
                     Table weight,  // (C,)
                     Table bias,    // (C,)
                     T* y,          // (N, C)
                     float* mean,   // (N,)
                     float* rstd,   // (N,)
                     Dropout dropout, int64_t N, int C, float eps, bool wide) {
  const int64_t row = forward_row<S>();
  if (row >= N) return;
  Row<T, S> z;
  total(z, from, row, C, wide);
  const float2 moments = z.normalise(C, eps);
  z.affine(weight, bias, C, wide);
  z.drop(dropout, row);
  z.store(y + row * C, C, wide);
  if (threadIdx.x % S::kThreads == 0) {
    mean[row] = moments.x;
    rstd[row] = moments.y;
  }
}

// dz, the gradient of the sum of tables, and this block's sums of g xhat and g, g = dropout(dy)
template <typename T, typename S>
__global__ void __launch_bounds__(S::kBackwardBlock, S::kBackwardBlocks)
    embed_bwd_kernel(const T* dy,  // (N, C)
                     Lookups from,
                     Table weight,       // (C,)
                     const float* mean,  // (N,)
                     const float* rstd,  // (N,)
                     float* dz,          // (N, C)
                     float* partial,     // (2, blocks, C)
                     Dropout dropout, int64_t N, int C, bool wide) {
  extern __shared__ __align__(16) float shared[];
  Sums<T, S> sums;
  sums.start();
  for (int64_t row = backward_row<S>(); row < N; row += backward_step<S>()) {
    Row<T, S> g, z;
    total(z, from, row, C, wide);
    g.load(dy + row * C, C, wide);
    g.drop(dropout, row);
    sums.backward(g, z, weight, mean[row], rstd[row], C, wide);
    g.store(dz + row * C, C, wide);
  }
  sums.store(partial, shared, C, wide);
}

// sorted positions of a block, columns of a thread, threads of the first kernel's block, rows of 32
// threads of the second's
constexpr int kChunk = 32, kColumns = 4, kAcross = 64, kCrossRows = 8;

__global__ void __launch_bounds__(kAcross)
    embed_bwd_segments_kernel(const float* __restrict__ dz,       // (N, C)
                              const int64_t* __restrict__ ids,    // (N,) sorted
                              const int64_t* __restrict__ order,  // (N,)
                              MutableTable grad,                  // (V, C)
                              float* __restrict__ partial,        // (chunks, 2, C)
                              int64_t padding, int64_t N, int64_t V, int C, bool wide) {
  // ids[first - 1 .. first + kChunk]; beyond the ends -1, an id that is never summed
  __shared__ int64_t near[kChunk + 2], rows[kChunk];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk;
  const int count = static_cast<int>(first + kChunk < N ? kChunk : N - first);
  for (int i = threadIdx.x; i < kChunk + 2; i += kAcross) {
    const int64_t at = first + i - 1;
    near[i] = at >= 0 && at < N ? ids[at] : -1;
    if (i < count) rows[i] = order[first + i];
  }
  __syncthreads();
  const int col = (blockIdx.y * kAcross + threadIdx.x) * kColumns;
  partial += static_cast<int64_t>(blockIdx.x) * 2 * C;
  // whether this segment started in an earlier chunk
  bool came = first > 0 && near[0] == near[1];
  float sum[kColumns] = {};
  Pack<float, kColumns> next = load_pack<kColumns>(dz + rows[0] * C, col, C, wide);
  for (int i = 0; i < count; ++i) {
    const Pack<float, kColumns> pack = next;
    if (i + 1 < count) next = load_pack<kColumns>(dz + rows[i + 1] * C, col, C, wide);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[c] += pack.at[c];
    const int64_t id = near[i + 1];
    const bool follows = first + i + 1 < N && near[i + 2] == id;
    if (i + 1 < count && follows) continue;
    if (came)
      store(partial, col, C, wide, sum);
    else if (follows)
      store(partial + C, col, C, wide, sum);
    else if (id != padding && id >= 0 && id < V)
      grad.store(id, col, C, wide, sum);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[c] = 0.f;
    came = false;
  }
}

// adds the later chunks' sums of a segment that starts in this chunk and continues
__global__ void __launch_bounds__(32 * kCrossRows)
    embed_bwd_crossing_kernel(const int64_t* __restrict__ ids,    // (N,) sorted
                              MutableTable grad,                  // (V, C)
                              const float* __restrict__ partial,  // (chunks, 2, C)
                              int64_t padding, int64_t N, int64_t V, int C, bool wide) {
  const int64_t chunk = blockIdx.x, chunks = gridDim.x, stop = (chunk + 1) * kChunk;
  if (stop >= N) return;
  const int64_t id = ids[stop - 1];
  // the last segment must continue in the next chunk, and must start in this one
  if (ids[stop] != id || (chunk > 0 && ids[chunk * kChunk - 1] == id)) return;
  if (id == padding || id < 0 || id >= V) return;
  const int col = (blockIdx.y * 32 + threadIdx.x) * kColumns;
  float sum[kColumns] = {};
  for (int64_t later = chunk + 1 + threadIdx.y; later < chunks && ids[later * kChunk] == id;
       later += kCrossRows) {
    const auto pack = load_pack<kColumns>(partial + later * 2 * C, col, C, wide);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[c] += pack.at[c];
  }
  __shared__ float parts[kCrossRows][32][kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) parts[threadIdx.y][threadIdx.x][c] = sum[c];
  __syncthreads();
  if (threadIdx.y > 0) return;
  load(partial + (chunk * 2 + 1) * C, col, C, wide, sum);
#pragma unroll
  for (int row = 0; row < kCrossRows; ++row)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[c] += parts[row][threadIdx.x][c];
  grad.store(id, col, C, wide, sum);
}

}  // namespace

void embed_fwd(int dtype, const int64_t* ids, const int64_t* positions, const int64_t* types,
               const void* word, int word_dtype, int64_t V, const void* position,
               int position_dtype, int64_t P, const void* type, int type_dtype, int64_t Y,
               const void* weight, int weight_dtype, const void* bias, int bias_dtype, void* y,
               float* mean, float* rstd, const int64_t* seed, int64_t site, int64_t threshold,
               float scale, int64_t N, int64_t C, float eps, int device, cudaStream_t stream) {
  const Launch launch("embed_fwd", N, C, device, stream);
  const Lookups from = {{ids, {word, word_dtype}, V},
                        {positions, {position, position_dtype}, P},
                        {types, {type, type_dtype}, Y}};
  const Dropout dropout = make_dropout(seed, site, threshold, scale, nullptr);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const bool wide = aligned(C, kVec<T>, word, position, type, weight, bias, y);
    by_width<T>(C, [&](auto s) {
      using S = decltype(s);
      embed_fwd_kernel<T, S><<<cdiv(N, S::kForwardRows), S::kForwardBlock, 0, stream>>>(
          from, {weight, weight_dtype}, {bias, bias_dtype}, static_cast<T*>(y), mean, rstd, dropout,
          N, static_cast<int>(C), eps, wide);
    });
  });
  launch.check();
}

void embed_bwd(int dtype, const void* dy, const int64_t* ids, const int64_t* positions,
               const int64_t* types, const void* word, int word_dtype, int64_t V,
               const void* position, int position_dtype, int64_t P, const void* type,
               int type_dtype, int64_t Y, const void* weight, int weight_dtype, const float* mean,
               const float* rstd, float* dz, float* partial, void* dweight, int dweight_dtype,
               float* dbias, int blocks, const int64_t* seed, int64_t site, int64_t threshold,
               float scale, int64_t N, int64_t C, int device, cudaStream_t stream) {
  const Launch launch("embed_bwd", N, C, device, stream);
  const Lookups from = {{ids, {word, word_dtype}, V},
                        {positions, {position, position_dtype}, P},
                        {types, {type, type_dtype}, Y}};
  const Dropout dropout = make_dropout(seed, site, threshold, scale, nullptr);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const bool wide = aligned(C, kVec<T>, dy, word, position, type, weight, dz, partial);
    by_width<T>(C, [&](auto s) {
      using S = decltype(s);
      embed_bwd_kernel<T, S><<<blocks, S::kBackwardBlock, backward_shared<S>(C), stream>>>(
          static_cast<const T*>(dy), from, {weight, weight_dtype}, mean, rstd, dz, partial, dropout,
          N, static_cast<int>(C), wide);
    });
  });
  launch.check();
  sum_partials(launch, partial, blocks, static_cast<int>(C), {dweight, dweight_dtype},
               {dbias, kFloat32});
}

int embed_chunk() { return kChunk; }

void embed_scatter(const float* dz, const int64_t* ids, const int64_t* order, void* grad, int dtype,
                   float* partial, int64_t padding, int64_t N, int64_t V, int64_t C, int device,
                   cudaStream_t stream) {
  const Launch launch("embed_bwd", N, C, device, stream);
  const bool wide = aligned(C, kColumns, dz, grad, partial);
  const unsigned chunks = cdiv(N, kChunk);
  const int width = static_cast<int>(C);
  embed_bwd_segments_kernel<<<dim3(chunks, cdiv(C, kAcross * kColumns)), kAcross, 0, stream>>>(
      dz, ids, order, {grad, dtype}, partial, padding, N, V, width, wide);
  launch.check();
  embed_bwd_crossing_kernel<<<dim3(chunks, cdiv(C, 32 * kColumns)), dim3(32, kCrossRows), 0,
                              stream>>>(ids, {grad, dtype}, partial, padding, N, V, width, wide);
  launch.check();
}

}  // namespace fastbert
