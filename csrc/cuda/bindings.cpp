// fastbert._cuda: kernels behind raw pointers and a stream's handle, without torch. The module
// imports on a machine without a GPU or a driver: the CUDA runtime is linked statically.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "../wire.h"
#include "entries.h"

namespace py = pybind11;

namespace fastbert {
namespace {

#define FASTBERT_DEFINE(entry) define(m, #entry, &entry, &entry)

py::dict build_info() {
  py::dict info;
  info["version"] = FASTBERT_VERSION;
  info["nvcc"] = std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) +
                 "." + std::to_string(__CUDACC_VER_BUILD__);
  info["targets"] = FASTBERT_TARGETS;
  return info;
}

// the GPUs' names and architectures, or why there is none
std::string devices() {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    cudaGetLastError();
    return std::string("no GPU: ") + cudaGetErrorString(error);
  }
  std::string names;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    names += (names.empty() ? "" : ", ") + std::string(properties.name) + " (sm_" +
             std::to_string(properties.major) + std::to_string(properties.minor) + ")";
  }
  return names;
}

}  // namespace
}  // namespace fastbert

PYBIND11_MODULE(_cuda, m) {
  using namespace fastbert;
  m.doc() = "fastbert's CUDA kernels: raw pointers in, no torch inside";
  m.def("build_info", &build_info, "How this module was built.");
  m.def("devices", &devices, "The GPUs' names and architectures, or why there is none.");
  FASTBERT_DEFINE(row_blocks);
  FASTBERT_DEFINE(column_blocks);
  FASTBERT_DEFINE(layer_norm_fwd);
  FASTBERT_DEFINE(layer_norm_bwd);
  FASTBERT_DEFINE(rms_norm_fwd);
  FASTBERT_DEFINE(rms_norm_bwd);
  FASTBERT_DEFINE(dropout_add_layer_norm_fwd);
  FASTBERT_DEFINE(dropout_add_layer_norm_bwd);
  FASTBERT_DEFINE(bias_gelu_fwd);
  FASTBERT_DEFINE(bias_gelu_bwd);
  FASTBERT_DEFINE(linear_bwd_db);
  FASTBERT_DEFINE(qkv_proj_fwd);
  FASTBERT_DEFINE(embed_fwd);
  FASTBERT_DEFINE(embed_bwd);
  FASTBERT_DEFINE(embed_chunk);
  FASTBERT_DEFINE(embed_scatter);
  FASTBERT_DEFINE(cross_entropy);
  FASTBERT_DEFINE(attention_fwd);
  FASTBERT_DEFINE(attention_bwd);
}
