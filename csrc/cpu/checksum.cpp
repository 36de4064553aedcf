// Checksums of memory, which find writes that PyTorch does not count.
//
// A lane's state is s <- rotate(s ^ word) * odd, modulo 2^32. For one word, different states give
// different states; for one state, so do different words: one changed word changes the result. The
// rotation brings high bits down, so that the same change of many words (a sign, a power of two)
// does not cancel. The states of a chunk are mixed to 64 bits, and the chunks' numbers are added.
#include "checksum.h"

#include "runtime.h"
#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// bytes of a chunk: a task of one thread
constexpr int64_t kChunk = 1 << 18;
// more chains than a multiplication has cycles of latency
constexpr int kStates = 8;
constexpr int64_t kVector = 4 * W;

// one of splitmix64's rounds
inline uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

constexpr uint32_t kOdd = 0x9E3779B1u;

template <typename State>
inline State step_of(State s, State word) {
  s ^= word;
  return (s << 13 | s >> 19) * kOdd;
}

uint64_t whole(const char* p, int64_t bytes, uint64_t number) {
  U states[kStates];
  for (int i = 0; i < kStates; ++i) states[i] = set1(static_cast<uint32_t>(i + 1));
  int64_t at = 0;
  for (; at + kStates * kVector <= bytes; at += kStates * kVector)
#pragma GCC unroll 8
    for (int i = 0; i < kStates; ++i)
      states[i] = step_of<U>(states[i], *reinterpret_cast<const U_mem*>(p + at + i * kVector));
  for (int i = 0; at < bytes; at += kVector, ++i) {
    U tail = {};
    __builtin_memcpy(&tail, p + at, static_cast<size_t>(imin(kVector, bytes - at)));
    states[i] = step_of(states[i], tail);
  }
  uint64_t total = number;
  for (int i = 0; i < kStates; ++i)
    for (int lane = 0; lane < W; ++lane) total = mixed(total + states[i][lane]);
  return total;
}

uint64_t sampled(const char* p, int64_t rows, int64_t bytes, int64_t first, int64_t step,
                 uint64_t number) {
  // a prime number of words from sample to sample: columns differ from row to row
  const int64_t words = bytes / 4;
  uint32_t state = 1;
  int64_t column = 0;
  for (int64_t row = first; row < rows; row += step) {
    uint32_t word;
    __builtin_memcpy(&word, p + row * bytes + 4 * column, sizeof(word));
    state = step_of(state, word);
    column += 131;
    while (column >= words) column -= words;
  }
  return mixed(number + state);
}

}  // namespace

int64_t checksum(const int64_t* blocks, int64_t n, int64_t first, int64_t step, int threads) {
  uint64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const char* p = reinterpret_cast<const char*>(blocks[3 * i]);
    const int64_t rows = blocks[3 * i + 1], bytes = blocks[3 * i + 2];
    const uint64_t number = mixed(static_cast<uint64_t>(i + 1));
    if (step && rows > 1 && bytes >= 4) {
      total += sampled(p, rows, bytes, first, step, number);
      continue;
    }
    const int64_t size = rows * bytes, chunks = ceil_div(size, kChunk);
    const int team = team_size(chunks, 1, chunks, threads);
    uint64_t found = 0;
#pragma omp parallel for num_threads(team) schedule(static) reduction(+ : found) if (team > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t start = chunk * kChunk;
      found += whole(p + start, imin(kChunk, size - start), number + mixed(number + chunk));
    }
    total += found;
  }
  return static_cast<int64_t>(total);
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
