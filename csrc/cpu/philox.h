// Dropout bits: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011).
//
//   words(group) = philox(counter = (group, row, site, 0), key = (low, high) half of the seed)
//   element col of a row uses word col % 4 of group col / 4 and is kept iff word >= threshold
//
// The bits depend on absolute indices only, never on tiles or threads; every backend makes the
// same.
#pragma once

#include <cstdint>

namespace fastbert {

// counters worked on side by side, so that the compiler vectorises at any width
constexpr int kPhiloxLanes = 16;
// words that one call of philox_words makes
constexpr int kPhiloxWords = 4 * kPhiloxLanes;

struct PhiloxKey {
  uint32_t low, high;

  explicit PhiloxKey(int64_t seed)
      : low(static_cast<uint32_t>(seed)),
        high(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)) {}
};

// words[4 * lane + w] = word w of counter (first_group + lane, row, site, 0)
inline void philox_words(PhiloxKey key, uint32_t first_group, uint32_t row, uint32_t site,
                         uint32_t* words) {
  uint32_t c0[kPhiloxLanes], c1[kPhiloxLanes], c2[kPhiloxLanes], c3[kPhiloxLanes];
  for (int lane = 0; lane < kPhiloxLanes; ++lane) {
    c0[lane] = first_group + static_cast<uint32_t>(lane);
    c1[lane] = row;
    c2[lane] = site;
    c3[lane] = 0;
  }
  for (int round = 0; round < 10; ++round) {
    // asked for by name: at -O3 gcc unrolls a loop this short before it looks at vectorising it
#pragma omp simd
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * c0[lane];
      const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2[lane];
      c0[lane] = static_cast<uint32_t>(product1 >> 32) ^ c1[lane] ^ key.low;
      c1[lane] = static_cast<uint32_t>(product1);
      c2[lane] = static_cast<uint32_t>(product0 >> 32) ^ c3[lane] ^ key.high;
      c3[lane] = static_cast<uint32_t>(product0);
    }
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  for (int lane = 0; lane < kPhiloxLanes; ++lane) {
    words[4 * lane + 0] = c0[lane];
    words[4 * lane + 1] = c1[lane];
    words[4 * lane + 2] = c2[lane];
    words[4 * lane + 3] = c3[lane];
  }
}

// One call's dropout; p == 0 is `enabled == false` and reads nothing else.
struct Dropout {
  bool enabled;
  PhiloxKey key;
  uint32_t site;
  uint32_t threshold;   // round(p * 2^32)
  float scale;          // 1 / (1 - p)
  const int64_t* rows;  // (N,) absolute row numbers, or null for 0 .. N - 1

  // factors[col] = scale where (row, col) is kept, else 0; n columns
  void row_factors(int64_t i, int64_t n, float* factors) const {
    const uint32_t row = static_cast<uint32_t>(rows ? rows[i] : i);
    uint32_t words[kPhiloxWords];
    for (int64_t start = 0; start < n; start += kPhiloxWords) {
      philox_words(key, static_cast<uint32_t>(start / 4), row, site, words);
      const int count = static_cast<int>(n - start < kPhiloxWords ? n - start : kPhiloxWords);
      for (int k = 0; k < count; ++k) factors[start + k] = words[k] >= threshold ? scale : 0.0f;
    }
  }
};

}  // namespace fastbert
