// Vectors of W floats: with product.h the only file with intrinsics. Everything here is in the
// namespace of one instruction set (FASTBERT_ISA): a function shared by two sets might be compiled
// for the larger and called on a machine of the smaller.
//
// Arithmetic is GCC's and clang's vector extension (operators, ?:, comparisons give masks of -1 and
// 0); multiply-adds are contracted by the compiler where the instruction set has them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && !defined(FASTBERT_EMULATE)
#include <immintrin.h>
#endif

// lanes of fp32; the emulated instruction set has the layout of AVX-512 BF16 on any machine, so
// that its code can be tested where the instructions are missing
#if defined(FASTBERT_EMULATE) || defined(__AVX512F__)
#define FASTBERT_WIDTH 16
#elif defined(__AVX2__)
#define FASTBERT_WIDTH 8
#else
#define FASTBERT_WIDTH 4
#endif
#if defined(FASTBERT_EMULATE) || defined(__AVX512BF16__)
#define FASTBERT_DOT_BF16 1
#else
#define FASTBERT_DOT_BF16 0
#endif
#if defined(FASTBERT_EMULATE) || defined(__AVX512VNNI__)
#define FASTBERT_DOT_BYTES 1
#else
#define FASTBERT_DOT_BYTES 0
#endif
// bits of the x86 vectors that the intrinsics below use, 0 without them and under emulation
#if !defined(FASTBERT_EMULATE) && defined(__x86_64__)
#if defined(__AVX512F__)
#define FASTBERT_X86 512
#elif defined(__AVX2__)
#define FASTBERT_X86 256
#else
#define FASTBERT_X86 128
#endif
#else
#define FASTBERT_X86 0
#endif

#define FASTBERT_INLINE inline __attribute__((always_inline))

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int W = FASTBERT_WIDTH;

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));  // masks: -1 where true
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint64_t D __attribute__((vector_size(4 * W)));  // W / 2 lanes
typedef uint16_t H __attribute__((vector_size(2 * W)));  // bf16 bits
typedef double E __attribute__((vector_size(4 * W)));    // W / 2 lanes
// the same types in memory, aligned to one element only
typedef F F_mem __attribute__((aligned(4), may_alias));
typedef U U_mem __attribute__((aligned(4), may_alias));
typedef H H_mem __attribute__((aligned(2), may_alias));

// upper half of an IEEE float
struct bf16 {
  uint16_t bits;
};

inline int64_t imin(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t imax(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline F set1(float x) { return x - F{}; }
inline U set1(uint32_t x) { return x - U{}; }
inline F zero() { return F{}; }
// 0, 1, .., W - 1
inline U iota() {
  U lanes = {};
  for (int i = 0; i < W; ++i) lanes[i] = static_cast<uint32_t>(i);
  return lanes;
}

// --- memory: load and store all W lanes, or the first n if n < W; other lanes load as 0 ---

inline F load(const float* p) { return *reinterpret_cast<const F_mem*>(p); }
inline F widen(H h) {
#if FASTBERT_X86 == 256
  // GCC would convert in two halves
  return bits_as<F>(bits_as<U>(_mm256_cvtepu16_epi32(bits_as<__m128i>(h))) << 16);
#else
  return bits_as<F>(__builtin_convertvector(h, U) << 16);
#endif
}
inline F load(const bf16* p) { return widen(*reinterpret_cast<const H_mem*>(p)); }

inline F load(const float* p, int64_t n) {
  if (n >= W) return load(p);
  F v = {};
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
}
inline F load(const bf16* p, int64_t n) {
  if (n >= W) return load(p);
  H v = {};
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(bf16));
  return widen(v);
}

// rounds to nearest even; a NaN stays a NaN, whatever its payload
inline H narrow(F x) {
#if FASTBERT_X86 == 512 && FASTBERT_DOT_BF16
  return bits_as<H>(_mm512_cvtneps_pbh(bits_as<__m512>(x)));
#else
  const U bits = bits_as<U>(x);
  // a NaN becomes all ones: rounding could make it 0 or infinity
  const U rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const U upper = (rounded | bits_as<U>(x != x)) >> 16;
#if FASTBERT_X86 == 256
  const __m256i v = bits_as<__m256i>(upper);
  return bits_as<H>(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#else
  return __builtin_convertvector(upper, H);
#endif
#endif
}

inline void store(float* p, F v) { *reinterpret_cast<F_mem*>(p) = v; }
inline void store(bf16* p, F v) { *reinterpret_cast<H_mem*>(p) = narrow(v); }

// To memory, past the caches; p is aligned to a vector. `stream_end` makes it visible to other
// threads.
inline void stream(float* p, F v) {
#if FASTBERT_X86 == 512
  _mm512_stream_ps(p, bits_as<__m512>(v));
#elif FASTBERT_X86 == 256
  _mm256_stream_ps(p, bits_as<__m256>(v));
#elif FASTBERT_X86 == 128
  _mm_stream_ps(p, bits_as<__m128>(v));
#else
  store(p, v);
#endif
}
inline void stream_end() {
#if FASTBERT_X86
  _mm_sfence();
#endif
}

inline void store(float* p, F v, int64_t n) {
  if (n >= W) return store(p, v);
  __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
}
inline void store(bf16* p, F v, int64_t n) {
  if (n >= W) return store(p, v);
  const H h = narrow(v);
  __builtin_memcpy(p, &h, static_cast<size_t>(n) * sizeof(bf16));
}

inline float load1(const float* p) { return *p; }
inline float load1(const bf16* p) { return bits_as<float>(static_cast<uint32_t>(p->bits) << 16); }
inline void store1(float* p, float x) { *p = x; }
inline void store1(bf16* p, float x) { p->bits = narrow(set1(x))[0]; }

// the lanes below n, for 0 <= n
inline I below(int64_t n) { return iota() < set1(static_cast<uint32_t>(n)); }

// --- arithmetic beyond the operators ---

// if either is NaN the result is b
inline F max(F a, F b) {
#if FASTBERT_X86 == 512
  return bits_as<F>(_mm512_max_ps(bits_as<__m512>(a), bits_as<__m512>(b)));
#elif FASTBERT_X86 == 256
  return bits_as<F>(_mm256_max_ps(bits_as<__m256>(a), bits_as<__m256>(b)));
#elif FASTBERT_X86 == 128
  return bits_as<F>(_mm_max_ps(bits_as<__m128>(a), bits_as<__m128>(b)));
#else
  return a > b ? a : b;
#endif
}
inline F min(F a, F b) {
#if FASTBERT_X86 == 512
  return bits_as<F>(_mm512_min_ps(bits_as<__m512>(a), bits_as<__m512>(b)));
#elif FASTBERT_X86 == 256
  return bits_as<F>(_mm256_min_ps(bits_as<__m256>(a), bits_as<__m256>(b)));
#elif FASTBERT_X86 == 128
  return bits_as<F>(_mm_min_ps(bits_as<__m128>(a), bits_as<__m128>(b)));
#else
  return a < b ? a : b;
#endif
}
inline F sqrt(F x) {
#if FASTBERT_X86 == 512
  return bits_as<F>(_mm512_sqrt_ps(bits_as<__m512>(x)));
#elif FASTBERT_X86 == 256
  return bits_as<F>(_mm256_sqrt_ps(bits_as<__m256>(x)));
#elif FASTBERT_X86 == 128
  return bits_as<F>(_mm_sqrt_ps(bits_as<__m128>(x)));
#else
  F root;
  for (int i = 0; i < W; ++i) root[i] = __builtin_sqrtf(x[i]);
  return root;
#endif
}
// the first and the second half of the lanes in fp64
inline void widen(F x, E& low, E& high) {
#if FASTBERT_X86 == 512
  const __m512 v = bits_as<__m512>(x);
  low = bits_as<E>(_mm512_cvtps_pd(_mm512_castps512_ps256(v)));
  high = bits_as<E>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
#elif FASTBERT_X86 == 256
  const __m256 v = bits_as<__m256>(x);
  low = bits_as<E>(_mm256_cvtps_pd(_mm256_castps256_ps128(v)));
  high = bits_as<E>(_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
#else
  typedef float Half __attribute__((vector_size(2 * W)));
  Half halves[2];
  __builtin_memcpy(halves, &x, sizeof(x));
  low = __builtin_convertvector(halves[0], E);
  high = __builtin_convertvector(halves[1], E);
#endif
}
inline F abs(F x) { return bits_as<F>(bits_as<U>(x) & 0x7FFFFFFFu); }
inline float sqrt1(float x) { return __builtin_sqrtf(x); }

// fold(fold(lower half, upper half), ..) down to one lane
typedef float F4 __attribute__((vector_size(16)));
template <typename Fold>
inline float fold_lanes(F v, const Fold& fold) {
#if FASTBERT_WIDTH == 16
  typedef float F8 __attribute__((vector_size(32)));
  const F8 eight = fold(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                        __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  const F4 four = fold(__builtin_shufflevector(eight, eight, 0, 1, 2, 3),
                       __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
#elif FASTBERT_WIDTH == 8
  const F4 four =
      fold(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7));
#else
  const F4 four = v;
#endif
  const F4 two = fold(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
  return fold(two, __builtin_shufflevector(two, two, 1, 0, 3, 2))[0];
}
inline float sum(F v) {
  return fold_lanes(v, [](auto a, auto b) { return a + b; });
}
// largest lane; a NaN may be lost
inline float max(F v) {
  return fold_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

// --- integers for Philox ---

// the lower 32 bits of each lane times m; the upper 32 bits are ignored
inline D mul_low(D a, uint32_t m) {
#if FASTBERT_X86 == 512
  return bits_as<D>(_mm512_mul_epu32(bits_as<__m512i>(a), _mm512_set1_epi64(m)));
#elif FASTBERT_X86 == 256
  return bits_as<D>(_mm256_mul_epu32(bits_as<__m256i>(a), _mm256_set1_epi64x(m)));
#elif FASTBERT_X86 == 128
  return bits_as<D>(_mm_mul_epu32(bits_as<__m128i>(a), _mm_set1_epi64x(m)));
#else
  return (a & uint64_t{0xFFFFFFFF}) * uint64_t{m};
#endif
}

// lanes 0, 2, .. of both, a0 b0 a2 b2 .., then lanes 1, 3, ..: no lane crosses 128 bits
inline void zip_alternate(D a, D b, D& even, D& odd) {
#if FASTBERT_WIDTH == 16
  even = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
  odd = __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
#elif FASTBERT_WIDTH == 8
  even = __builtin_shufflevector(a, b, 0, 4, 2, 6);
  odd = __builtin_shufflevector(a, b, 1, 5, 3, 7);
#else
  even = __builtin_shufflevector(a, b, 0, 2);
  odd = __builtin_shufflevector(a, b, 1, 3);
#endif
}

// The three steps of a transposition, each of which zips two vectors into two. zip_floats takes
// a0 b0 a1 b1 | a2 b2 a3 b3 of every four lanes, zip_doubles a0 a1 b0 b1 | a2 a3 b2 b3, and
// zip_fours the groups of four lanes: A0 B0 A1 B1 .., first and second half.
inline void zip_floats(F a, F b, F& first, F& second) {
#if FASTBERT_WIDTH == 16
  first = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  second =
      __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif FASTBERT_WIDTH == 8
  first = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
  second = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  first = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  second = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}
inline void zip_doubles(F a, F b, F& first, F& second) {
#if FASTBERT_WIDTH == 16
  first = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  second =
      __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#elif FASTBERT_WIDTH == 8
  first = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
  second = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
#else
  first = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  second = __builtin_shufflevector(a, b, 2, 3, 6, 7);
#endif
}
#if FASTBERT_WIDTH > 4
inline void zip_fours(F a, F b, F& first, F& second) {
#if FASTBERT_WIDTH == 16
  first = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  second =
      __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#else
  first = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
  second = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
#endif
}
#endif

// the nearest int16 of 2 W floats below 2^15, low ones first
inline F words(F low, F high) {
#if FASTBERT_X86 == 512
  const __m256i a = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(bits_as<__m512>(low)));
  const __m256i b = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(bits_as<__m512>(high)));
  return bits_as<F>(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
#elif FASTBERT_X86 == 256
  const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(bits_as<__m256>(low)),
                                           _mm256_cvtps_epi32(bits_as<__m256>(high)));
  return bits_as<F>(_mm256_permute4x64_epi64(pairs, 0xD8));
#elif FASTBERT_X86 == 128
  return bits_as<F>(_mm_packs_epi32(_mm_cvtps_epi32(bits_as<__m128>(low)),
                                    _mm_cvtps_epi32(bits_as<__m128>(high))));
#else
  typedef int16_t Half __attribute__((vector_size(2 * W)));
  // adding 1.5 * 2^23 rounds to an integer, ties to even
  const auto rounded = [](F x) {
    const F up = x + 12582912.0f;
    return __builtin_convertvector(__builtin_convertvector(up - 12582912.0f, I), Half);
  };
  const Half halves[2] = {rounded(low), rounded(high)};
  F whole;
  __builtin_memcpy(&whole, halves, sizeof(whole));
  return whole;
#endif
}
#if FASTBERT_DOT_BYTES
// the nearest int8 of 4 W floats below 2^7, plus 128 each, low ones first
inline F bytes(const F x[4]) {
#if FASTBERT_X86 == 512
  __m128i quarters[4];
  for (int i = 0; i < 4; ++i)
    quarters[i] = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(bits_as<__m512>(x[i])));
#else
  typedef uint8_t Quarter __attribute__((vector_size(W)));
  Quarter quarters[4];
  for (int i = 0; i < 4; ++i)
    // adding 1.5 * 2^23 rounds to an integer, ties to even
    quarters[i] = __builtin_convertvector(
        __builtin_convertvector(x[i] + 12582912.0f - 12582912.0f, I), Quarter);
#endif
  U whole;
  __builtin_memcpy(&whole, quarters, sizeof(whole));
  return bits_as<F>(whole ^ 0x80808080u);
}
#endif
inline F to_float(I x) { return __builtin_convertvector(x, F); }

}  // namespace FASTBERT_ISA
}  // namespace fastbert
