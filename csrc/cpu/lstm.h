// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// The recurrence of an LSTM layer over packed sequences, D directions at once: the first reads each
// sequence from its first token on, the second from its last. Rows of `gates` hold x W_ih^T + b of
// each direction, in the order i, f, g, o. `order` has the sequences' numbers, longest first.
// Rows from cu_seqlens[B] on are not read, and results there are 0. A sequence's results have the
// same bits whatever else is in the batch, for any number of threads.
void lstm_fwd(int dtype, int w_dtype,
              const void* gates,  // (T, D, 4, H)
              const void* w0,
              const void* w1,             // (4, H, H) of each direction; w1 is not read at D = 1
              const int32_t* cu_seqlens,  // (B + 1,)
              const int32_t* order,       // (B,)
              const float* h0, const float* c0,  // (D, B, H), or null: zeros
              void* y,                           // (T, D, H)
              float* cells,                      // (T, D, H)
              void* activated,                   // (T, D, 4, H), or null
              int64_t T, int64_t B, int64_t H, int64_t D, int threads);

// The gradients for that of y and, if given, that of cells. dweights are of w_dtype.
void lstm_bwd(int dtype, int w_dtype,
              const void* dy,         // (T, D, H)
              const float* dcells,    // (T, D, H), or null
              const void* activated,  // (T, D, 4, H)
              const void* y,          // (T, D, H)
              const float* cells,     // (T, D, H)
              const void* w0, const void* w1, const int32_t* cu_seqlens, const int32_t* order,
              const float* h0, const float* c0,
              void* dgates,            // (T, D, 4, H)
              void* dweights,          // (D, 4, H, H), or null
              float* dh0, float* dc0,  // (D, B, H), or null
              int64_t T, int64_t B, int64_t H, int64_t D, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
