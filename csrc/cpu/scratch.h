// For entry points: dispatch on the element type, and scratch memory with a piece per thread. It is
// allocated before the parallel region, because no exception may leave one.
#pragma once

#include "runtime.h"
#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {

// calls body(T{}) for the element type with this number
template <typename Body>
inline void with_type(int dtype, const Body& body) {
  if (dtype == kFloat32)
    body(float{});
  else
    body(bf16{});
}

class Scratch {
 public:
  // `pieces` pieces of `each` floats, 64-byte aligned
  Scratch(int64_t pieces, int64_t each)
      : stride_(round_up(each, 16) + (kGuarded ? 16 : 0)),
        memory_(
            static_cast<float*>(allocate(static_cast<size_t>(pieces * stride_) * sizeof(float)))) {
    for (int64_t i = 0; kGuarded && i < pieces; ++i)
      guard((*this)[i] + each, static_cast<size_t>(stride_ - each) * sizeof(float));
  }
  ~Scratch() { release(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* operator[](int64_t piece) const { return memory_ + piece * stride_; }

 private:
  int64_t stride_;
  float* memory_;
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert
