// Helpers of attention's kernels: a block's place, tiles, dropout's bits.
//
// Rows (queries) i and keys j are numbered within the sequence. A warp computes 16 rows of a
// product. For dQ the rows of P and dS are queries; for dK and dV, transposed, they are keys. In
// both cases the C fragment of one product is the A fragment of the next, in registers.
#pragma once

#include <type_traits>

#include "mma.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace fastbert {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// keys of one step in forward and for dQ
constexpr int kStep = 32;
// blocks per head and block of rows that zero the rows past the last sequence
constexpr int kTail = 8;

struct Attention {
  const void* qkv;            // (T, 3, H, D)
  const int32_t* cu_seqlens;  // (B + 1,)
  void* out;                  // (T, H, D)
  float* lse;                 // (H, T), or null
  const void* dout;           // (T, H, D)
  float* delta;               // (H, T)
  void* dqkv;                 // (T, 3, H, D)
  int T, B, H, D, max_seqlen;
  float scale;
  bool causal;
  Dropout dropout;
  bool wide;   // every row of a head allows 16-byte accesses
  int blocks;  // blocks of rows in a sequence of max_seqlen
  int above;   // backward: sequences of at most this length are handled by another launch
};

// The configuration of a kernel: see the table in attention.cu.
template <typename T, int W>
struct Shape {
  static constexpr bool kHalf = sizeof(T) == 2;
  // keys, and queries, in a tile of a loop
  static constexpr int kKeys = kHalf ? 64 : 32;
  static constexpr int kQueries = kHalf && W <= 64 ? 64 : 32;
  // the most warps of a block in forward and in backward's loops
  static constexpr int kWarps = kHalf || W <= 64 ? 4 : 2;
  // blocks of 4 warps that must fit on a multiprocessor, which bounds their registers
  static constexpr int kResident = kHalf && W <= 64 ? 4 : 2;
  // queries of one step for dK and dV
  static constexpr int kPass = 16;
  // the longest sequence that one block handles as a whole in backward
  static constexpr int kWhole = kHalf ? 128 : 64;
};

struct Place {
  int block, bh, b, h, length;
  int64_t row;
};

// b >= B: the rows past the last sequence. Memory-safe for any contents of cu_seqlens.
__device__ inline Place place(const Attention& a) {
  Place at;
  at.block = blockIdx.x % a.blocks;
  at.bh = blockIdx.x / a.blocks;
  at.b = at.bh / a.H;
  at.h = at.bh % a.H;
  const int start = min(max(a.cu_seqlens[min(at.b, a.B)], 0), a.T);
  const int stop = at.b < a.B ? a.cu_seqlens[at.b + 1] : a.T;
  at.length = min(max(stop, start), a.T) - start;
  if (at.b < a.B) at.length = min(at.length, a.max_seqlen);
  at.row = start;
  return at;
}

// zeros this block's share of a matrix (at.length, D)
template <typename T>
__device__ inline void zero_tail(T* matrix, int stride, int D, bool wide, const Attention& a,
                                 const Place& at) {
  constexpr int kN = kVec<T>;
  const float zeros[kN] = {};
  const int chunks = (D + kN - 1) / kN;
  const int64_t share = (at.b - a.B) * a.blocks + at.block;
  const int64_t all = static_cast<int64_t>(at.length) * chunks;
  for (int64_t i = share * blockDim.x + threadIdx.x; i < all; i += kTail * a.blocks * blockDim.x)
    store<kN>(matrix + i / chunks * stride, static_cast<int>(i % chunks) * kN, D, wide, zeros);
}

// starts to copy `rows` rows of a matrix (count, D), zeros outside, into a tile
template <typename T, int W>
__device__ inline void fetch(const Tile<T, W>& tile, int rows, const T* matrix, int stride,
                             int count, int D, bool wide) {
  const auto from = [=](int row) { return matrix + int64_t{row} * stride; };
  fetch_rows(tile, rows, from, matrix, count, D, wide);
}

// copies a warp's 16 rows, from `row` of a tile on, to a matrix (count, D) of these rows
template <typename T, int W>
__device__ inline void write_rows(const Tile<T, W>& tile, int row, T* matrix, int stride, int count,
                                  int D, bool wide) {
  constexpr int kN = kVec<T>, kChunks = W / kN;
  __syncwarp();
#pragma unroll 2
  for (int i = lane_id(); i < 16 * kChunks; i += 32) {
    const int r = i / kChunks, chunk = i % kChunks;
    if (r >= count) continue;
    copy_chunk(tile.at(row, r, 0, chunk), matrix + int64_t{r} * stride, chunk * kN, D, wide);
  }
}

// writes a warp's sums (16, W) times the factors of rows g and g + 8, through its rows of a tile
template <typename T, int W>
__device__ inline void write_sums(float (&sums)[W / 8][4], const float (&factor)[2],
                                  const Tile<T, W>& tile, int row, T* matrix, int stride, int count,
                                  int D, bool wide) {
  __syncwarp();
#pragma unroll
  for (int n = 0; n < W / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[n][e] *= factor[e / 2];
    store_c(tile, row, 8 * n, sums[n]);
  }
  write_rows(tile, row, matrix, stride, count, D, wide);
}

__device__ inline float power2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float quad_sum(float value) {
  value += __shfl_xor_sync(kAll, value, 1);
  return value + __shfl_xor_sync(kAll, value, 2);
}

__device__ inline float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAll, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAll, value, 2));
}

// -inf where a query does not see a key, in a C of rows i0 .. and keys j0 .., or its transpose
template <bool TRANS>
__device__ inline void hide(float (&s)[4], int i0, int j0, int length, bool causal) {
  const int g = lane_id() / 4, two = lane_id() % 4 * 2;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int down = g + e / 2 * 8, right = two + e % 2;
    const int i = i0 + (TRANS ? right : down), j = j0 + (TRANS ? down : right);
    if (j >= length || (causal && j > i)) s[e] = -INFINITY;
  }
}

// The weights of a lane that dropout keeps: bit 4n of mask[e] stands for float e of the n-th C.
struct Kept {
  uint32_t mask[4];

  __device__ bool operator()(int n, int e) const { return mask[e] >> (4 * n) & 1; }
};

struct Bits {
  uint64_t key;
  uint32_t bh, site, threshold;

  __device__ Bits(const Dropout& dropout, int bh)
      : key(dropout.seed ? static_cast<uint64_t>(*dropout.seed) : 0),
        bh(static_cast<uint32_t>(bh)),
        site(dropout.site),
        threshold(dropout.threshold) {}

  // the bits of keys 4 quad .. 4 quad + 3 of row i
  __device__ uint32_t four(uint32_t quad, uint32_t i) const {
    const uint4 w = philox(key, quad, i, bh, site);
    return (w.x >= threshold) | (w.y >= threshold) << 1 | (w.z >= threshold) << 2 |
           (w.w >= threshold) << 3;
  }

  // For N C of rows i0 .. and keys j0 + 8n. A pair of lanes holds 4 keys: the even lane makes the
  // bits of row g, the odd lane those of row g + 8.
  template <int N>
  __device__ Kept rows(int i0, int j0) const {
    const int lane = lane_id(), odd = lane & 1;
    uint32_t mine = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
      mine |= four(j0 / 4 + 2 * n + lane % 4 / 2, i0 + lane / 4 + 8 * odd) << (4 * n);
    const uint32_t other = __shfl_xor_sync(kAll, mine, 1);
    const uint32_t top = (odd ? other : mine) >> (2 * odd);
    const uint32_t bottom = (odd ? mine : other) >> (2 * odd);
    return {top, top >> 1, bottom, bottom >> 1};
  }

  // For N transposed C of keys j0 .. and rows i0 + 8n. Four lanes hold 4 keys, and the keys 8
  // further on, of rows 2t and 2t + 1: lane r of the four makes the bits of float r.
  template <int N>
  __device__ Kept columns(int i0, int j0) const {
    const int lane = lane_id(), r = lane / 4 % 4;
    uint32_t mine = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
      mine |= four(j0 / 4 + lane / 16 + r / 2 * 2, i0 + 8 * n + lane % 4 * 2 + r % 2) << (4 * n);
    Kept kept;
#pragma unroll
    for (int e = 0; e < 4; ++e) kept.mask[e] = __shfl_sync(kAll, mine, (lane & ~12) | e << 2) >> r;
    return kept;
  }
};

inline void set_sizes(Attention& a, int64_t T, int64_t B, int64_t H, int64_t D, int64_t max_seqlen,
                      float scale, bool causal) {
  a.T = static_cast<int>(T);
  a.B = static_cast<int>(B);
  a.H = static_cast<int>(H);
  a.D = static_cast<int>(D);
  a.max_seqlen = static_cast<int>(max_seqlen);
  a.scale = scale;
  a.causal = causal;
}

// run(W) with the head size padded to the next W that has kernels
template <typename F>
void by_head(int64_t D, F run) {
  if (D <= 32) return run(std::integral_constant<int, 32>{});
  if (D <= 64) return run(std::integral_constant<int, 64>{});
  run(std::integral_constant<int, 128>{});
}

template <typename K>
void start(const Launch& launch, K kernel, int warps, int64_t shared, const Attention& a) {
  const int bytes = static_cast<int>(shared);
  const int64_t blocks = int64_t{a.blocks} * a.H * (a.B + kTail);
  if (blocks > INT32_MAX) launch.require(cudaErrorInvalidConfiguration);
  if (bytes > 48 * 1024)
    launch.require(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<static_cast<unsigned>(blocks), 32 * warps, bytes, launch.stream>>>(a);
  launch.check();
}

}  // namespace fastbert
