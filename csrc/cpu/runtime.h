// Shared by the kernels of every instruction set; compiled once, for the baseline.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastbert {

// the numbers of element types in fastbert/backend/cpu/__init__.py
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1 };
// the numbers of activations there
enum Activation : int { kIdentity = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3, kGeluSigmoid = 4 };

// Whether this build finds overruns (`make sanitize`): scratch memory then ends in a guarded gap.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kGuarded = true;
#else
constexpr bool kGuarded = false;
#endif

// 64-byte aligned memory; throws std::bad_alloc
void* allocate(size_t bytes);
void release(void* memory);
// Makes any access to these bytes of allocated memory an error, in builds that find overruns.
void guard(void* memory, size_t bytes);

// memory of this size holds a whole large page (2 MB), whatever its address
constexpr size_t kLarge = size_t{4} << 20;

// Asks for large pages behind memory that is about to be written for the first time: page faults
// are most of the cost of a fresh gradient of 94 MB.
void large_pages(void* memory, size_t bytes);
// With `keep`, the first call of `large_pages` sets glibc's malloc to keep what the process frees.
// Otherwise malloc returns large memory to the system, and each training step gets new pages.
void keep_memory(bool keep);
// The time of a monotonic clock.
double seconds();

// How many threads a kernel should use: at most `threads`, one per `grain` units of work and one
// per task; 1 in a forked process, where the runtime's other threads do not exist.
int team_size(int64_t work, int64_t grain, int64_t tasks, int threads);

}  // namespace fastbert
