// fastbert._cpu: kernels behind raw pointers. A pointer argument is the address of contiguous
// memory that the adapter in fastbert/cpu/<slug>.py owns and has checked; 0 stands for "not given".
//
// Every kernel is compiled once per instruction set, in a namespace of its name; `use_isa` picks
// the one that runs, at import the best that the machine has.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "runtime.h"

#define FASTBERT_ISA baseline
#include "entries.h"
#undef FASTBERT_ISA
#ifdef FASTBERT_HAS_avx2
#define FASTBERT_ISA avx2
#include "entries.h"
#undef FASTBERT_ISA
#endif
#ifdef FASTBERT_HAS_avx512
#define FASTBERT_ISA avx512
#include "entries.h"
#undef FASTBERT_ISA
#endif
#ifdef FASTBERT_HAS_avx512_bf16
#define FASTBERT_ISA avx512_bf16
#include "entries.h"
#undef FASTBERT_ISA
#endif
#ifdef FASTBERT_HAS_emulated
#define FASTBERT_ISA emulated
#include "entries.h"
#undef FASTBERT_ISA
#endif

namespace py = pybind11;

namespace fastbert {
namespace {

struct Isa {
  const char* name;
  bool (*runs)();  // whether this machine has it
};

#ifdef __x86_64__
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// slowest first; `emulated` is for tests and never picked by itself
const Isa kIsas[] = {
    {"baseline", [] { return true; }},
#ifdef FASTBERT_HAS_avx2
    {"avx2", has_avx2},
#endif
#ifdef FASTBERT_HAS_avx512
    {"avx512", has_avx512},
#endif
#ifdef FASTBERT_HAS_avx512_bf16
    {"avx512_bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16") != 0; }},
#endif
#ifdef FASTBERT_HAS_emulated
#ifdef FASTBERT_HAS_avx2
    {"emulated", has_avx2},  // setup.py builds it with AVX2 where there is such a thing
#else
    {"emulated", [] { return true; }},
#endif
#endif
};
constexpr int kCount = sizeof(kIsas) / sizeof(kIsas[0]);

int current = 0;

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

// pointers cross over as integers
template <typename A>
using Wire = std::conditional_t<std::is_pointer_v<A>, std::uintptr_t, A>;

template <typename A>
A unwire(Wire<A> value) {
  if constexpr (std::is_pointer_v<A>)
    return reinterpret_cast<A>(value);
  else
    return value;
}

template <typename R, typename... A>
struct Entry {
  R (*of[kCount])(A...);
};

template <typename R, typename... A, typename... Others>
Entry<R, A...> entry(R (*first)(A...), Others... others) {
  return {{first, others...}};
}

template <typename R, typename... A>
void define(py::module_& m, const char* name, Entry<R, A...> entry) {
  m.def(
      name, [entry](Wire<A>... args) { return entry.of[current](unwire<A>(args)...); },
      py::call_guard<py::gil_scoped_release>());
}

#ifdef FASTBERT_HAS_avx2
#define FASTBERT_AVX2(op) , &avx2::op
#else
#define FASTBERT_AVX2(op)
#endif
#ifdef FASTBERT_HAS_avx512
#define FASTBERT_AVX512(op) , &avx512::op
#else
#define FASTBERT_AVX512(op)
#endif
#ifdef FASTBERT_HAS_avx512_bf16
#define FASTBERT_AVX512_BF16(op) , &avx512_bf16::op
#else
#define FASTBERT_AVX512_BF16(op)
#endif
#ifdef FASTBERT_HAS_emulated
#define FASTBERT_EMULATED(op) , &emulated::op
#else
#define FASTBERT_EMULATED(op)
#endif
#define FASTBERT_DEFINE(op)                                                                 \
  define(m, #op,                                                                            \
         entry(&baseline::op FASTBERT_AVX2(op) FASTBERT_AVX512(op) FASTBERT_AVX512_BF16(op) \
                   FASTBERT_EMULATED(op)))

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
  m.doc() = "fastbert's native CPU kernels: raw pointers in, nothing of torch inside";
  current = best();
  m.def("isas", &isas,
        "The instruction sets that this build and this machine have, slowest first.");
  m.def("isa", [] { return kIsas[current].name; }, "The instruction set that runs.");
  m.def("use_isa", &use_isa, "Run the kernels of this instruction set from now on.");
  m.attr("LARGE") = kLarge;
  m.def(
      "large_pages",
      [](uintptr_t memory, size_t bytes) { large_pages(reinterpret_cast<void*>(memory), bytes); },
      "Ask for large pages behind memory that nobody has written yet.");
  m.def("build_info", &build_info, "How this module was built.");
  FASTBERT_DEFINE(attention_fwd);
  FASTBERT_DEFINE(attention_bwd);
  FASTBERT_DEFINE(bias_gelu_fwd);
  FASTBERT_DEFINE(bias_gelu_bwd);
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
  FASTBERT_DEFINE(layer_norm_fwd);
  FASTBERT_DEFINE(layer_norm_bwd);
  FASTBERT_DEFINE(philox_row);
  FASTBERT_DEFINE(linear_fwd);
  FASTBERT_DEFINE(linear_bwd_dx);
  FASTBERT_DEFINE(linear_bwd_dw);
  FASTBERT_DEFINE(linear_bwd_db);
  FASTBERT_DEFINE(linear_packed_size);
  FASTBERT_DEFINE(linear_pack);
  FASTBERT_DEFINE(fma_peak);
  FASTBERT_DEFINE(dot_peak);
}
