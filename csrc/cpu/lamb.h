// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// A step of LAMB on n tensors is two calls, which take the same tables; the caller computes the
// rates from the squares in between. A row of `tensors` has the addresses of p, g, m and v, all
// contiguous fp32, and their number of elements. A row of `corrections` has 1 / (1 - beta1^t) and
// 1 / sqrt(1 - beta2^t). Results have the same bits for any number of threads.

// Moves the moments m and v towards g and g^2, and sums the squares of p and of the update.
void lamb_moments(const int64_t* tensors,     // (n, 5)
                  const double* corrections,  // (n, 2)
                  double* squares,            // (n, 2)
                  int64_t n, double beta1, double beta2, double eps, double weight_decay,
                  int threads);

// p <- p - rate * update
void lamb_update(const int64_t* tensors,     // (n, 5)
                 const double* corrections,  // (n, 2)
                 const double* rates,        // (n,)
                 int64_t n, double eps, double weight_decay, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
