// The multiply-adds of matrix products, in the instructions of each set: fp32, pairs of bf16, pairs
// of int16, and fours of 8 bits.
#pragma once

#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {

#if FASTBERT_DOT_BF16
// lane i of a and b holds two bf16: acc[i] += a0 * b0 + a1 * b1
inline F dot_pairs(F acc, U a, U b) {
#if FASTBERT_X86 == 512
  return bits_as<F>(
      _mm512_dpbf16_ps(bits_as<__m512>(acc), bits_as<__m512bh>(a), bits_as<__m512bh>(b)));
#else
  acc += bits_as<F>(a << 16) * bits_as<F>(b << 16);
  return acc + bits_as<F>(a & 0xFFFF0000u) * bits_as<F>(b & 0xFFFF0000u);
#endif
}
#endif

// lane i of a and b holds two int16: acc[i] += a0 * b0 + a1 * b1, exact in int32
inline I dot_words(I acc, I a, I b) {
#if FASTBERT_X86 == 512
  return acc + bits_as<I>(_mm512_madd_epi16(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif FASTBERT_X86 == 256
  return acc + bits_as<I>(_mm256_madd_epi16(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#elif FASTBERT_X86 == 128
  return acc + bits_as<I>(_mm_madd_epi16(bits_as<__m128i>(a), bits_as<__m128i>(b)));
#else
  const I low = (bits_as<I>(bits_as<U>(a) << 16) >> 16) * (bits_as<I>(bits_as<U>(b) << 16) >> 16);
  return acc + low + (a >> 16) * (b >> 16);
#endif
}

#if FASTBERT_DOT_BYTES && !FASTBERT_X86
// lane i of a holds four uint8, of b four int8: acc[i] += a0 * b0 + .. + a3 * b3, modulo 2^32
inline U dot_bytes(U acc, U a, I b) {
  for (int shift = 0; shift < 32; shift += 8)
    acc += (a >> shift & 0xFFu) * bits_as<U>((bits_as<I>(bits_as<U>(b) << (24 - shift))) >> 24);
  return acc;
}
#endif

// What a product multiplies: the 32-bit units of its operands.
enum Kind {
  kFloats,  // one fp32
  kHalves,  // two bf16 of neighbouring k, summed in fp32
  kWords,   // two int16 of neighbouring k, summed in int32; B is kept in int8
  kBytes,   // four k: uint8 of A, int8 of B, summed in uint32 modulo 2^32
};
template <Kind kKind>
struct Units {
  using Sum = F;    // W sums
  using B = float;  // a unit of B in memory
  static FASTBERT_INLINE F load_b(const B* p) { return load(p); }
};
template <int kCount>
struct Bytes {
  int8_t of[kCount];
};
template <>
struct Units<kWords> {
  using Sum = I;
  using B = Bytes<2>;
  // W pairs of int8, widened
  static FASTBERT_INLINE F load_b(const B* p) {
    typedef int8_t V __attribute__((vector_size(2 * W)));
    V bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
#if FASTBERT_X86 == 512
    return bits_as<F>(_mm512_cvtepi8_epi16(bits_as<__m256i>(bytes)));
#elif FASTBERT_X86 == 256
    return bits_as<F>(_mm256_cvtepi8_epi16(bits_as<__m128i>(bytes)));
#else
    typedef int16_t Words __attribute__((vector_size(4 * W)));
    return bits_as<F>(__builtin_convertvector(bytes, Words));
#endif
  }
};
template <>
struct Units<kBytes> {
  using Sum = U;
  using B = Bytes<4>;
  static FASTBERT_INLINE F load_b(const B* p) { return load(reinterpret_cast<const float*>(p)); }
};

// low += x b0 and high += x b1, where every lane of x is *a. These are three or five instructions
// in assembly: in an unrolled loop GCC 12 would give the sums other registers at every step, and
// keep one of them in memory.
template <Kind kKind, typename Sum>
FASTBERT_INLINE void multiply_add(Sum& low, Sum& high, const float* a, F b0, F b1) {
  static_assert(FASTBERT_DOT_BF16 || kKind != kHalves, "pairs of bf16 need their instruction");
  static_assert(FASTBERT_DOT_BYTES || kKind != kBytes, "fours of 8 bits need their instruction");
#if FASTBERT_X86 >= 256
#define FASTBERT_MULTIPLY(broadcast, instruction)                                    \
  asm(broadcast " %[a], %[x]\n\t" instruction " %[b0], %[x], %[low]\n\t" instruction \
                " %[b1], %[x], %[high]"                                              \
      : [low] "+v"(low), [high] "+v"(high), [x] "=&v"(x)                             \
      : [a] "m"(*a), [b0] "v"(b0), [b1] "v"(b1))
  F x;
  if constexpr (kKind == kFloats) FASTBERT_MULTIPLY("vbroadcastss", "vfmadd231ps");
#if FASTBERT_DOT_BF16
  if constexpr (kKind == kHalves) FASTBERT_MULTIPLY("vbroadcastss", "vdpbf16ps");
#endif
#ifdef __AVX512VNNI__
  if constexpr (kKind == kWords) FASTBERT_MULTIPLY("vpbroadcastd", "vpdpwssd");
  if constexpr (kKind == kBytes) FASTBERT_MULTIPLY("vpbroadcastd", "vpdpbusd");
#else
  F y;
  if constexpr (kKind == kWords)
    asm("vpbroadcastd %[a], %[x]\n\t"
        "vpmaddwd %[b0], %[x], %[y]\n\t"
        "vpmaddwd %[b1], %[x], %[x]\n\t"
        "vpaddd %[y], %[low], %[low]\n\t"
        "vpaddd %[x], %[high], %[high]"
        : [low] "+v"(low), [high] "+v"(high), [x] "=&v"(x), [y] "=&v"(y)
        : [a] "m"(*a), [b0] "v"(b0), [b1] "v"(b1));
#endif
#undef FASTBERT_MULTIPLY
#else
  // as an integer: a pair may be a signalling NaN, which a float copy may change
  const U x = set1(bits_as<uint32_t>(*a));
  if constexpr (kKind == kFloats) {
    low += bits_as<F>(x) * b0;
    high += bits_as<F>(x) * b1;
  }
#if FASTBERT_DOT_BF16
  if constexpr (kKind == kHalves) {
    low = dot_pairs(low, x, bits_as<U>(b0));
    high = dot_pairs(high, x, bits_as<U>(b1));
  }
#endif
  if constexpr (kKind == kWords) {
    low = dot_words(low, bits_as<I>(x), bits_as<I>(b0));
    high = dot_words(high, bits_as<I>(x), bits_as<I>(b1));
  }
#if FASTBERT_DOT_BYTES
  if constexpr (kKind == kBytes) {
    low = dot_bytes(low, x, bits_as<I>(b0));
    high = dot_bytes(high, x, bits_as<I>(b1));
  }
#endif
#endif
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
