// The entry functions of fastbert._cuda, one block per .cu; bindings.cpp registers them.
//
// A pointer is device memory that the adapter in fastbert/backend/cuda/<slug>.py owns and checks;
// null stands for "not given". `dtype` is the number of the activations' element type,
// `<name>_dtype` that of a parameter's (types.cuh). Every entry launches on `stream` of `device`
// and returns without waiting. A launch that fails throws std::runtime_error with the op, the shape
// and the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastbert {

// blocks of a backward over N rows of C elements, which stores partial sums (2, blocks, C)
int row_blocks(int64_t N, int64_t C, int dtype, int multiprocessors);

void layer_norm_fwd(int dtype,
                    const void* x,                         // (N, C)
                    const void* weight, int weight_dtype,  // (C,), or null
                    const void* bias, int bias_dtype,      // (C,), or null
                    void* y,                               // (N, C)
                    float* mean,                           // (N,)
                    float* rstd,                           // (N,)
                    int64_t N, int64_t C, float eps, int device, cudaStream_t stream);

void layer_norm_bwd(int dtype,
                    const void* dy,                        // (N, C)
                    const void* x,                         // (N, C)
                    const void* weight, int weight_dtype,  // (C,), or null
                    const float* mean,                     // (N,)
                    const float* rstd,                     // (N,)
                    void* dx,                              // (N, C)
                    float* partial,                        // (2, blocks, C), or null: no sums
                    void* dweight, int dweight_dtype,      // (C,)
                    float* dbias,                          // (C,)
                    int blocks, int64_t N, int64_t C, int device, cudaStream_t stream);

void rms_norm_fwd(int dtype,
                  const void* x,                         // (N, C)
                  const void* weight, int weight_dtype,  // (C,), or null
                  void* y,                               // (N, C)
                  float* rstd,                           // (N,)
                  int64_t N, int64_t C, float eps, int device, cudaStream_t stream);

void rms_norm_bwd(int dtype,
                  const void* dy,                        // (N, C)
                  const void* x,                         // (N, C)
                  const void* weight, int weight_dtype,  // (C,), or null
                  const float* rstd,                     // (N,)
                  void* dx,                              // (N, C)
                  float* partial,                        // (1, blocks, C), or null: no sum
                  void* dweight, int dweight_dtype,      // (C,)
                  int blocks, int64_t N, int64_t C, int device, cudaStream_t stream);

void dropout_add_layer_norm_fwd(int dtype,
                                const void* x,                         // (N, C)
                                const void* residual,                  // (N, C)
                                const void* weight, int weight_dtype,  // (C,)
                                const void* bias, int bias_dtype,      // (C,), or null
                                void* y,                               // (N, C)
                                void* z,                               // (N, C), or null: not saved
                                float* mean,                           // (N,)
                                float* rstd,                           // (N,)
                                const int64_t* seed,                   // (1,), or null: no dropout
                                int64_t site, int64_t threshold, float scale,
                                const int64_t* rows,  // (N,), or null
                                int64_t N, int64_t C, float eps, int device, cudaStream_t stream);

void dropout_add_layer_norm_bwd(int dtype,
                                const void* dy,                        // (N, C)
                                const void* z,                         // (N, C)
                                const void* weight, int weight_dtype,  // (C,)
                                const float* mean,                     // (N,)
                                const float* rstd,                     // (N,)
                                const void* dz,                        // (N, C), or null
                                void* dx,                              // (N, C)
                                void* dresidual,                       // (N, C)
                                float* partial,                        // (2, blocks, C)
                                void* dweight, int dweight_dtype,      // (C,)
                                float* dbias,                          // (C,)
                                int blocks,
                                const int64_t* seed,  // (1,), or null: no dropout
                                int64_t site, int64_t threshold, float scale,
                                const int64_t* rows,  // (N,), or null
                                int64_t N, int64_t C, int device, cudaStream_t stream);

// blocks along N of a sum over N rows, which stores partial sums (blocks, F)
int column_blocks(int64_t N, int64_t F, int dtype, int multiprocessors);

void bias_gelu_fwd(int dtype,
                   const void* x,                     // (N, F)
                   const void* bias, int bias_dtype,  // (F,), or null
                   void* y,                           // (N, F)
                   int64_t N, int64_t F, bool tanh, int device, cudaStream_t stream);

void bias_gelu_bwd(int dtype,
                   const void* dy,                    // (N, F)
                   const void* x,                     // (N, F)
                   const void* bias, int bias_dtype,  // (F,), or null
                   void* dx,                          // (N, F)
                   void* y,                           // (N, F): gelu again, or null
                   float* partial,                    // (blocks, F), or null: no sum
                   void* sum, int sum_dtype,          // (F,)
                   int blocks, int64_t N, int64_t F, bool tanh, int device, cudaStream_t stream);

// y = x w^T + b; w and b are one matrix and vector of N rows, or three of N / 3 rows each
void qkv_proj_fwd(int dtype,
                  const void* x,  // (T, K)
                  const void* w0, const void* w1,
                  const void* w2,  // (N, K), null, null; or (N / 3, K)
                  const void* b0, const void* b1, const void* b2,  // likewise, or null
                  int bias_dtype,
                  void* y,  // (T, N)
                  int64_t T, int64_t K, int64_t N, int device, cudaStream_t stream);

// the sum over the rows of dy, which are `stride` elements apart
void linear_bwd_db(int dtype,
                   const void* dy,  // (T, N)
                   int64_t stride,
                   float* partial,  // (blocks, N)
                   float* db,       // (N,)
                   int blocks, int64_t T, int64_t N, int device, cudaStream_t stream);

void embed_fwd(int dtype,
               const int64_t* ids,                           // (N,), or null: word is (N, C)
               const int64_t* positions,                     // (N,)
               const int64_t* types,                         // (N,), or null
               const void* word, int word_dtype, int64_t V,  // (V, C)
               const void* position, int position_dtype, int64_t P,  // (P, C)
               const void* type, int type_dtype, int64_t Y,          // (Y, C), or null
               const void* weight, int weight_dtype,                 // (C,)
               const void* bias, int bias_dtype,                     // (C,)
               void* y,                                              // (N, C)
               float* mean,                                          // (N,)
               float* rstd,                                          // (N,)
               const int64_t* seed,                                  // (1,), or null: no dropout
               int64_t site, int64_t threshold, float scale, int64_t N, int64_t C, float eps,
               int device, cudaStream_t stream);

void embed_bwd(int dtype,
               const void* dy,                               // (N, C)
               const int64_t* ids,                           // (N,), or null: word is (N, C)
               const int64_t* positions,                     // (N,)
               const int64_t* types,                         // (N,), or null
               const void* word, int word_dtype, int64_t V,  // (V, C)
               const void* position, int position_dtype, int64_t P,  // (P, C)
               const void* type, int type_dtype, int64_t Y,          // (Y, C), or null
               const void* weight, int weight_dtype,                 // (C,)
               const float* mean,                                    // (N,)
               const float* rstd,                                    // (N,)
               float* dz,                                            // (N, C)
               float* partial,                                       // (2, blocks, C)
               void* dweight, int dweight_dtype,                     // (C,)
               float* dbias,                                         // (C,)
               int blocks,
               const int64_t* seed,  // (1,), or null: no dropout
               int64_t site, int64_t threshold, float scale, int64_t N, int64_t C, int device,
               cudaStream_t stream);

// sorted positions that a block of embed_scatter sums
int embed_chunk();

// grad[id] = the sum of dz's rows of this id, in a fixed order; rows of other ids are not written
void embed_scatter(const float* dz,        // (N, C)
                   const int64_t* ids,     // (N,) sorted
                   const int64_t* order,   // (N,) the row of dz at each sorted position
                   void* grad, int dtype,  // (V, C) zeros
                   float* partial,         // (cdiv(N, embed_chunk()), 2, C)
                   int64_t padding,        // an id without a gradient, or -1
                   int64_t N, int64_t V, int64_t C, int device, cudaStream_t stream);

// both directions of cross_entropy; rows have `width` elements, of which V count
void cross_entropy(int dtype,
                   const void* logits,                // (N, width)
                   const void* bias, int bias_dtype,  // (V,), or null
                   const int64_t* labels,             // (N,)
                   const float* dloss,                // (N,), or null: ones
                   float* loss,                       // (N,), or null
                   float* lse,                        // (N,), or null
                   void* gradient,                    // (N, width), may be logits; or null
                   int64_t ignore_index, int64_t N, int64_t V, int64_t width, int device,
                   cudaStream_t stream);

// out = dropout(softmax(scale Q K^T)) V inside each packed sequence; rows past the last sequence
// are not read, and out is 0 there
void attention_fwd(int dtype,
                   const void* qkv,            // (T, 3, H, D)
                   const int32_t* cu_seqlens,  // (B + 1,)
                   void* out,                  // (T, H, D)
                   float* lse,                 // (H, T), or null
                   int64_t T, int64_t B, int64_t H, int64_t D, int64_t max_seqlen, float scale,
                   bool causal,
                   const int64_t* seed,  // (1,), or null: no dropout
                   int64_t site, int64_t threshold, float keep, int device, cudaStream_t stream);

void attention_bwd(int dtype,
                   const void* dout,           // (T, H, D)
                   const void* qkv,            // (T, 3, H, D)
                   const void* out,            // (T, H, D)
                   const float* lse,           // (H, T)
                   const int32_t* cu_seqlens,  // (B + 1,)
                   float* delta,               // (H, T), scratch memory
                   void* dqkv,                 // (T, 3, H, D)
                   int64_t T, int64_t B, int64_t H, int64_t D, int64_t max_seqlen, float scale,
                   bool causal,
                   const int64_t* seed,  // (1,), or null: no dropout
                   int64_t site, int64_t threshold, float keep, int device, cudaStream_t stream);

}  // namespace fastbert
