// Dropout bits: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011), as
// fastbert/backend/reference/philox.py defines them:
//
//   words(group) = philox(counter = (group, c1, c2, c3), key = (low, high) half of the seed)
//   element col uses word col % 4 of group col / 4 and is kept iff word >= threshold
//   rows of a matrix:  (col / 4, row, site, 0);   attention:  (j / 4, i, b * H + h, site)
#pragma once

#include <cstdint>

namespace fastbert {

__device__ inline uint4 philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * c0, second = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ low;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ high;
    c3 = static_cast<uint32_t>(first);
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// The dropout of rows in one call. The seed is read on the device; a null one means p = 0.
struct Dropout {
  const int64_t* seed;
  uint32_t site;
  uint32_t threshold;   // round(p * 2^32)
  float scale;          // 1 / (1 - p)
  const int64_t* rows;  // (N,) absolute row numbers, or null for 0 .. N - 1

  __device__ bool enabled() const { return seed != nullptr; }
  __device__ uint32_t number(int64_t row) const {
    return static_cast<uint32_t>(rows ? rows[row] : row);
  }
  // N values from column `col` on, a multiple of 4: scaled where kept, else 0. A select, not a
  // product: a dropped value is 0 even if it was inf or NaN
  template <int N>
  __device__ void apply(uint32_t number, int col, float (&values)[N]) const {
    const uint64_t key = static_cast<uint64_t>(*seed);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const uint4 words = philox(key, static_cast<uint32_t>(col + i) / 4, number, site, 0);
      values[i] = words.x >= threshold ? values[i] * scale : 0.f;
      values[i + 1] = words.y >= threshold ? values[i + 1] * scale : 0.f;
      values[i + 2] = words.z >= threshold ? values[i + 2] * scale : 0.f;
      values[i + 3] = words.w >= threshold ? values[i + 3] * scale : 0.f;
    }
  }
};

inline Dropout make_dropout(const int64_t* seed, int64_t site, int64_t threshold, float scale,
                            const int64_t* rows) {
  return {seed, static_cast<uint32_t>(site), static_cast<uint32_t>(threshold), scale, rows};
}

}  // namespace fastbert
