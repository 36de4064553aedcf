// Element types: values live in memory as T and in registers as float.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastbert {

// upper half of an IEEE float
struct bf16 {
  uint16_t bits;
};

inline float load(const float* p) { return *p; }

inline float load(const bf16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline void store(float* p, float value) { *p = value; }

// round to nearest even; a NaN stays a NaN, whatever its payload
inline void store(bf16* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(value == value ? rounded : 0x7FC0u);
}

}  // namespace fastbert
