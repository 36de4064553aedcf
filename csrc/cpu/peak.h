// No include guard: isas.h includes this, by entries.h, once per instruction set.

namespace fastbert {
namespace FASTBERT_ISA {

// GFLOP/s of fp32 multiply-adds on values held in registers, on `threads` threads
double fma_peak(int threads);

// the same for the bf16 dot-product instruction; 0 if the set has none
double dot_peak(int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
