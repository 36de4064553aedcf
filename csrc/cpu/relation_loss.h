// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// loss = sum over heads and rows of KL(P' || P) inside each packed sequence, P = softmax(S) with
// S = Z Z^T / sqrt(D) of the student's Z, P' likewise of the teacher's. Both are of `dtype`. The
// stats are each row's largest product z_i . z_j, then its sum of e^(S - largest S). Rows from
// cu_seqlens[B] on are not read; their stats are 0.
void relation_loss_fwd(int dtype,
                       const void* student,        // (T, H, D)
                       const void* teacher,        // (T, H, Dt)
                       const int32_t* cu_seqlens,  // (B + 1,)
                       float* loss,                // (1,)
                       float* student_stats,       // (2, H, T), or null
                       float* teacher_stats,       // (2, H, T), or null
                       int64_t T, int64_t B, int64_t H, int64_t D, int64_t Dt, int threads);

// dstudent in `dtype`, 0 in rows from cu_seqlens[B] on
void relation_loss_bwd(int dtype, float dloss,
                       const void* student,         // (T, H, D)
                       const void* teacher,         // (T, H, Dt)
                       const float* student_stats,  // (2, H, T)
                       const float* teacher_stats,  // (2, H, T)
                       const int32_t* cu_seqlens,   // (B + 1,)
                       void* dstudent,              // (T, H, D)
                       int64_t T, int64_t B, int64_t H, int64_t D, int64_t Dt, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
