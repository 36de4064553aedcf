// Element types, and loads and stores of N elements: 16 bytes an access if the memory is aligned to
// that, else one element at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastbert {

// the numbers of element types in fastbert/backend/cuda/__init__.py
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(float16 value) { return __half2float(value); }

template <typename T>
__device__ inline T narrow(float value);
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline bfloat16 narrow<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline float16 narrow<float16>(float value) {
  return __float2half_rn(value);
}

// elements of T in 16 bytes
template <typename T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T at[N];
};

// row[col .. col + N), zeros from `stop` on; `wide`: row + col is aligned and stop a multiple of N
template <int N, typename T>
__device__ inline Pack<T, N> load_pack(const T* row, int col, int stop, bool wide) {
  Pack<T, N> pack;
  if (wide) {
    if (col < stop) {
      pack = *reinterpret_cast<const Pack<T, N>*>(row + col);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) pack.at[i] = narrow<T>(0.f);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = col + i < stop ? row[col + i] : narrow<T>(0.f);
  }
  return pack;
}

template <int N, typename T>
__device__ inline void load(const T* row, int col, int stop, bool wide, float (&values)[N]) {
  const Pack<T, N> pack = load_pack<N>(row, col, stop, wide);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = widen(pack.at[i]);
}

template <int N, typename T>
__device__ inline void store(T* row, int col, int stop, bool wide, const float (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.at[i] = narrow<T>(values[i]);
  if (wide) {
    if (col < stop) *reinterpret_cast<Pack<T, N>*>(row + col) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (col + i < stop) row[col + i] = pack.at[i];
  }
}

// A table (rows, C) of fp32 or of the activations' T, chosen at run time: under autocast parameters
// are wider than activations, and a kernel for each pair would double the number of kernels.
struct Table {
  const void* data;  // or null
  int dtype;

  template <typename T, int N>
  __device__ inline void load(int64_t row, int col, int C, bool wide, float (&values)[N]) const {
    if (sizeof(T) == 4 || dtype == kFloat32)
      fastbert::load(static_cast<const float*>(data) + row * C, col, C, wide, values);
    else
      fastbert::load(static_cast<const T*>(data) + row * C, col, C, wide, values);
  }
};

// a table that is written, such as a gradient, in any of the element types
struct MutableTable {
  void* data;  // or null
  int dtype;

  template <int N>
  __device__ inline void store(int64_t row, int col, int C, bool wide,
                               const float (&values)[N]) const {
    if (dtype == kFloat32)
      fastbert::store(static_cast<float*>(data) + row * C, col, C, wide, values);
    else if (dtype == kBfloat16)
      fastbert::store(static_cast<bfloat16*>(data) + row * C, col, C, wide, values);
    else
      fastbert::store(static_cast<float16*>(data) + row * C, col, C, wide, values);
  }
};

// whether every row allows 16-byte accesses: C is a multiple of `vec`, and all memory begins at a
// multiple of 16 bytes
template <typename... P>
bool aligned(int64_t C, int vec, const P*... memory) {
  return C % vec == 0 && ((reinterpret_cast<uintptr_t>(memory) | ...) & 15) == 0;
}

// run(T{}) for the element type with this number
template <typename F>
void by_dtype(int dtype, F run) {
  switch (dtype) {
    case kFloat32:
      return run(float{});
    case kBfloat16:
      return run(bfloat16{});
    case kFloat16:
      return run(float16{});
    default:
      throw std::invalid_argument("no element type has the number " + std::to_string(dtype));
  }
}

}  // namespace fastbert
