// No include guard: bindings.cpp includes this once per instruction set.

namespace fastbert {
namespace FASTBERT_ISA {

// GFLOP/s of fp32 multiply-adds on values held in registers, on so many threads
double fma_peak(int threads);

// the same of the bf16 dot-product instruction; 0 where the set has none
double dot_peak(int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
