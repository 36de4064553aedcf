// Tensor cores from shared memory: swizzled tiles filled by cp.async, fragments by ldmatrix,
// mma.sync.
//
// The unit is a product of 16 x 16 by 16 x 8 with fp32 sums. With g = lane / 4 and t = lane % 4, in
// 16 bit (PTX ISA, mma.m16n8k16):
//   A  (16, 16)  registers (row g, k 2t ..), (g + 8, 2t ..), (g, 2t + 8 ..), (g + 8, 2t + 8 ..)
//   B  (16, 8)   registers (k 2t .., column g), (2t + 8 .., g)
//   C  (16, 8)   floats (row g, column 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// fp32 is two mma.m16n8k8 of TF32, four products each. Their slots t and t + 4 along k hold k = 2t
// and 2t + 1, in A and in B, so that C's floats are A's registers here too.
#pragma once

#include "types.cuh"

namespace fastbert {

__device__ inline int lane_id() { return threadIdx.x & 31; }

__device__ inline uint32_t shared_address(const void* memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

// starts to copy 16 or 4 bytes to shared memory; zeros, without an access, if not `inside`
template <int BYTES>
__device__ inline void copy_async(void* to, const void* from, bool inside) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(inside ? 4 : 0)
                 : "memory");
}

__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// waits until all but the last LEFT groups of every thread of the block are copied
template <int LEFT>
__device__ inline void copies_left() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
  __syncthreads();
}

// waits for all copies of every thread of the block
__device__ inline void copies_done() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
}

// Rows of W elements with permuted 16-byte chunks: neither the 8 rows that ldmatrix reads at one
// column nor the 32 lanes of a C fragment have bank conflicts.
template <typename T, int W>
struct Tile {
  static constexpr int kChunks = W / kVec<T>;

  T* data;

  // row0 is a multiple of 8, row < 16; the chunk's number is chunk0 ^ chunk
  __device__ T* at(int row0, int row, int chunk0, int chunk) const {
    int swizzle = row & 7;
    if constexpr (sizeof(T) == 4) swizzle = ((row & 3) ^ (row >> 2 & 1)) << 1;
    if constexpr (kChunks == 4) swizzle = row >> 1 & 3;
    return data + (row0 + row) * W + (chunk0 ^ (chunk ^ swizzle)) * kVec<T>;
  }
  // column, a multiple of 8, plus 2t
  __device__ T* pair(int row0, int row, int column) const {
    const int two = lane_id() % 4 * 2;
    return at(row0, row, column / kVec<T>, two / kVec<T>) + two % kVec<T>;
  }
  // column, a multiple of 8, plus g
  __device__ T* one(int row0, int row, int column) const {
    const int g = lane_id() / 4;
    return at(row0, row, column / kVec<T>, g / kVec<T>) + g % kVec<T>;
  }
};

// starts to copy `rows` rows of a matrix (count, D), zeros outside, into a tile; from(row) is the
// address of a row, `anywhere` any valid address
template <typename T, int W, typename From>
__device__ inline void fetch_rows(const Tile<T, W>& tile, int rows, From from, const T* anywhere,
                                  int count, int D, bool wide) {
  constexpr int kN = kVec<T>, kChunks = W / kN;
  for (int i = threadIdx.x; i < rows * kChunks; i += blockDim.x) {
    const int row = i / kChunks, chunk = i % kChunks;
    T* to = tile.at(row & ~7, row & 7, 0, chunk);
    if (wide) {
      const bool inside = row < count && chunk * kN < D;
      copy_async<16>(to, inside ? from(row) + chunk * kN : anywhere, inside);
    } else {
      const bool inside = row < count;
      *reinterpret_cast<Pack<T, kN>*>(to) =
          load_pack<kN>(inside ? from(row) : anywhere, chunk * kN, inside ? D : 0, false);
    }
  }
}

// copies 16 bytes of a tile to row[col .. stop), as raw bytes: converted to floats and back they
// would be stored one by one
template <typename T>
__device__ inline void copy_chunk(const T* chunk, T* row, int col, int stop, bool wide) {
  if (wide) {
    if (col < stop) *reinterpret_cast<uint4*>(row + col) = *reinterpret_cast<const uint4*>(chunk);
  } else {
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i)
      if (col + i < stop) row[col + i] = chunk[i];
  }
}

template <typename T>
struct FragmentA {
  uint32_t word[2 * sizeof(T)];
};

template <typename T>
struct FragmentB {
  uint32_t word[sizeof(T)];
};

template <bool TRANS, typename T>
__device__ inline void ldmatrix(uint32_t (&word)[4], const T* row) {
  if constexpr (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(shared_address(row)));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(shared_address(row)));
}

__device__ inline void load_pair(const float* from, uint32_t& first, uint32_t& second) {
  const uint2 both = *reinterpret_cast<const uint2*>(from);
  first = both.x;
  second = both.y;
}

__device__ inline uint32_t load_one(const float* from) { return __float_as_uint(*from); }

// A = tile[row .. row + 16, k .. k + 16)
template <typename T, int W>
__device__ inline void load_a(FragmentA<T>& a, const Tile<T, W>& tile, int row, int k) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    ldmatrix<false>(a.word, tile.at(row, lane % 16, k / 8, lane / 16));
  } else {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      load_pair(tile.pair(row, lane / 4, k + 8 * j), a.word[4 * j], a.word[4 * j + 2]);
      load_pair(tile.pair(row + 8, lane / 4, k + 8 * j), a.word[4 * j + 1], a.word[4 * j + 3]);
    }
  }
}

// A = transpose of tile[k .. k + 16, row .. row + 16)
template <typename T, int W>
__device__ inline void load_a_trans(FragmentA<T>& a, const Tile<T, W>& tile, int k, int row) {
  const int lane = lane_id(), two = lane % 4 * 2;
  if constexpr (sizeof(T) == 2) {
    ldmatrix<true>(a.word, tile.at(k, lane % 8 + lane / 16 * 8, row / 8, lane / 8 % 2));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      a.word[i] = load_one(tile.one(k + i / 4 * 8, two + i / 2 % 2, row + i % 2 * 8));
  }
}

// two B, transposes of tile[column .. column + 16, k .. k + 16)
template <typename T, int W>
__device__ inline void load_b_trans(FragmentB<T> (&b)[2], const Tile<T, W>& tile, int column,
                                    int k) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    uint32_t word[4];
    ldmatrix<false>(word, tile.at(column, lane % 8 + lane / 16 * 8, k / 8, lane / 8 % 2));
    b[0] = {word[0], word[1]};
    b[1] = {word[2], word[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      load_pair(tile.pair(column + i / 2 * 8, lane / 4, k + i % 2 * 8), b[i / 2].word[i % 2 * 2],
                b[i / 2].word[i % 2 * 2 + 1]);
  }
}

// two B of tile[k .. k + 16, column .. column + 16)
template <typename T, int W>
__device__ inline void load_b(FragmentB<T> (&b)[2], const Tile<T, W>& tile, int k, int column) {
  const int lane = lane_id(), two = lane % 4 * 2;
  if constexpr (sizeof(T) == 2) {
    uint32_t word[4];
    ldmatrix<true>(word, tile.at(k, lane % 16, column / 8, lane / 16));
    b[0] = {word[0], word[1]};
    b[1] = {word[2], word[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      b[i / 4].word[i % 4] = load_one(tile.one(k + i % 4 / 2 * 8, two + i % 2, column + i / 4 * 8));
  }
}

template <typename T>
__device__ inline uint32_t narrow_pair(float first, float second) {
  const Pack<T, 2> both = {narrow<T>(first), narrow<T>(second)};
  return *reinterpret_cast<const uint32_t*>(&both);
}

// A = two C side by side
template <typename T>
__device__ inline FragmentA<T> as_a(const float (&left)[4], const float (&right)[4]) {
  FragmentA<T> a;
  if constexpr (sizeof(T) == 2) {
    a = {narrow_pair<T>(left[0], left[1]), narrow_pair<T>(left[2], left[3]),
         narrow_pair<T>(right[0], right[1]), narrow_pair<T>(right[2], right[3])};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a.word[i % 2 * 2 + i / 2] = __float_as_uint(left[i]);
      a.word[4 + i % 2 * 2 + i / 2] = __float_as_uint(right[i]);
    }
  }
  return a;
}

// C into tile[row .. row + 16, column .. column + 8)
template <typename T, int W>
__device__ inline void store_c(const Tile<T, W>& tile, int row, int column, const float (&c)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    *reinterpret_cast<Pack<T, 2>*>(tile.pair(row + 8 * i, lane_id() / 4, column)) = {
        narrow<T>(c[2 * i]), narrow<T>(c[2 * i + 1])};
}

__device__ inline void mma_tf32(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// value = high + low, each a TF32
__device__ inline void split(uint32_t value, uint32_t& high, uint32_t& low) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(__uint_as_float(value)));
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(__uint_as_float(value) - __uint_as_float(high)));
}

// c += a b
__device__ inline void mma(float (&c)[4], const FragmentA<bfloat16>& a,
                           const FragmentB<bfloat16>& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]),
        "r"(b.word[1]));
}

__device__ inline void mma(float (&c)[4], const FragmentA<float16>& a,
                           const FragmentB<float16>& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]),
        "r"(b.word[1]));
}

__device__ inline void mma(float (&c)[4], const FragmentA<float>& a, const FragmentB<float>& b) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a.word[4 * j + i], high_a[i], low_a[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) split(b.word[2 * j + i], high_b[i], low_b[i]);
    // tensor cores truncate their sums: these stay short, and are added to c with rounding
    float sum[4] = {};
    mma_tf32(sum, low_a, low_b);
    mma_tf32(sum, low_a, high_b);
    mma_tf32(sum, high_a, low_b);
    mma_tf32(sum, high_a, high_b);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += sum[i];
  }
}

}  // namespace fastbert
