// fastbert._cpu: kernels behind raw pointers. A pointer argument is the address of contiguous
// memory, or 0 for "not given". The adapter in fastbert/backend/cpu/<slug>.py owns and checks it.
//
// Every kernel is compiled once per instruction set, in a namespace named after the set. `use_isa`
// selects the set that runs; at import it is the best one of this machine.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../wire.h"
#include "isas.h"
#include "runtime.h"

namespace py = pybind11;

namespace fastbert {
namespace {

int best() {
  int found = 0;
  for (int i = 0; i < kCount; ++i)
    if (kIsas[i].runs() && std::string(kIsas[i].name) != "emulated") found = i;
  return found;
}

py::list isas() {
  py::list names;
  for (const Isa& isa : kIsas)
    if (isa.runs()) names.append(isa.name);
  return names;
}

void use_isa(const std::string& name) {
  for (int i = 0; i < kCount; ++i)
    if (name == kIsas[i].name && kIsas[i].runs()) {
      current = i;
      return;
    }
  std::string here;
  for (py::handle isa : isas()) here += (here.empty() ? "" : ", ") + isa.cast<std::string>();
  throw std::invalid_argument("this machine and this build have no instruction set '" + name +
                              "': choose one of " + here);
}

#define FASTBERT_DEFINE(op) define(m, #op, &baseline::op, FASTBERT_ENTRY(op))

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
  using namespace fastbert;
  m.doc() = "fastbert's native CPU kernels: raw pointers in, no torch inside";
  current = best();
  m.def("isas", &isas,
        "The instruction sets that this build and this machine have, slowest first.");
  m.def("isa", [] { return kIsas[current].name; }, "The instruction set that runs.");
  m.def("use_isa", &use_isa, "Run the kernels of this instruction set from now on.");
  m.attr("LARGE") = kLarge;
  py::list fields;
#define FASTBERT_NAME(name) fields.append(#name);
  FASTBERT_LAYER_FIELDS(FASTBERT_NAME)
#undef FASTBERT_NAME
  // the parameters of a layer of encoder_infer, in their order
  m.attr("LAYER_FIELDS") = py::tuple(fields);
  m.def(
      "large_pages",
      [](uintptr_t memory, size_t bytes) { large_pages(reinterpret_cast<void*>(memory), bytes); },
      "Ask for large pages behind memory that has not been written yet.");
  m.def("keep_memory", &keep_memory, "Whether malloc keeps memory once large_pages was called.");
  m.def("build_info", &build_info, "How this module was built.");
  FASTBERT_DEFINE(attention_fwd);
  FASTBERT_DEFINE(attention_bwd);
  FASTBERT_DEFINE(bias_gelu_fwd);
  FASTBERT_DEFINE(bias_gelu_bwd);
  FASTBERT_DEFINE(checksum);
  FASTBERT_DEFINE(cross_entropy_fwd);
  FASTBERT_DEFINE(cross_entropy_bwd);
  FASTBERT_DEFINE(cross_entropy_inplace);
  FASTBERT_DEFINE(dropout_add_layer_norm_fwd);
  FASTBERT_DEFINE(dropout_add_layer_norm_bwd);
  FASTBERT_DEFINE(embed_fwd);
  FASTBERT_DEFINE(embed_bwd);
  FASTBERT_DEFINE(encoder_infer);
  FASTBERT_DEFINE(feed_forward_up);
  FASTBERT_DEFINE(feed_forward_down_bwd);
  FASTBERT_DEFINE(gated_feed_forward_up);
  FASTBERT_DEFINE(gated_feed_forward_down_bwd);
  FASTBERT_DEFINE(gated_feed_forward_packed_size);
  FASTBERT_DEFINE(gated_feed_forward_pack);
  FASTBERT_DEFINE(lamb_moments);
  FASTBERT_DEFINE(lamb_update);
  FASTBERT_DEFINE(layer_norm_fwd);
  FASTBERT_DEFINE(layer_norm_bwd);
  FASTBERT_DEFINE(philox_row);
  FASTBERT_DEFINE(linear_fwd);
  FASTBERT_DEFINE(linear_bwd_dx);
  FASTBERT_DEFINE(linear_bwd_dw);
  FASTBERT_DEFINE(linear_bwd_db);
  FASTBERT_DEFINE(linear_packed_size);
  FASTBERT_DEFINE(linear_pack);
  FASTBERT_DEFINE(linear_int8_fwd);
  FASTBERT_DEFINE(linear_int8_packed_size);
  FASTBERT_DEFINE(linear_int8_pack);
  FASTBERT_DEFINE(linear_int8_unpack);
  FASTBERT_DEFINE(lstm_fwd);
  FASTBERT_DEFINE(lstm_bwd);
  FASTBERT_DEFINE(muon_orthogonalise);
  FASTBERT_DEFINE(relation_loss_fwd);
  FASTBERT_DEFINE(relation_loss_bwd);
  FASTBERT_DEFINE(rms_norm_fwd);
  FASTBERT_DEFINE(rms_norm_bwd);
  FASTBERT_DEFINE(fma_peak);
  FASTBERT_DEFINE(dot_peak);
}
