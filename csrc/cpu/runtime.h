// What the kernels of every instruction set share; compiled once, for the baseline.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastbert {

// element types, as the adapters in fastbert/cpu number them
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1 };

// Whether this build finds overruns (`make sanitize`): room to work in is then tight.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kGuarded = true;
#else
constexpr bool kGuarded = false;
#endif

// 64-byte aligned memory; throws std::bad_alloc
void* allocate(size_t bytes);
void release(void* memory);
// Makes these bytes inside allocated memory an error to touch, where overruns are looked for.
void guard(void* memory, size_t bytes);

// memory of this size holds a large page wherever it starts
constexpr size_t kLarge = size_t{4} << 20;

// Asks for large pages behind memory that is about to be written for the first time: page faults
// are most of the cost of a fresh gradient of 94 MB.
void large_pages(void* memory, size_t bytes);
// A clock that only runs forward.
double seconds();

// How many threads a kernel should use: at most `threads`, one per `grain` units of work and one
// per task; one in a process that was forked, where the runtime's other threads do not exist.
int team_size(int64_t work, int64_t grain, int64_t tasks, int threads);

}  // namespace fastbert
