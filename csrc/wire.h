// How a C++ function becomes a function of a Python module: pointers cross over as integers, and
// the call runs without the GIL. For csrc/cpu/bindings.cpp and csrc/cuda/bindings.cu.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

namespace fastbert {

template <typename A>
using Wire = std::conditional_t<std::is_pointer_v<A>, std::uintptr_t, A>;

template <typename A>
A unwire(Wire<A> value) {
  if constexpr (std::is_pointer_v<A>)
    return reinterpret_cast<A>(value);
  else
    return value;
}

// Defines m.name, which calls `entry`; the second function has the signature of `entry`.
template <typename R, typename... A, typename Entry>
void define(pybind11::module_& m, const char* name, R (*)(A...), Entry entry) {
  m.def(
      name, [entry](Wire<A>... args) { return entry(unwire<A>(args)...); },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastbert
