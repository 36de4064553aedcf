// attention's forward: packed sequences, exact softmax by running maxima, dropout by absolute index
// (flash attention: Dao et al. 2022, Dao 2023). The backward is in _attention_bwd.cu.
//
// Template budget: {fp32, bf16, fp16} x head sizes padded to W in {32, 64, 128}, in forward also
// ROWS, the 16-row tiles of a warp; dropout and causal are branches.
//
//   registers on sm_90, 16 bit and fp32   W = 32     W = 64     W = 128
//   attention_fwd, ROWS 1                 128  184   126  158   193  202
//   attention_fwd, ROWS 2                 182        225
//   attention_bwd                         125  142   128  189   240  252
//   attention_bwd_dq                      116  151   128  167   182  208
//   attention_bwd_dkdv                    122  155   128  186   234  255 (spills 44 bytes)
//
//   KB of shared memory, largest block    W = 32     W = 64     W = 128
//   attention_fwd, ROWS 1                  20   24    40   48    80   80
//   attention_fwd, ROWS 2                  24         48
//   attention_bwd                          65   49    97   81   161  145
//   attention_bwd_dq                       25   33    49   65    97   97
//   attention_bwd_dkdv                     25   33    49   65    65   97
//
// 40 kernels. attention_bwd's memory is for 128 tokens (fp32: 64), and less for classes of fewer.
#include <algorithm>

#include "attention.cuh"
#include "entries.h"

namespace fastbert {
namespace {

// m: running maximum of the scores in base 2, total: this lane's part of the sum of powers;
// out = acc / total, lse = ln 2 (m + log2 total), for rows g and g + 8 of ROWS tiles
template <typename T, int W, int ROWS>
struct Softmax {
  float acc[ROWS][W / 8][4] = {};
  float m[ROWS][2], total[ROWS][2] = {};

  __device__ Softmax() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) m[r][0] = m[r][1] = -INFINITY;
  }

  // turns kStep scores of each row into powers and rescales the earlier sums to the new maximum
  __device__ void powers(float (&s)[kStep / 8][4], int r) {
    float top[2] = {m[r][0], m[r][1]};
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) top[e / 2] = fmaxf(top[e / 2], s[n][e]);
    top[0] = quad_max(top[0]);
    top[1] = quad_max(top[1]);
    if (__any_sync(kAll, top[0] > m[r][0] || top[1] > m[r][1])) {
      const float rescale[2] = {power2(m[r][0] - top[0]), power2(m[r][1] - top[1])};
#pragma unroll
      for (int n = 0; n < W / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[r][n][e] *= rescale[e / 2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total[r][half] *= rescale[half];
        m[r][half] = top[half];
      }
    }
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = power2(s[n][e] - top[e / 2]);
        total[r][e / 2] += s[n][e];
      }
  }
};

// Q of a warp: fragments held in registers or, where these are short, read again for each step
template <typename T, int W, int ROWS>
struct Queries {
  static constexpr bool kHold = W * sizeof(T) <= 128;
  FragmentA<T> held[kHold ? ROWS : 1][kHold ? W / 16 : 1];
  Tile<T, W> tile;
  int row;

  __device__ Queries(const Tile<T, W>& tile, int row) : tile(tile), row(row) {
    if constexpr (kHold) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int k = 0; k < W / 16; ++k) load_a(held[r][k], tile, row + 16 * r, 16 * k);
    }
  }
  __device__ FragmentA<T> at(int r, int k) const {
    if constexpr (kHold) return held[r][k];
    FragmentA<T> a;
    load_a(a, tile, row + 16 * r, 16 * k);
    return a;
  }
};

// adds keys j0 .. j0 + kStep, from `row` of the tiles on, to the state of rows i0 ..
template <typename T, int W, int ROWS>
__device__ inline void attend(Softmax<T, W, ROWS>& state, const Queries<T, W, ROWS>& q,
                              const Tile<T, W>& keys, const Tile<T, W>& values, int row, int i0,
                              int j0, int length, const Attention& a, const Bits& bits) {
  constexpr int kN = kStep / 8;
  float s[ROWS][kN][4] = {};
#pragma unroll
  for (int k = 0; k < W / 16; ++k) {
    FragmentA<T> rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) rows[r] = q.at(r, k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      FragmentB<T> b[2];
      load_b_trans(b, keys, row + 8 * n, 16 * k);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        mma(s[r][n], rows[r], b[0]);
        mma(s[r][n + 1], rows[r], b[1]);
      }
    }
  }
  const float scale = a.scale * kLog2e;
  const bool edge = j0 + kStep > length || (a.causal && j0 + kStep > i0 + 1);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[r][n][e] *= scale;
      if (edge) hide<false>(s[r][n], i0 + 16 * r, j0 + 8 * n, length, a.causal);
    }
    state.powers(s[r], r);
    if (a.dropout.enabled()) {
      const Kept kept = bits.rows<kN>(i0 + 16 * r, j0);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[r][n][e] = kept(n, e) ? s[r][n][e] : 0.f;
    }
  }
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    FragmentA<T> weights[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) weights[r] = as_a<T>(s[r][n], s[r][n + 1]);
#pragma unroll
    for (int d = 0; d < W / 8; d += 2) {
      FragmentB<T> b[2];
      load_b(b, values, row + 8 * n, 8 * d);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        mma(state.acc[r][d], weights[r], b[0]);
        mma(state.acc[r][d + 1], weights[r], b[1]);
      }
    }
  }
}

template <typename T, int W, int ROWS>
__global__ void __launch_bounds__(128, ROWS == 1 ? Shape<T, W>::kResident : 2)
    attention_fwd_kernel(const Attention a) {
  extern __shared__ __align__(128) unsigned char memory[];
  constexpr int kKeys = Shape<T, W>::kKeys;
  const Place at = place(a);
  const int token = a.H * a.D;
  T* out = static_cast<T*>(a.out) + at.row * token + at.h * a.D;
  float* lse = a.lse + static_cast<int64_t>(at.h) * a.T + at.row;
  if (at.b >= a.B) {
    zero_tail(out, token, a.D, a.wide, a, at);
    if (a.lse) zero_tail(lse, 1, 1, false, a, at);
    return;
  }
  const int rows = blockDim.x / 2 * ROWS, first = at.block * rows;
  if (first >= at.length) return;
  const T* qkv = static_cast<const T*>(a.qkv) + at.row * 3 * token + at.h * a.D;
  const Tile<T, W> queries = {reinterpret_cast<T*>(memory)};
  const int stop = a.causal ? min(at.length, first + rows) : at.length;
  auto tile = [&](int number) -> Tile<T, W> {
    return {queries.data + (rows + number * kKeys) * W};
  };
  auto fetch_keys = [&](int stage, int j0) {
    const int count = at.length - j0, padded = min(kKeys, (stop - j0 + kStep - 1) / kStep * kStep);
    for (int part = 0; part < 2; ++part)
      fetch(tile(2 * stage + part), padded, qkv + int64_t{j0} * 3 * token + (1 + part) * token,
            3 * token, count, a.D, a.wide);
  };
  fetch(queries, rows, qkv + int64_t{first} * 3 * token, 3 * token, at.length - first, a.D, a.wide);
  fetch_keys(0, 0);
  const Bits bits(a.dropout, at.bh);
  copies_done();
  const int row = threadIdx.x / 32 * 16 * ROWS, i0 = first + row;
  const int last = a.causal ? min(at.length, i0 + 16 * ROWS) : at.length;
  const Queries<T, W, ROWS> q(queries, row);
  Softmax<T, W, ROWS> state;
  for (int j0 = 0, stage = 0; j0 < stop; j0 += kKeys, stage ^= 1) {
    if (j0 + kKeys < stop) fetch_keys(stage ^ 1, j0 + kKeys);
    if (i0 < at.length)
      for (int j = j0; j < min(j0 + kKeys, last); j += kStep)
        attend(state, q, tile(2 * stage), tile(2 * stage + 1), j - j0, i0, j, at.length, a, bits);
    copies_done();
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float total[2] = {quad_sum(state.total[r][0]), quad_sum(state.total[r][1])};
    const float factor[2] = {a.dropout.scale / total[0], a.dropout.scale / total[1]};
    const int i = i0 + 16 * r;
    write_sums(state.acc[r], factor, queries, row + 16 * r, out + int64_t{i} * token, token,
               at.length - i, a.D, a.wide);
    if (!a.lse || lane_id() % 4 != 0) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int mine = i + lane_id() / 4 + 8 * half;
      if (mine < at.length) lse[mine] = (state.m[r][half] + __log2f(total[half])) * kLn2;
    }
  }
}

template <typename T, int W, int ROWS>
void start_fwd(const Launch& launch, Attention a) {
  using S = Shape<T, W>;
  const int warps = std::max(1, std::min<int>(S::kWarps, cdiv(a.max_seqlen, 16 * ROWS))),
            rows = warps * 16 * ROWS;
  const int stages = a.max_seqlen > S::kKeys ? 2 : 1;
  a.blocks = std::max(1u, cdiv(a.max_seqlen, rows));
  start(launch, attention_fwd_kernel<T, W, ROWS>, warps,
        (rows + stages * 2 * S::kKeys) * W * sizeof(T), a);
}

}  // namespace

void attention_fwd(int dtype, const void* qkv, const int32_t* cu_seqlens, void* out, float* lse,
                   int64_t T, int64_t B, int64_t H, int64_t D, int64_t max_seqlen, float scale,
                   bool causal, const int64_t* seed, int64_t site, int64_t threshold, float keep,
                   int device, cudaStream_t stream) {
  const Launch launch("attention_fwd", T, H * D, device, stream);
  Attention a = {};
  a.qkv = qkv;
  a.cu_seqlens = cu_seqlens;
  a.out = out;
  a.lse = lse;
  set_sizes(a, T, B, H, D, max_seqlen, scale, causal);
  a.dropout = make_dropout(seed, site, threshold, keep, nullptr);
  by_dtype(dtype, [&](auto t) {
    using E = decltype(t);
    a.wide = aligned(D, kVec<E>, qkv, out);
    by_head(D, [&](auto w) {
      constexpr int W = decltype(w)::value;
      if constexpr (sizeof(E) == 2 && W <= 64)
        if (max_seqlen > 128) return start_fwd<E, W, 2>(launch, a);
      start_fwd<E, W, 1>(launch, a);
    });
  });
}

}  // namespace fastbert
