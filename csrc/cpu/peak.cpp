// The peak rate of one instruction set's arithmetic units: an upper bound for any GEMM.
#include "peak.h"

#include "product.h"
#include "runtime.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// x86 before AVX-512 has 16 vector registers, AVX-512 and aarch64 have 32; four stay free for the
// factors. 12 chains cover 2 units of latency 4 or 5, 28 cover aarch64's 4 units
constexpr int kChains = (FASTBERT_X86 == 128 || FASTBERT_X86 == 256 ? 16 : 32) - 4;
// one to three milliseconds: long for the start of a parallel region, short for a time slice
constexpr int64_t kSteps = int64_t{1} << 19;
constexpr double kSeconds = 0.3;

struct Fma {
  static constexpr int flops = 2 * W;
  F b = set1(0.5f), c = set1(1.0f);
  F operator()(F a) const { return a * b + c; }
};

#if FASTBERT_DOT_BF16
struct Dot {
  static constexpr int flops = 4 * W;
  U b = set1(0x3F803F80u), c = set1(0x3F803F80u);
  F operator()(F a) const { return dot_pairs(a, b, c); }
};
#endif

// kSteps steps of every chain; the result keeps the compiler from removing them
template <typename Step>
__attribute__((noinline)) float run_chains(Step step) {
  // hides the factors' values from the compiler
  asm volatile("" : : "r"(&step) : "memory");
  const Step held = step;
  F a[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) a[i] = set1(static_cast<float>(i));
  for (int64_t s = 0; s < kSteps; ++s) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) a[i] = held(a[i]);
  }
  F total = zero();
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) total += a[i];
  return sum(total);
}

// the fastest run within kSeconds: other load on the machine only slows runs down
template <typename Step>
double peak(int threads) {
  const int team = team_size(threads, 1, threads, threads);
  const double end = seconds() + kSeconds;
  double best = 0, started = 0;
  while ((started = seconds()) < end) {
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int part = 0; part < team; ++part) {
      const float kept = run_chains(Step{});
      asm volatile("" : : "m"(kept));
    }
    const double flops = double{Step::flops} * kChains * kSteps * team;
    const double rate = flops / (seconds() - started) / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

double fma_peak(int threads) { return peak<Fma>(threads); }

double dot_peak([[maybe_unused]] int threads) {
#if FASTBERT_DOT_BF16
  return peak<Dot>(threads);
#else
  return 0;
#endif
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
