// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// loss = lse - logits[label], lse = log sum exp of the row. Both are 0 where the label is
// ignore_index; loss is NaN where the label is outside [0, V). logits are of `dtype`.
void cross_entropy_fwd(int dtype,
                       const void* logits,     // (N, V)
                       const int64_t* labels,  // (N,)
                       float* loss,            // (N,)
                       float* lse,             // (N,)
                       int64_t N, int64_t V, int64_t ignore_index, int threads);

// dlogits = (softmax(logits) - onehot(label)) dloss, 0 in ignored rows
void cross_entropy_bwd(int dtype,
                       const float* dloss,     // (N,)
                       const void* logits,     // (N, V)
                       const int64_t* labels,  // (N,)
                       void* dlogits,          // (N, V)
                       int64_t N, int64_t V, int64_t ignore_index, int threads);

// forward and backward for dloss = 1 in one pass: softmax - onehot overwrites the logits
void cross_entropy_inplace(int dtype,
                           void* logits,           // (N, V)
                           const int64_t* labels,  // (N,)
                           float* loss,            // (N,)
                           float* lse,             // (N,)
                           int64_t N, int64_t V, int64_t ignore_index, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
