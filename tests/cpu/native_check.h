// For native_check.cpp: arrays in the dtypes of the kernels, and their comparison with doubles.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/isas.h"
#include "../../csrc/cpu/runtime.h"

using namespace fastbert;
using i64 = int64_t;
using Doubles = std::vector<double>;

namespace {

// relative to the largest value expected; measured 2.9e-6 and 3.7e-3 (2026-11-30, x86)
constexpr double kBound[] = {1e-5, 1.0 / 128};
constexpr int kThreads = 2;
const char* const kNames[] = {"fp32", "bf16"};

double worst[2] = {};
bool good = true;

// outputs start as NaN, inputs are random
struct Array {
  int dtype;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;

  Array(int dtype, i64 size)
      : dtype(dtype), wide(dtype == kFloat32 ? size : 0), narrow(dtype == kFloat32 ? 0 : size) {
    for (i64 i = 0; i < size; ++i) set(i, NAN);
  }
  void* data() { return dtype == kFloat32 ? static_cast<void*>(wide.data()) : narrow.data(); }
  float* floats() { return wide.data(); }
  i64 size() const { return static_cast<i64>(wide.size() + narrow.size()); }
  double operator[](i64 i) const {
    if (dtype == kFloat32) return wide[i];
    const uint32_t bits = uint32_t{narrow[i]} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  void set(i64 i, double value) {
    const float rounded = static_cast<float>(value);
    if (dtype == kFloat32) {
      wide[i] = rounded;
      return;
    }
    uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    narrow[i] = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
};

std::mt19937 generator(1);

Array drawn(int dtype, i64 size, double scale = 1.0) {
  std::normal_distribution<double> normal(0.0, scale);
  Array made(dtype, size);
  for (i64 i = 0; i < size; ++i) made.set(i, normal(generator));
  return made;
}

// the bound is that of the dtype which the kernel wrote
void check(const std::string& name, int dtype, const Array& found, const Doubles& expected) {
  double error = 0, largest = 0;
  for (double e : expected) largest = std::fmax(largest, std::fabs(e));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double off = std::fabs(found[static_cast<i64>(i)] - expected[i]) / largest;
    error = std::isnan(off) ? HUGE_VAL : std::fmax(error, off);
  }
  const bool fine = error <= kBound[dtype] && found.size() == static_cast<i64>(expected.size());
  if (!fine) std::printf("WRONG: ");
  std::printf("%s %s %s %.1e\n", kIsas[current].name, name.c_str(), kNames[dtype], error);
  worst[dtype] = std::fmax(worst[dtype], error);
  good = good && fine;
}

// --- dropout: one word of Philox4x32-10, as philox.h defines it ---

constexpr i64 kSeed = 0x123456789ABCDEF;
constexpr uint32_t kSite = 7, kThreshold = uint32_t{1} << 30;  // a quarter is dropped
constexpr double kKeep = 4.0 / 3.0;

uint32_t philox(i64 seed, const uint32_t counter[4], int word) {
  uint32_t c[4], low = static_cast<uint32_t>(seed),
                 high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  std::memcpy(c, counter, sizeof(c));
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c[0], second = uint64_t{0xCD9E8D57} * c[2];
    c[0] = static_cast<uint32_t>(second >> 32) ^ c[1] ^ low;
    c[1] = static_cast<uint32_t>(second);
    c[2] = static_cast<uint32_t>(first >> 32) ^ c[3] ^ high;
    c[3] = static_cast<uint32_t>(first);
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
  return c[word];
}

double factor(i64 col, i64 c1, i64 c2, i64 c3) {
  const uint32_t counter[] = {static_cast<uint32_t>(col / 4), static_cast<uint32_t>(c1),
                              static_cast<uint32_t>(c2), static_cast<uint32_t>(c3)};
  return philox(kSeed, counter, col % 4) >= kThreshold ? kKeep : 0.0;
}

}  // namespace
