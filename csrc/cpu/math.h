// Elementary functions of a vector of floats, and activations next to their derivatives. The
// polynomials were fitted for this file by iterated weighted least squares against fp64 (errors
// beside them).
#pragma once

#include "runtime.h"
#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {

// e^x within 1 ulp for x <= 0, as softmax and GELU need it; 0 below -87.7, NaN for NaN
//
//   x = n ln 2 + r,  |r| <= ln 2 / 2,  e^r = 1 + r + r^2 q(r),  relative error of q's fit 3e-9
//
// Adding 1.5 * 2^23 + 127 rounds x / ln 2 to n and leaves n + 127 in the low bits; a shift turns
// these into the exponent of 2^n. Below -87.7 n is -127, and 2^n is 0.
inline F exp_nonpositive(F x) {
  const F magic = set1(12583039.0f);
  const F bounded = max(set1(-88.0f), x);
  const F biased = bounded * 1.44269504f + magic;
  const F n = biased - magic;
  const F r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  F q = r * 0.00138146128f + 0.00836871006f;
  q = q * r + 0.041668389f;
  q = q * r + 0.166665211f;
  q = q * r + 0.49999994f;
  const F power = (q * (r * r) + r) + 1.0f;
  return power * bits_as<F>(bits_as<U>(biased) << 23);
}

// e^x = scale (1 + less) with a power of two, as above for both signs of x, within 88 of 0; `less`
// keeps its relative precision near 0
struct Power {
  F less, scale;
};
inline Power power_of(F x) {
  const F magic = set1(12583039.0f);
  const F bounded = min(set1(88.0f), max(set1(-87.0f), x));
  const F biased = bounded * 1.44269504f + magic;
  const F n = biased - magic;
  const F r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  F q = r * 0.00138146128f + 0.00836871006f;
  q = q * r + 0.041668389f;
  q = q * r + 0.166665211f;
  q = q * r + 0.49999994f;
  return {q * (r * r) + r, bits_as<F>(bits_as<U>(biased) << 23)};
}

// 1 / (1 + e^-x)
inline F sigmoid(F x) {
  const Power p = power_of(-x);
  return 1.0f / (p.less * p.scale + (p.scale + 1.0f));
}

// m / (m + 2),  m = e^2x - 1
inline F tanh(F x) {
  const Power p = power_of(x + x);
  const F m = p.less * p.scale + (p.scale - 1.0f);
  return m / (m + 2.0f);
}

struct Activated {
  F value, derivative;
};

// x cdf(x) and cdf(x) + x pdf(x) of the standard normal distribution, the exact GELU
//
//   cdf(-|x|) = e^(-x^2 / 2) t poly(t),  t = 1 / (1 + 0.3 |x|),  relative error of the fit 3.5e-9
//
// so that the left tail keeps its relative precision; the exponential also gives the density.
inline Activated gelu_erf(F x) {
  // beyond 14 the exponential is 0: the bounds avoid infinity times 0, and keep a NaN
  const F above = max(set1(-14.0f), x);
  const F inside = min(set1(14.0f), above);
  const F t = 1.0f / (1.0f + 0.3f * abs(inside));
  const F e = exp_nonpositive(-0.5f * inside * inside);
  F poly = t * -0.0206235703f + 0.11243616f;
  poly = poly * t - 0.228214875f;
  poly = poly * t + 0.191786215f;
  poly = poly * t - 0.0794248581f;
  poly = poly * t + 0.0961575508f;
  poly = poly * t + 0.0783894062f;
  poly = poly * t + 0.110235475f;
  poly = poly * t + 0.119571805f;
  poly = poly * t + 0.119686693f;
  const F tail = e * t * poly;
  const F cdf = x < zero() ? tail : 1.0f - tail;
  return {above * cdf, cdf + inside * e * 0.398942280f};
}

// x s and s + x s (1 - s) 2 y',  s = sigmoid(2 y),  y = sqrt(2 / pi) (x + 0.044715 x^3)
inline Activated gelu_tanh(F x) {
  const F above = max(set1(-15.0f), x);
  const F inside = min(set1(15.0f), above);
  const F square = inside * inside;
  const F twice = abs(inside) * (square * 0.0713548162726f + 1.59576912161f);
  const F e = exp_nonpositive(-twice);
  const F right = 1.0f / (1.0f + e);
  const F left = e * right;
  const F s = x < zero() ? left : right;
  const F slope = square * (3.0f * 0.0713548162726f) + 1.59576912161f;
  return {above * s, s + inside * slope * (left * right)};
}

// x s and s + x s (1 - s),  s = sigmoid(x), from e^-|x|: the left tail keeps its relative precision
inline Activated silu(F x) {
  // beyond 88 the exponential is 0: the bounds avoid infinity times 0, and keep a NaN
  const F above = max(set1(-88.0f), x);
  const F inside = min(set1(88.0f), above);
  const F e = exp_nonpositive(-abs(inside));
  const F right = 1.0f / (1.0f + e);
  const F left = e * right;
  const F s = x < zero() ? left : right;
  return {above * s, s + inside * (left * right)};
}

// x s and s + k x s (1 - s),  s = sigmoid(k x),  k = 1.702
inline Activated gelu_sigmoid(F x) {
  const Activated scaled = silu(x * 1.702f);
  return {scaled.value * (1.0f / 1.702f), scaled.derivative};
}

template <Activation kActivation>
inline Activated activate(F x) {
  if constexpr (kActivation == kSilu) return silu(x);
  if constexpr (kActivation == kGeluTanh) return gelu_tanh(x);
  if constexpr (kActivation == kGeluSigmoid) return gelu_sigmoid(x);
  return gelu_erf(x);
}

template <Activation kValue>
struct Chosen {
  static constexpr Activation value = kValue;
};

// Calls body with a value of the type Chosen<activation>, for one of GELU's three forms.
template <typename Body>
inline void with_gelu(int activation, const Body& body) {
  if (activation == kGeluTanh)
    body(Chosen<kGeluTanh>{});
  else if (activation == kGeluSigmoid)
    body(Chosen<kGeluSigmoid>{});
  else
    body(Chosen<kGelu>{});
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
