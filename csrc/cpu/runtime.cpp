#include "runtime.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fastbert {
namespace {

bool forked = false;
// whether the next call of large_pages sets malloc
std::atomic<bool> keeps{true};

#if defined(__unix__) || defined(__APPLE__)
// runs in the child right after the fork
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

void* allocate(size_t bytes) {
  const size_t whole = (bytes + 127) / 64 * 64;
  void* memory = std::aligned_alloc(64, whole);
  if (!memory) throw std::bad_alloc();
  if (bytes >= kLarge) large_pages(memory, bytes);
  guard(static_cast<char*>(memory) + bytes, whole - bytes);
  return memory;
}

void release(void* memory) { std::free(memory); }

void guard(void* memory, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory, bytes);
#else
  (void)memory, (void)bytes;
#endif
}

void keep_memory(bool keep) { keeps = keep; }

void large_pages(void* memory, size_t bytes) {
#if defined(__GLIBC__)
  if (keeps.exchange(false)) {
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_TRIM_THRESHOLD, -1);
  }
#endif
#if defined(__linux__)
  // only pages that are entirely inside; a failure does no harm
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + kPage - 1) / kPage * kPage,
                  end = (start + bytes) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

double seconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

int team_size(int64_t work, int64_t grain, int64_t tasks, int threads) {
  int64_t team = work / grain < tasks ? work / grain : tasks;
  if (team > threads) team = threads;
  return forked || team < 1 ? 1 : static_cast<int>(team);
}

}  // namespace fastbert
