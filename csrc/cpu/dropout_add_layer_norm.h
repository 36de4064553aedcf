#pragma once

#include <cstdint>

#include "philox.h"

namespace fastbert {

// y = LN(z) * weight + bias with z = residual + dropout(x), for T in {float, bf16}
template <typename T>
void dropout_add_layer_norm_fwd(const T* x,           // (N, C)
                                const T* residual,    // (N, C)
                                const float* weight,  // (C,)
                                const float* bias,    // (C,)
                                const Dropout& dropout,
                                T* y,         // (N, C)
                                T* z,         // (N, C), or null: not saved
                                float* mean,  // (N,)
                                float* rstd,  // (N,)
                                int64_t N, int64_t C, float eps, int threads);

template <typename T>
void dropout_add_layer_norm_bwd(const T* dy,          // (N, C)
                                const T* z,           // (N, C)
                                const float* weight,  // (C,)
                                const float* mean,    // (N,)
                                const float* rstd,    // (N,)
                                const Dropout& dropout,
                                T* dx,           // (N, C)
                                T* dresidual,    // (N, C)
                                float* dweight,  // (C,)
                                float* dbias,    // (C,)
                                int64_t N, int64_t C, int threads);

}  // namespace fastbert
