// Dropout bits: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011).
//
//   words(group) = philox(counter = (group, c1, c2, c3), key = (low, high) half of the seed)
//   element col uses word col % 4 of group col / 4 and is kept iff word >= threshold
//   rows of a matrix:  (col / 4, row, site, 0);   attention:  (j / 4, i, b * H + h, site)
//
// The bits depend on absolute indices only, never on tiles or threads; every backend makes the
// same.
#pragma once

#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {

// words that one call of philox_words makes
constexpr int kPhiloxWords = 4 * W;

// One call's dropout; p == 0 is a null seed, and then nothing else is read.
struct Dropout {
  const int64_t* seed;
  uint32_t site;
  uint32_t threshold;   // round(p * 2^32)
  float scale;          // 1 / (1 - p)
  const int64_t* rows;  // (N,) absolute row numbers, or null for 0 .. N - 1

  bool enabled() const { return seed != nullptr; }
  uint32_t row(int64_t i) const { return static_cast<uint32_t>(rows ? rows[i] : i); }
};

// words[4 * lane + w] = word w of counter (first_group + lane, c1, c2, c3)
inline void philox_words(int64_t seed, uint32_t first_group, uint32_t c1, uint32_t c2, uint32_t c3,
                         U words[4]) {
  uint32_t low = static_cast<uint32_t>(seed);
  uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  U x0 = iota() + first_group, x1 = set1(c1), x2 = set1(c2), x3 = set1(c3);
  for (int round = 0; round < 10; ++round) {
    U high0, low0, high1, low1;
    mul_wide(x0, 0xD2511F53u, high0, low0);
    mul_wide(x2, 0xCD9E8D57u, high1, low1);
    x0 = high1 ^ x1 ^ low;
    x1 = low1;
    x2 = high0 ^ x3 ^ high;
    x3 = low0;
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  U a, b, c, d;
  zip(x0, x2, a, b);
  zip(x1, x3, c, d);
  zip(a, c, words[0], words[1]);
  zip(b, d, words[2], words[3]);
}

// factors[col] = scale where kept, else 0, for n columns; writes up to round_up(n, kPhiloxWords)
inline void philox_factors(const Dropout& dropout, uint32_t c1, uint32_t c2, uint32_t c3, int64_t n,
                           float* factors) {
  const F scale = set1(dropout.scale);
  for (int64_t start = 0; start < n; start += kPhiloxWords) {
    U words[4];
    philox_words(*dropout.seed, static_cast<uint32_t>(start / 4), c1, c2, c3, words);
    for (int k = 0; k < 4; ++k)
      store(factors + start + k * W, words[k] >= dropout.threshold ? scale : zero());
  }
}

// the same for row i of a matrix
inline void row_factors(const Dropout& dropout, int64_t i, int64_t n, float* factors) {
  philox_factors(dropout, dropout.row(i), dropout.site, 0, n, factors);
}

// a select and not a product: what is dropped is 0 even where the value is inf or NaN
inline F dropped(F value, F factor) { return factor != zero() ? value * factor : zero(); }

}  // namespace FASTBERT_ISA
}  // namespace fastbert
