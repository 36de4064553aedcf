// Sums in a fixed order that the compiler can still vectorise.
#pragma once

#include <cstdint>

namespace fastbert {

constexpr int kSumLanes = 16;

// term(0) + .. + term(n - 1), in kSumLanes running sums that are folded pairwise at the end. The
// order is written out, so the result does not depend on the vector width, and the error grows with
// n / 16.
template <typename Term>
inline float lane_sum(int64_t n, Term term) {
  float lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int lane = 0; lane < kSumLanes; ++lane) lanes[lane] += term(i + lane);
  for (int lane = 0; i < n; ++i, ++lane) lanes[lane] += term(i);
  for (int width = kSumLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

}  // namespace fastbert
