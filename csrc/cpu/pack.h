// Operands of a product and their packing into panels of several lines; in a panel the elements of
// all lines for one k are adjacent.
#pragma once

#include "product.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {

// up to three pieces of `each` rows; element (i, j) of a piece p is p[i * row + j * col]
template <typename T>
struct Matrix {
  const T* p[3];
  int64_t row, col;
  int64_t each;

  const T* at(int64_t i) const {
    // not i / each: a division would cost as much as the row
    const int64_t piece = (i >= each) + (i >= 2 * each);
    return p[piece] + (i - piece * each) * row;
  }
};

template <typename T>
inline Matrix<T> matrix(const T* p, int64_t row, int64_t col) {
  return {{p, p, p}, row, col, int64_t{1} << 61};
}

// whether products of this type use bf16 pairs
template <typename T>
constexpr bool kPaired = FASTBERT_DOT_BF16 && __is_same(T, bf16);
template <typename T>
constexpr Kind kKindOf = kPaired<T> ? kHalves : kFloats;

// 32-bit units along k
inline int64_t units(int64_t K, bool pairs) { return pairs ? (K + 1) / 2 : K; }

// transposes a square of W x W: every block of 4 x 4 where it is, then the blocks
inline void transpose(F rows[W]) {
#pragma GCC unroll 4
  for (int g = 0; g < W; g += 4) {
    F* r = rows + g;
    F upper[2], lower[2];
    zip_floats(r[0], r[1], upper[0], upper[1]);
    zip_floats(r[2], r[3], lower[0], lower[1]);
    zip_doubles(upper[0], lower[0], r[0], r[1]);
    zip_doubles(upper[1], lower[1], r[2], r[3]);
  }
#if FASTBERT_WIDTH > 4
  // log2(W / 4) perfect shuffles of the blocks of each of four columns
  for (int round = 4; round < W; round *= 2)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      F next[W / 4];
#pragma GCC unroll 4
      for (int j = 0; j < W / 8; ++j)
        zip_fours(rows[4 * j + c], rows[4 * j + c + W / 2], next[2 * j], next[2 * j + 1]);
#pragma GCC unroll 4
      for (int j = 0; j < W / 4; ++j) rows[4 * j + c] = next[j];
    }
#endif
}

// two neighbouring k in bf16 as one unit
inline float pair(float low, float high) {
  return bits_as<float>(uint32_t{narrow(set1(low))[0]} |
                        static_cast<uint32_t>(narrow(set1(high))[0]) << 16);
}
inline F pairs_of(F low, F high) {
  return bits_as<F>(__builtin_convertvector(narrow(low), U) |
                    __builtin_convertvector(narrow(high), U) << 16);
}

// W units of a unit-stride line, from unit u on
template <bool kPairs, typename T>
inline F load_units(const T* p, int64_t u) {
  if constexpr (!kPairs) {
    return load(p + u);
  } else {
    const H halves[2] = {narrow(load(p + 2 * u)), narrow(load(p + 2 * u + W))};
    F whole;
    __builtin_memcpy(&whole, halves, sizeof(whole));
    return whole;
  }
}

template <bool kPairs, typename T>
inline float load_unit(const T* p, int64_t u, int64_t stride, int64_t K) {
  if constexpr (!kPairs) return load1(p + u * stride);
  const float low = load1(p + 2 * u * stride);
  return pair(low, 2 * u + 1 < K ? load1(p + (2 * u + 1) * stride) : 0.0f);
}

// A panel of `width` lines (the rows of A or the columns of B), of which `lines` > 0 exist, for k
// in [k0, k0 + K): out[unit * width + line]. Line i is m.at(first + i), its element k at k * m.col.
// The other lines get arbitrary values, whose results are never used. Up to W floats behind the
// panel are overwritten.
template <bool kPairs, typename Lines>
inline void pack_lines(const Lines& m, int64_t first, int64_t lines, int64_t width, int64_t k0,
                       int64_t K, float* out) {
  const int64_t count = units(K, kPairs), whole = kPairs ? K / 2 : K;
  int64_t line = 0;
  // unit-stride lines are transposed in registers, W at a time; a panel narrower than a vector is
  // also written in vectors, and each unit overwrites the end of the one before
  const int64_t blocks = m.col != 1 ? 0 : width < W ? 1 : width / W;
  for (int64_t block = 0; block < blocks; ++block, line += W) {
    decltype(m.at(0)) source[W];
    for (int j = 0; j < W; ++j) source[j] = m.at(first + imin(line + j, lines - 1)) + k0;
    const int64_t stored = imin(W, width);
    int64_t u = 0;
    for (; u + W <= whole; u += W) {
      F square[W];
      for (int j = 0; j < W; ++j) square[j] = load_units<kPairs>(source[j], u);
      transpose(square);
      for (int j = 0; j < W; ++j) store(out + (u + j) * width + line, square[j]);
    }
    for (; u < count; ++u)
      for (int j = 0; j < stored; ++j)
        out[u * width + line + j] = load_unit<kPairs>(source[j], u, 1, K);
  }
  for (; line < width; ++line) {
    const auto* p = m.at(first + imin(line, lines - 1)) + k0 * m.col;
    for (int64_t u = 0; u < count; ++u) out[u * width + line] = load_unit<kPairs>(p, u, m.col, K);
  }
}

// One unit of a panel, for `lines` <= width lines that are adjacent at p (and at q for the second
// half of a pair). With `loose`, W floats may be read and written even if the panel is narrower.
template <bool kPairs, typename T>
inline void pack_unit(const T* p, const T* q, bool loose, int64_t lines, int64_t width, float* to) {
  const auto vector = [&](int64_t line) {
    const F low = load(p + line);
    store(to + line, kPairs ? pairs_of(low, q ? load(q + line) : zero()) : low);
  };
  int64_t line = 0;
  if (loose && width <= W) {
    vector(0);
    return;
  }
  for (; line + W <= lines; line += W) vector(line);
  for (; line < lines; ++line) {
    const float low = load1(p + line);
    to[line] = kPairs ? pair(low, q ? load1(q + line) : 0.0f) : low;
  }
  for (; line < width; ++line) to[line] = 0.0f;
}

// An operand: `lines` are rows of A or columns of B. Either line i is m.at(i) with stride m.col, or
// (`across`) element k of line i is m.at(k)[i].
template <typename T, typename Lines = Matrix<T>>
struct Operand {
  Lines m;
  int64_t lines;
  bool across;

  // panels [p0, p1) of `width` lines, for k in [k0, k0 + K), one after the other
  template <bool kPairs>
  void pack(int64_t p0, int64_t p1, int64_t width, int64_t k0, int64_t K, float* out) const {
    const int64_t stride = units(K, kPairs) * width;
    if (!across) {
      for (int64_t p = p0; p < p1; ++p)
        pack_lines<kPairs>(m, p * width, imin(width, lines - p * width), width, k0, K,
                           out + (p - p0) * stride);
      return;
    }
    // a few rows and a group of panels at a time: reads and writes are contiguous runs
    const int64_t count = units(K, kPairs);
    for (int64_t g = p0; g < p1; g += kGroup)
      for (int64_t u = 0; u < count; u += kRows)
        for (int64_t p = g; p < imin(g + kGroup, p1); ++p)
          pack_rows<kPairs>(p * width, width, k0, K, u, imin(u + kRows, count),
                            out + (p - p0) * stride);
  }

 private:
  static constexpr int64_t kRows = 8, kGroup = 64;

  // units [from, to) of the panel that starts at line `first`
  template <bool kPairs>
  void pack_rows(int64_t first, int64_t width, int64_t k0, int64_t K, int64_t from, int64_t to,
                 float* out) const {
    const int64_t left = imin(width, lines - first), count = units(K, kPairs);
    // the last unit's vector would overwrite the next panel, which may be complete already
    const bool readable = first + W <= lines, exact = width % W == 0;
    for (int64_t u = from; u < to; ++u) {
      const int64_t k = k0 + (kPairs ? 2 * u : u);
      const T* p = m.at(k) + first;
      const T* q = kPairs && k + 1 < k0 + K ? m.at(k + 1) + first : nullptr;
      // the rows that follow once this group of panels is done
      __builtin_prefetch(p + kRows * m.row);
      pack_unit<kPairs>(p, q, readable && (exact || u + 1 < count), left, width, out + u * width);
    }
  }
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert
