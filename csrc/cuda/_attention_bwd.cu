// attention's backward, without atomics. With P the weights, M dropout's factor and delta =
// rowsum(dO O):
//
//   dV = (P M)^T dO,  dS = P (M dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q
//
// A sequence that fits shared memory is one block's work, all five products; each class of lengths
// has its own launch, so that short sequences get small blocks. Longer sequences take two kernels:
// one holds rows i and loops over keys for dQ and delta, one holds keys and loops over rows for dK
// and dV.
#include <algorithm>

#include "attention_bwd.cuh"
#include "entries.h"

namespace fastbert {
namespace {

// Whole sequences of more than `above` tokens and at most 16 per warp. A warp holds 16 keys and
// stores dS^T in shared memory, in panels of 64 rows i; for dQ it reads 16 rows i from there.
template <typename T, int W>
__global__ void __launch_bounds__(Shape<T, W>::kWhole * 2, W <= 64 ? 2 : 1)
    attention_bwd_kernel(const Attention a) {
  extern __shared__ __align__(128) unsigned char memory[];
  constexpr int kPass = Shape<T, W>::kPass;
  const Place at = place(a);
  const Rows<T> rows(a, at);
  if (at.b >= a.B) {
    if (a.above == 0)
      for (int part = 0; part < 3; ++part)
        zero_tail(rows.dqkv + part * rows.token, rows.wide, a.D, a.wide, a, at);
    return;
  }
  const int most = blockDim.x / 2, length = at.length;
  if (length <= a.above || length > most) return;
  Tile<T, W> tile[4];  // Q, K, V, dO
  for (int n = 0; n < 4; ++n) tile[n].data = reinterpret_cast<T*>(memory) + n * most * W;
  const Tile<T, 64> panels = {tile[3].data + most * W};
  float* lse = reinterpret_cast<float*>(panels.data + most * max(most, 64));
  float* delta = lse + most;
  const int padded = (length + 31) / 32 * 32, row = threadIdx.x / 32 * 16;
  for (int part = 0; part < 3; ++part)
    fetch(tile[part], padded, rows.qkv + part * rows.token, rows.wide, length, a.D, a.wide);
  fetch(tile[3], padded, rows.dout, rows.token, length, a.D, a.wide);
  Delta<T, W> products;
  products.fetch(rows.out + int64_t{row} * rows.token, rows.token, length - row, a.D, a.wide);
  for (int i = threadIdx.x; i < padded; i += blockDim.x) lse[i] = i < length ? rows.lse[i] : 0.f;
  const Bits bits(a.dropout, at.bh);
  copies_done();
  if (row < padded) products.finish(tile[3], row, delta);
  __syncthreads();
  KeySums<T, W> sums;
  if (row < length) {
    const Staying<T, W> kv = {tile[1], tile[2], row};
    for (int i0 = a.causal ? row / kPass * kPass : 0; i0 < length; i0 += kPass)
      sums.step(kv, tile[0], tile[3], lse, delta, i0, i0, row, length, a, bits,
                [&](int n, const float (&ds)[kPass / 8][4]) {
                  const int i = i0 + 8 * n;
                  const Tile<T, 64> panel = {panels.data + i / 64 * most * 64};
                  store_c(panel, row, i % 64, ds[n]);
                  store_c(panel, row, i % 64 + 8, ds[n + 1]);
                });
  }
  __syncthreads();
  if (row >= length) return;
  sums.write(tile[3], tile[2], row, rows.dqkv + int64_t{row} * rows.wide + rows.token, length - row,
             a);
  float dq[W / 8][4] = {};
  const Tile<T, 64> panel = {panels.data + row / 64 * most * 64};
  for (int j = 0; j < (a.causal ? row + 1 : length); j += 16) {
    FragmentA<T> ds;
    load_a_trans(ds, panel, j, row % 64);
    add_product(dq, ds, tile[1], j);
  }
  const float scale[2] = {a.scale, a.scale};
  write_sums(dq, scale, tile[0], row, rows.dqkv + int64_t{row} * rows.wide, rows.wide, length - row,
             a.D, a.wide);
}

// dQ and delta: a warp holds 16 rows and loops over keys
template <typename T, int W>
__global__ void __launch_bounds__(128, Shape<T, W>::kResident)
    attention_bwd_dq_kernel(const Attention a) {
  extern __shared__ __align__(128) unsigned char memory[];
  constexpr int kKeys = Shape<T, W>::kKeys, kN = kStep / 8;
  const Place at = place(a);
  const Rows<T> all(a, at);
  if (at.b >= a.B) {
    if (a.above == 0) zero_tail(all.dqkv, all.wide, a.D, a.wide, a, at);
    return;
  }
  const int rows = blockDim.x / 2, first = at.block * rows, length = at.length;
  if (length <= a.above || first >= length) return;
  const Tile<T, W> queries = {reinterpret_cast<T*>(memory)}, douts = {queries.data + rows * W};
  float* delta = reinterpret_cast<float*>(douts.data + (rows + 4 * kKeys) * W);
  const int stop = a.causal ? min(length, first + rows) : length;
  auto tile = [&](int number) -> Tile<T, W> { return {douts.data + (rows + number * kKeys) * W}; };
  auto fetch_keys = [&](int stage, int j0) {
    const int padded = min(kKeys, (stop - j0 + kStep - 1) / kStep * kStep);
    for (int part = 0; part < 2; ++part)
      fetch(tile(2 * stage + part), padded,
            all.qkv + int64_t{j0} * all.wide + (1 + part) * all.token, all.wide, length - j0, a.D,
            a.wide);
  };
  const int row = threadIdx.x / 32 * 16, i0 = first + row;
  fetch(queries, rows, all.qkv + int64_t{first} * all.wide, all.wide, length - first, a.D, a.wide);
  fetch(douts, rows, all.dout + int64_t{first} * all.token, all.token, length - first, a.D, a.wide);
  fetch_keys(0, 0);
  Delta<T, W> products;
  products.fetch(all.out + int64_t{i0} * all.token, all.token, length - i0, a.D, a.wide);
  const Bits bits(a.dropout, at.bh);
  copies_done();
  products.finish(douts, row, delta);
  __syncwarp();
  const int g = lane_id() / 4;
  float lse[2], d[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = i0 + g + 8 * half;
    d[half] = delta[row + g + 8 * half];
    lse[half] = i < length ? all.lse[i] * kLog2e : 0.f;
    if (i < length && lane_id() % 4 == 0) all.delta[i] = d[half];
  }
  const Staying<T, W> q = {queries, douts, row};
  const float scale = a.scale * kLog2e;
  float dq[W / 8][4] = {};
  for (int j0 = 0, stage = 0; j0 < stop; j0 += kKeys, stage ^= 1) {
    if (j0 + kKeys < stop) fetch_keys(stage ^ 1, j0 + kKeys);
    const int last = a.causal ? min(length, i0 + 16) : length;
    for (int j = j0; j < min(j0 + kKeys, i0 < length ? last : 0); j += kStep) {
      Kept kept = {{~0u, ~0u, ~0u, ~0u}};
      if (a.dropout.enabled()) kept = bits.rows<kN>(i0, j);
      float s[kN][4] = {}, dp[kN][4] = {};
      q.products(s, dp, tile(2 * stage), tile(2 * stage + 1), j - j0);
      const bool edge = j + kStep > length || (a.causal && j + kStep > i0 + 1);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = s[n][e] * scale - lse[e / 2];
        if (edge) hide<false>(s[n], i0, j + 8 * n, length, a.causal);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          weight(s[n][e], dp[n][e], d[e / 2], kept(n, e), a.dropout.scale);
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2)
        add_product(dq, as_a<T>(dp[n], dp[n + 1]), tile(2 * stage), j - j0 + 8 * n);
    }
    copies_done();
  }
  const float factor[2] = {a.scale, a.scale};
  write_sums(dq, factor, queries, row, all.dqkv + int64_t{i0} * all.wide, all.wide, length - i0,
             a.D, a.wide);
}

// dK and dV: a warp holds 16 keys and loops over rows
template <typename T, int W>
__global__ void __launch_bounds__(128, Shape<T, W>::kResident)
    attention_bwd_dkdv_kernel(const Attention a) {
  extern __shared__ __align__(128) unsigned char memory[];
  constexpr int kQueries = Shape<T, W>::kQueries, kPass = Shape<T, W>::kPass;
  const Place at = place(a);
  const Rows<T> all(a, at);
  if (at.b >= a.B) {
    if (a.above == 0)
      for (int part = 1; part < 3; ++part)
        zero_tail(all.dqkv + part * all.token, all.wide, a.D, a.wide, a, at);
    return;
  }
  const int rows = blockDim.x / 2, first = at.block * rows, length = at.length;
  if (length <= a.above || first >= length) return;
  const Tile<T, W> keys = {reinterpret_cast<T*>(memory)}, values = {keys.data + rows * W};
  T* passing = values.data + rows * W;
  float* stats = reinterpret_cast<float*>(passing + 4 * kQueries * W);
  auto tile = [&](int number) -> Tile<T, W> { return {passing + number * kQueries * W}; };
  auto fetch_rows = [&](int stage, int i0) {
    const int padded = min(kQueries, (length - i0 + kPass - 1) / kPass * kPass);
    fetch(tile(2 * stage), padded, all.qkv + int64_t{i0} * all.wide, all.wide, length - i0, a.D,
          a.wide);
    fetch(tile(2 * stage + 1), padded, all.dout + int64_t{i0} * all.token, all.token, length - i0,
          a.D, a.wide);
    float* to = stats + 2 * stage * kQueries;
    for (int i = threadIdx.x; i < 2 * padded; i += blockDim.x) {
      const int row = i % padded;
      const float* from = i < padded ? all.lse : all.delta;
      const bool inside = i0 + row < length;
      copy_async<4>(to + i / padded * kQueries + row, from + (inside ? i0 + row : 0), inside);
    }
  };
  for (int part = 0; part < 2; ++part)
    fetch(part ? values : keys, rows, all.qkv + int64_t{first} * all.wide + (1 + part) * all.token,
          all.wide, length - first, a.D, a.wide);
  const int begin = a.causal ? first / kQueries * kQueries : 0;
  fetch_rows(0, begin);
  const Bits bits(a.dropout, at.bh);
  copies_done();
  const int row = threadIdx.x / 32 * 16, j0 = first + row;
  const Staying<T, W> kv = {keys, values, row};
  KeySums<T, W> sums;
  for (int i0 = begin, stage = 0; i0 < length; i0 += kQueries, stage ^= 1) {
    if (i0 + kQueries < length) fetch_rows(stage ^ 1, i0 + kQueries);
    const float* lse = stats + 2 * stage * kQueries;
    for (int i = i0; i < min(i0 + kQueries, j0 < length ? length : 0); i += kPass)
      if (!a.causal || i + kPass > j0)
        sums.step(kv, tile(2 * stage), tile(2 * stage + 1), lse, lse + kQueries, i - i0, i, j0,
                  length, a, bits, [](int, const float (&)[kPass / 8][4]) {});
    copies_done();
  }
  sums.write(keys, values, row, all.dqkv + int64_t{j0} * all.wide + all.token, length - j0, a);
}

template <typename T, int W>
void start_bwd(const Launch& launch, Attention a, int64_t limit) {
  using S = Shape<T, W>;
  for (int most = 32; most <= S::kWhole; most *= 2) {
    const int64_t shared = (4 * W + std::max(most, 64)) * most * sizeof(T) + 8 * most;
    if (shared > limit) break;
    a.blocks = 1;
    start(launch, attention_bwd_kernel<T, W>, most / 16, shared, a);
    if (a.max_seqlen <= most) return;
    a.above = most;
  }
  const int rows = 16 * S::kWarps;
  a.blocks = cdiv(a.max_seqlen, rows);
  start(launch, attention_bwd_dq_kernel<T, W>, S::kWarps,
        (2 * rows + 4 * S::kKeys) * W * sizeof(T) + 4 * rows, a);
  start(launch, attention_bwd_dkdv_kernel<T, W>, S::kWarps,
        (2 * rows + 4 * S::kQueries) * W * sizeof(T) + 16 * S::kQueries, a);
}

}  // namespace

void attention_bwd(int dtype, const void* dout, const void* qkv, const void* out, const float* lse,
                   const int32_t* cu_seqlens, float* delta, void* dqkv, int64_t T, int64_t B,
                   int64_t H, int64_t D, int64_t max_seqlen, float scale, bool causal,
                   const int64_t* seed, int64_t site, int64_t threshold, float keep, int device,
                   cudaStream_t stream) {
  const Launch launch("attention_bwd", T, H * D, device, stream);
  Attention a = {};
  a.qkv = qkv;
  a.cu_seqlens = cu_seqlens;
  a.out = const_cast<void*>(out);
  a.lse = const_cast<float*>(lse);
  a.dout = dout;
  a.delta = delta;
  a.dqkv = dqkv;
  set_sizes(a, T, B, H, D, max_seqlen, scale, causal);
  a.dropout = make_dropout(seed, site, threshold, keep, nullptr);
  int limit = 0;
  launch.require(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  by_dtype(dtype, [&](auto t) {
    using E = decltype(t);
    a.wide = aligned(D, kVec<E>, dout, qkv, out, dqkv);
    by_head(D, [&](auto w) { start_bwd<E, decltype(w)::value>(launch, a, limit); });
  });
}

}  // namespace fastbert
