// The instruction sets of this build, the one that runs, and a kernel's entry points in all of
// them. Only one source file of a program includes this: bindings.cpp, or
// tests/cpu/native_check.cpp.
#pragma once

#define FASTBERT_ISA baseline
#include "entries.h"
#undef FASTBERT_ISA
#ifdef FASTBERT_HAS_avx2
#define FASTBERT_ISA avx2
#include "entries.h"
#undef FASTBERT_ISA
#endif
#ifdef FASTBERT_HAS_avx512
#define FASTBERT_ISA avx512
#include "entries.h"
#undef FASTBERT_ISA
#endif
#ifdef FASTBERT_HAS_avx512_bf16
#define FASTBERT_ISA avx512_bf16
#include "entries.h"
#undef FASTBERT_ISA
#endif
#ifdef FASTBERT_HAS_emulated
#define FASTBERT_ISA emulated
#include "entries.h"
#undef FASTBERT_ISA
#endif

namespace fastbert {
namespace {

struct Isa {
  const char* name;
  bool (*runs)();  // whether this machine has it
};

#ifdef __x86_64__
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// slowest first, then `emulated`, which is for tests and never selected automatically
const Isa kIsas[] = {
    {"baseline", [] { return true; }},
#ifdef FASTBERT_HAS_avx2
    {"avx2", has_avx2},
#endif
#ifdef FASTBERT_HAS_avx512
    {"avx512", has_avx512},
#endif
#ifdef FASTBERT_HAS_avx512_bf16
    {"avx512_bf16",
     [] {
       return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
              __builtin_cpu_supports("avx512vnni");
     }},
#endif
#if defined(FASTBERT_HAS_emulated) && defined(FASTBERT_HAS_avx2)
    {"emulated", has_avx2},  // setup.py builds it with AVX2 if the compiler has that
#elif defined(FASTBERT_HAS_emulated)
    {"emulated", [] { return true; }},
#endif
};
constexpr int kCount = sizeof(kIsas) / sizeof(kIsas[0]);

int current = 0;

template <typename R, typename... A>
struct Entry {
  R (*of[kCount])(A...);

  R operator()(A... args) const { return of[current](args...); }
};

template <typename R, typename... A, typename... Others>
Entry<R, A...> entry(R (*first)(A...), Others... others) {
  return {{first, others...}};
}

#ifdef FASTBERT_HAS_avx2
#define FASTBERT_AVX2(op) , &avx2::op
#else
#define FASTBERT_AVX2(op)
#endif
#ifdef FASTBERT_HAS_avx512
#define FASTBERT_AVX512(op) , &avx512::op
#else
#define FASTBERT_AVX512(op)
#endif
#ifdef FASTBERT_HAS_avx512_bf16
#define FASTBERT_AVX512_BF16(op) , &avx512_bf16::op
#else
#define FASTBERT_AVX512_BF16(op)
#endif
#ifdef FASTBERT_HAS_emulated
#define FASTBERT_EMULATED(op) , &emulated::op
#else
#define FASTBERT_EMULATED(op)
#endif
// the entry points of `op` in all sets; a call runs that of the current set
#define FASTBERT_ENTRY(op)                                                           \
  entry(&baseline::op FASTBERT_AVX2(op) FASTBERT_AVX512(op) FASTBERT_AVX512_BF16(op) \
            FASTBERT_EMULATED(op))

}  // namespace
}  // namespace fastbert
