// The host's side of a launch: which device and stream, and what went wrong.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastbert {

// One call of an op; it makes its device current. `check`, after each launch, throws the launch's
// error with the op, the shape and the device.
class Launch {
 public:
  Launch(const char* op, int64_t rows, int64_t columns, int device, cudaStream_t stream)
      : stream(stream), op_(op), rows_(rows), columns_(columns), device_(device) {
    // this module has its own CUDA runtime, whose current device may differ from torch's
    int current = -1;
    if (cudaGetDevice(&current) != cudaSuccess || current != device) require(cudaSetDevice(device));
  }

  void check() const { require(cudaGetLastError()); }

  void require(cudaError_t error) const {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("fastbert's CUDA kernel of ") + op_ + " on (" +
                             std::to_string(rows_) + ", " + std::to_string(columns_) +
                             ") did not start on cuda:" + std::to_string(device_) + ": " +
                             cudaGetErrorString(error));
  }

  const cudaStream_t stream;

 private:
  const char* op_;
  int64_t rows_, columns_;
  int device_;
};

inline unsigned cdiv(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace fastbert
