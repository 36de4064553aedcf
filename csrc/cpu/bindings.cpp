// fastbert._cpu: kernels behind raw pointers. Every pointer is an address of contiguous memory that
// the adapter in fastbert/cpu/<slug>.py owns and has checked; 0 stands for "not given".
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "dropout_add_layer_norm.h"
#include "dtype.h"
#include "philox.h"

namespace py = pybind11;

namespace fastbert {
namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// the seed is read here and not in Python: a tensor's .item() would break the graph under
// torch.compile
Dropout make_dropout(Address seed, uint32_t site, uint32_t threshold, float scale, Address rows) {
  const int64_t* value = at<const int64_t>(seed);
  return {value != nullptr,       PhiloxKey(value ? *value : 0), site, threshold, scale,
          at<const int64_t>(rows)};
}

template <typename T>
void forward(Address x, Address residual, Address weight, Address bias, Address y, Address z,
             Address mean, Address rstd, int64_t N, int64_t C, float eps, Address seed,
             uint32_t site, uint32_t threshold, float scale, Address rows, int threads) {
  const Dropout dropout = make_dropout(seed, site, threshold, scale, rows);
  dropout_add_layer_norm_fwd<T>(at<const T>(x), at<const T>(residual), at<const float>(weight),
                                at<const float>(bias), dropout, at<T>(y), at<T>(z), at<float>(mean),
                                at<float>(rstd), N, C, eps, threads);
}

template <typename T>
void backward(Address dy, Address z, Address weight, Address mean, Address rstd, Address dx,
              Address dresidual, Address dweight, Address dbias, int64_t N, int64_t C, Address seed,
              uint32_t site, uint32_t threshold, float scale, Address rows, int threads) {
  const Dropout dropout = make_dropout(seed, site, threshold, scale, rows);
  dropout_add_layer_norm_bwd<T>(at<const T>(dy), at<const T>(z), at<const float>(weight),
                                at<const float>(mean), at<const float>(rstd), dropout, at<T>(dx),
                                at<T>(dresidual), at<float>(dweight), at<float>(dbias), N, C,
                                threads);
}

template <typename T>
void define_dropout_add_layer_norm(py::module_& m, const std::string& dtype) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def(("dropout_add_layer_norm_fwd_" + dtype).c_str(), &forward<T>, unlocked, py::arg("x"),
        py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("z"),
        py::arg("mean"), py::arg("rstd"), py::arg("N"), py::arg("C"), py::arg("eps"),
        py::arg("seed"), py::arg("site"), py::arg("threshold"), py::arg("scale"), py::arg("rows"),
        py::arg("threads"));
  m.def(("dropout_add_layer_norm_bwd_" + dtype).c_str(), &backward<T>, unlocked, py::arg("dy"),
        py::arg("z"), py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("dx"),
        py::arg("dresidual"), py::arg("dweight"), py::arg("dbias"), py::arg("N"), py::arg("C"),
        py::arg("seed"), py::arg("site"), py::arg("threshold"), py::arg("scale"), py::arg("rows"),
        py::arg("threads"));
}

// For tests: the words behind n columns of one row, n a multiple of kPhiloxWords.
void philox_row(Address words, int64_t n, int64_t seed, uint32_t row, uint32_t site) {
  for (int64_t start = 0; start + kPhiloxWords <= n; start += kPhiloxWords)
    philox_words(PhiloxKey(seed), static_cast<uint32_t>(start / 4), row, site,
                 at<uint32_t>(words) + start);
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTBERT_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = FASTBERT_BUILD_FLAGS;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  return info;
}

}  // namespace
}  // namespace fastbert

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastbert's native CPU kernels: raw pointers in, nothing of torch inside";
  fastbert::define_dropout_add_layer_norm<float>(m, "float32");
  fastbert::define_dropout_add_layer_norm<fastbert::bf16>(m, "bfloat16");
  m.def("philox_row", &fastbert::philox_row, py::arg("words"), py::arg("n"), py::arg("seed"),
        py::arg("row"), py::arg("site"));
  m.def("build_info", &fastbert::build_info, "How this module was built.");
}
