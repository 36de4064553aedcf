// Dropout bits: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011).
//
//   words(group) = philox(counter = (group, c1, c2, c3), key = (low, high) half of the seed)
//   element col uses word col % 4 of group col / 4 and is kept iff word >= threshold
//   rows of a matrix:  (col / 4, row, site, 0);   attention:  (j / 4, i, b * H + h, site)
//
// The bits depend on absolute indices only, never on tiles or threads; every backend computes the
// same bits.
#pragma once

#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {

// words from one call of philox_words
constexpr int kPhiloxWords = 4 * W;

// The dropout of one call. p = 0 is a null seed; the other members are not read then.
struct Dropout {
  const int64_t* seed;
  uint32_t site;
  uint32_t threshold;   // round(p * 2^32)
  float scale;          // 1 / (1 - p)
  const int64_t* rows;  // (N,) absolute row numbers, or null for 0 .. N - 1

  bool enabled() const { return seed != nullptr; }
  uint32_t row(int64_t i) const { return static_cast<uint32_t>(rows ? rows[i] : i); }
};

// W / 2 counters, each word in a 64-bit lane of its own: no word has to move for the next product,
// and the upper halves are ignored
struct Counters {
  D x0, x1, x2, x3;

  void round(uint32_t low, uint32_t high) {
    const D first = mul_low(x0, 0xD2511F53u), second = mul_low(x2, 0xCD9E8D57u);
    x0 = (second >> 32) ^ (x1 ^ uint64_t{low});
    x1 = second;
    x2 = (first >> 32) ^ (x3 ^ uint64_t{high});
    x3 = first;
  }
  // the words of the counters in even lanes, and of those in odd lanes
  void words(U& even, U& odd) const {
    D a, b;
    zip_alternate((x0 & uint64_t{0xFFFFFFFF}) | x1 << 32, (x2 & uint64_t{0xFFFFFFFF}) | x3 << 32, a,
                  b);
    even = bits_as<U>(a);
    odd = bits_as<U>(b);
  }
};

// element 4 * i + w of the four vectors in sequence is word w of (first_group + i, c1, c2, c3)
inline void philox_words(int64_t seed, uint32_t first_group, uint32_t c1, uint32_t c2, uint32_t c3,
                         U words[4]) {
  uint32_t low = static_cast<uint32_t>(seed);
  uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  // even lanes hold the groups of the first vector of words, odd lanes those of the second
  D groups = {};
  for (int i = 0; i < W / 2; ++i) groups[i] = static_cast<uint64_t>(i / 2 + i % 2 * (W / 4));
  groups += uint64_t{first_group};
  const D c1s = D{} + uint64_t{c1}, c2s = D{} + uint64_t{c2}, c3s = D{} + uint64_t{c3};
  Counters a = {groups, c1s, c2s, c3s}, b = {groups + uint64_t{W / 2}, c1s, c2s, c3s};
  for (int round = 0; round < 10; ++round) {
    a.round(low, high);
    b.round(low, high);
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  a.words(words[0], words[1]);
  b.words(words[2], words[3]);
}

// factors[col - from] = scale where kept, else 0, for the columns [from, to), of which `from` is a
// multiple of kPhiloxWords; writes up to the next multiple
inline void philox_factors(const Dropout& dropout, uint32_t c1, uint32_t c2, uint32_t c3,
                           int64_t from, int64_t to, float* factors) {
  // read once: the compiler must assume that the stores below change them
  const int64_t seed = *dropout.seed;
  const uint32_t threshold = dropout.threshold;
  const F scale = set1(dropout.scale);
  for (int64_t start = from; start < to; start += kPhiloxWords) {
    U words[4];
    philox_words(seed, static_cast<uint32_t>(start / 4), c1, c2, c3, words);
    for (int k = 0; k < 4; ++k)
      store(factors + start - from + k * W, words[k] >= threshold ? scale : zero());
  }
}

// the same for row i of a matrix
inline void row_factors(const Dropout& dropout, int64_t i, int64_t n, float* factors) {
  philox_factors(dropout, dropout.row(i), dropout.site, 0, 0, n, factors);
}

// a select, not a product: a dropped value is 0 even if it was inf or NaN
inline F dropped(F value, F factor) { return factor != zero() ? value * factor : zero(); }

}  // namespace FASTBERT_ISA
}  // namespace fastbert
