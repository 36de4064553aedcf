// What attention's forward and backward share: the form of a call, one head of one sequence, the
// softmax of a row of scores, and dropout's factors of that row.
#pragma once

#include "heads.h"
#include "philox.h"

namespace fastbert {
namespace FASTBERT_ISA {

// the largest D
constexpr int64_t kMostD = 256;

// What all heads of a call share.
struct Form {
  int64_t H, kv_heads, D;
  float scale;
  int64_t left, right;  // the keys that a query sees before and behind it; all where negative
  const float* rotary;  // (P, 2, half): cosines and sines of every position; or null
  int64_t half;
  bool pairs;         // rotated together are elements 2 d and 2 d + 1, else d and d + half
  const float* bias;  // (H, 2 P - 1): of key j for query i at j - i + P - 1; or null
  int64_t positions;  // P of `bias`

  int64_t stride() const { return (H + 2 * kv_heads) * D; }
  int64_t depth() const { return round_up(D, kNR); }
  bool windowed() const { return left >= 0 && right >= 0; }
  // the number of queries in a block of a sequence of L tokens
  int64_t block(int64_t L) const {
    return windowed() ? round_up(imin(imax(L, 1), 4 * kMR), kMR) : block_rows(L);
  }
  // stride of a block's scores: whole panels of the most keys that a block sees
  int64_t ld(int64_t L) const {
    const int64_t whole = round_up(L, kNR);
    return windowed() ? imin(whole, round_up(block(L) + left + right + kNR, kNR)) : whole;
  }

  // token i's row x (D) in fp32 with its position's rotation, or with the opposite one
  template <typename T>
  void rotate(const T* x, int64_t i, bool back, float* to) const {
    const float* c = rotary + i * 2 * half;
    const float* s = c + half;
    const float sign = back ? -1.0f : 1.0f;
    if (pairs) {
      for (int64_t d = 0; d < half; ++d) {
        const float a = load1(x + 2 * d), b = load1(x + 2 * d + 1);
        to[2 * d] = a * c[d] - b * sign * s[d];
        to[2 * d + 1] = b * c[d] + a * sign * s[d];
      }
    } else {
      for (int64_t d = 0; d < half; d += W) {
        const F a = load(x + d, half - d), b = load(x + half + d, half - d);
        const F cos = load(c + d, half - d), sin = load(s + d, half - d) * sign;
        store(to + d, a * cos - b * sin, half - d);
        store(to + half + d, b * cos + a * sin, half - d);
      }
    }
    for (int64_t d = 2 * half; d < D; d += W) store(to + d, load(x + d, D - d), D - d);
  }
};

// One head of one sequence. `seen` and `keys` are ranges of its keys.
struct Head {
  const Form& form;
  int64_t start, L, b, h;

  int64_t group() const { return h / (form.H / form.kv_heads); }
  template <typename T>
  T* row(T* qkv, int which, int64_t i) const {
    const int64_t head = which == 0 ? h : form.H + (which - 1) * form.kv_heads + group();
    return qkv + (start + i) * form.stride() + head * form.D;
  }
  // `count` tokens of q, k or v (`which` 0, 1 or 2) as an operand: line i is token `first` + i or,
  // with `across`, column i
  template <typename T>
  Operand<T> operand(const T* qkv, int which, int64_t first, int64_t count, bool across) const {
    const Matrix<T> m = matrix(row(qkv, which, first), form.stride(), 1);
    return {m, across ? form.D : count, across};
  }
  // the same of rows (count, D) that were rotated
  Operand<float> rotated(const float* rows, int64_t count, bool across) const {
    return {matrix(rows, form.D, 1), across ? form.D : count, across};
  }
  template <typename T>
  void rotate(const T* qkv, int which, int64_t first, int64_t count, float* to) const {
    for (int64_t i = 0; i < count; ++i)
      form.rotate(row(qkv, which, first + i), first + i, false, to + i * form.D);
  }
  // body(rows), where rows(across) is an operand of `count` rows of q or k from `first` on, rotated
  // into the room `rotated` where the form says so
  template <typename T, typename Body>
  void with_rows(const T* qkv, int which, int64_t first, int64_t count, float* rotated,
                 const Body& body) const {
    if (form.rotary) {
      rotate(qkv, which, first, count, rotated);
      body([&](bool across) { return this->rotated(rotated, count, across); });
    } else {
      body([&](bool across) { return operand(qkv, which, first, count, across); });
    }
  }
  template <typename T>
  Operand<T> rows_of(const T* y, int64_t first, int64_t count, bool across) const {
    const T* p = y + ((start + first) * form.H + h) * form.D;
    return {matrix(p, form.H * form.D, 1), across ? form.D : count, across};
  }
  Span seen(int64_t i) const {
    return {form.left < 0 ? 0 : imax(0, i - form.left),
            form.right < 0 ? L : imin(L, i + form.right + 1)};
  }
  // the keys that queries [i, i + rows) see; the range begins where a panel of kNR keys begins
  Span keys(int64_t i, int64_t rows) const {
    return {seen(i).from / kNR * kNR, seen(i + rows - 1).to};
  }
  // the bias of query i's key 0
  const float* bias(int64_t i) const {
    return form.bias ? form.bias + h * (2 * form.positions - 1) + form.positions - 1 - i : nullptr;
  }
};

// v, a vector that begins at column j, in the columns of `of`, and `other` in the rest
inline F inside(F v, int64_t j, Span of, F other) {
  if (j + W > of.to) v = below(of.to - j) ? v : other;
  if (j < of.from) v = below(of.from - j) ? other : v;
  return v;
}

struct Softmax {
  float max, sum;
};

// s, at the keys of `seen`, becomes exp(scale s + bias - max), and 0 at the others of `span`
inline Softmax softmax_row(float* s, Span seen, Span span, float scale, const float* bias) {
  const int64_t first = seen.from / W * W;
  const F lowest = set1(-__builtin_inff());
  F top = lowest;
  for (int64_t j = first; j < seen.to; j += W) {
    F v = load(s + j) * scale;
    if (bias) v += load(bias + j, seen.to - j);
    v = inside(v, j, seen, lowest);
    store(s + j, v);
    top = max(v, top);
  }
  const float m = max(top);
  F total = zero();
  for (int64_t j = first; j < seen.to; j += W) {
    const F e = exp_nonpositive(load(s + j) - m);
    store(s + j, e);
    total += e;
  }
  for (int64_t j = span.from; j < first; j += W) store(s + j, zero());
  for (int64_t j = round_up(seen.to, W); j < span.to; j += W) store(s + j, zero());
  return {m, sum(total)};
}

// Dropout's factors of the columns that query i sees; column j is at [j].
struct Factors {
  Factors(const Dropout& dropout, const Head& head, int64_t i, Span seen, float* room)
      : drops(dropout.enabled()), first(seen.from / kPhiloxWords * kPhiloxWords), at(room) {
    if (drops)
      philox_factors(dropout, static_cast<uint32_t>(i),
                     static_cast<uint32_t>(head.b * head.form.H + head.h), dropout.site, first,
                     seen.to, room);
  }
  F operator[](int64_t j) const { return load(at + j - first); }
  // floats of room for `n` columns
  static int64_t room(int64_t n) { return round_up(n, kPhiloxWords) + 2 * kPhiloxWords; }

  bool drops;
  int64_t first;
  const float* at;
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert
