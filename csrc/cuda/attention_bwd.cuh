// Helpers of attention's backward kernels: delta, the products of 16 held rows with the rows of a
// loop, the sums of dK and dV.
#pragma once

#include "attention.cuh"

namespace fastbert {

// delta of a warp's 16 rows: fetch loads O into registers, finish multiplies it with dO in a tile
template <typename T, int W>
struct Delta {
  static constexpr int kN = kVec<T>, kChunks = W / kN, kRounds = 16 * kChunks / 32;
  Pack<T, kN> o[kRounds];

  // out: the warp's row 0; `count` of its rows exist
  __device__ void fetch(const T* out, int stride, int count, int D, bool wide) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int i = round * 32 + lane_id(), row = i / kChunks;
      o[round] =
          load_pack<kN>(out + int64_t{row} * stride, i % kChunks * kN, row < count ? D : 0, wide);
    }
  }
  __device__ void finish(const Tile<T, W>& dout, int row, float* delta) const {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int i = round * 32 + lane_id();
      float g[kN], sum = 0.f;
      load<kN>(dout.at(row, i / kChunks, 0, i % kChunks), 0, kN, true, g);
#pragma unroll
      for (int e = 0; e < kN; ++e) sum += g[e] * widen(o[round].at[e]);
#pragma unroll
      for (int apart = kChunks / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(kAll, sum, apart);
      if (i % kChunks == 0) delta[row + i / kChunks] = sum;
    }
  }
};

// sums += a b for 16 rows, from `k` on, of a tile b (.., W)
template <typename T, int W>
__device__ inline void add_product(float (&sums)[W / 8][4], const FragmentA<T>& a,
                                   const Tile<T, W>& b, int k) {
#pragma unroll
  for (int d = 0; d < W / 8; d += 2) {
    FragmentB<T> pair[2];
    load_b(pair, b, k, 8 * d);
    mma(sums[d], a, pair[0]);
    mma(sums[d + 1], a, pair[1]);
  }
}

// 16 rows of two tiles, read again in each step: the registers hold the sums
template <typename T, int W>
struct Staying {
  Tile<T, W> first, second;
  int row;

  // scores and dp: products with rows `from` .. from + 8 N of two tiles of the loop
  template <int N>
  __device__ void products(float (&s)[N][4], float (&dp)[N][4], const Tile<T, W>& third,
                           const Tile<T, W>& fourth, int from) const {
    // not unrolled for W = 128: the addresses of each k would take registers
#pragma unroll(W <= 64 ? 2 : 1)
    for (int k = 0; k < W; k += 16) {
      FragmentA<T> a0, a1;
      load_a(a0, first, row, k);
      load_a(a1, second, row, k);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        FragmentB<T> b[2];
        load_b_trans(b, third, from + 8 * n, k);
        mma(s[n], a0, b[0]);
        mma(s[n + 1], a0, b[1]);
        load_b_trans(b, fourth, from + 8 * n, k);
        mma(dp[n], a1, b[0]);
        mma(dp[n + 1], a1, b[1]);
      }
    }
  }
};

// turns s, the base-2 logarithm of P, into P M without its factor, and dp into dS
__device__ inline void weight(float& s, float& dp, float delta, bool kept, float factor) {
  const float p = power2(s);
  s = kept ? p : 0.f;
  dp = p * ((kept ? dp * factor : 0.f) - delta);
}

// dK and dV of a warp's 16 keys
template <typename T, int W>
struct KeySums {
  static constexpr int kN = Shape<T, W>::kPass / 8;
  float dk[W / 8][4] = {}, dv[W / 8][4] = {};

  // adds rows i0 .. i0 + kPass, from `row` of the tiles, lse and delta on, for keys j0 ..;
  // use(n, dS^T) gets the n-th and the next C
  template <typename F>
  __device__ void step(const Staying<T, W>& kv, const Tile<T, W>& queries, const Tile<T, W>& douts,
                       const float* lse, const float* delta, int row, int i0, int j0, int length,
                       const Attention& a, const Bits& bits, F use) {
    // first, while more registers are free
    Kept kept = {{~0u, ~0u, ~0u, ~0u}};
    if (a.dropout.enabled()) kept = bits.columns<kN>(i0, j0);
    float s[kN][4] = {}, dp[kN][4] = {};
    kv.products(s, dp, queries, douts, row);
    const int two = lane_id() % 4 * 2;
    const float scale = a.scale * kLog2e;
    const bool edge = j0 + 16 > length || (a.causal && j0 + 15 > i0);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 l = *reinterpret_cast<const float2*>(lse + row + 8 * n + two);
      const float2 d = *reinterpret_cast<const float2*>(delta + row + 8 * n + two);
      const float lse2[2] = {l.x * kLog2e, l.y * kLog2e};
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = s[n][e] * scale - lse2[e % 2];
      if (edge) hide<true>(s[n], i0 + 8 * n, j0, length, a.causal);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        weight(s[n][e], dp[n][e], e % 2 ? d.y : d.x, kept(n, e), a.dropout.scale);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      add_product(dv, as_a<T>(s[n], s[n + 1]), douts, row + 8 * n);
      use(n, dp);
      add_product(dk, as_a<T>(dp[n], dp[n + 1]), queries, row + 8 * n);
    }
  }
  // writes dK and dV (count, D) through rows `row` .. of both tiles
  __device__ void write(const Tile<T, W>& first, const Tile<T, W>& second, int row, T* dkeys,
                        int count, const Attention& a) {
    const int token = a.H * a.D;
    const float scale[2] = {a.scale, a.scale}, factor[2] = {a.dropout.scale, a.dropout.scale};
    write_sums(dk, scale, first, row, dkeys, 3 * token, count, a.D, a.wide);
    write_sums(dv, factor, second, row, dkeys + token, 3 * token, count, a.D, a.wide);
  }
};

// A block's pointers, to its head in the first token of its sequence.
template <typename T>
struct Rows {
  const T *qkv, *out, *dout;
  const float* lse;
  float* delta;
  T* dqkv;
  int token, wide;  // strides of a token in out and in qkv

  __device__ Rows(const Attention& a, const Place& at) : token(a.H * a.D), wide(3 * token) {
    const int64_t head = at.h * a.D, row = static_cast<int64_t>(at.h) * a.T + at.row;
    qkv = static_cast<const T*>(a.qkv) + at.row * wide + head;
    dqkv = static_cast<T*>(a.dqkv) + at.row * wide + head;
    out = static_cast<const T*>(a.out) + at.row * token + head;
    dout = static_cast<const T*>(a.dout) + at.row * token + head;
    lse = a.lse + row;
    delta = a.delta + row;
  }
};

}  // namespace fastbert
