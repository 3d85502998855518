// The C interface: selects a kernel, and the planner of a call, which splits it into tasks, runs them
// and merges their results.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "blocks.hpp"

extern "C" {
extern const els::Kernel els_kernel_avx512, els_kernel_avx2, els_kernel_baseline;
}

namespace {

using namespace els;

// Kernels of this library that this processor can run, best first.
std::vector<const Kernel*> kernels() {
  std::vector<const Kernel*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(ELS_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
    found.push_back(&els_kernel_avx512);
#endif
#if defined(ELS_HAS_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(&els_kernel_avx2);
#endif
  found.push_back(&els_kernel_baseline);
  return found;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> allocate(std::size_t count) {
  void* p = std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

bool is_stopped(const Control& control) {
  return __atomic_load_n(&control.stop, __ATOMIC_RELAXED) != 0;
}

// Call work(worker, task) for every task, until the control is stopped. Threads exist for this call only:
// no state remains that a fork could break, and their cost (20 µs) is small relative to any call
// worth splitting.
void for_each(std::size_t tasks, int threads, const Control& control,
              const std::function<void(int, std::size_t)>& work) {
  std::atomic<std::size_t> next{0};
  auto loop = [&](int worker) {
    for (std::size_t task; (task = next.fetch_add(1)) < tasks && !is_stopped(control);)
      work(worker, task);
  };
  std::vector<std::thread> crew;
  crew.reserve(threads);
  try {
    while (int(crew.size()) + 1 < threads && crew.size() + 1 < tasks)
      crew.emplace_back(loop, int(crew.size()) + 1);
  } catch (const std::exception&) {
    // No more threads available: the existing ones do the work, with the same result.
  }
  loop(0);
  for (std::thread& thread : crew) thread.join();
}

}  // namespace

#include "attend_library.hpp"
#include "fold_moments_library.hpp"
#include "moments_library.hpp"

#pragma GCC visibility push(default)
extern "C" {

// Digest of the sources: a binding beside others refuses the library.
const char* els_sources() { return ELS_SOURCES; }

// Names of the kernels that this processor can run, best first; null past the last.
const char* els_kernel_name(std::int32_t index) {
  const auto found = kernels();
  return index >= 0 && index < std::int32_t(found.size()) ? found[index]->name : nullptr;
}

std::int32_t els_kernel_lanes(std::int32_t index) { return kernels()[index]->lanes; }

// Lay a bank [images][C][H][W] out for a kernel, minus its centre.
void els_pack(std::int32_t index, const float* images, const double* centre, std::int64_t count,
              std::int32_t channels, std::int32_t height, std::int32_t width, float* packed) {
  kernels()[index]->pack({nullptr, count, channels, height, width}, images, centre, packed);
}

// Merge the rows of a whole bank, from any number of processes: the bits of els_attend. Returns as it.
std::int32_t els_merge(const ElsCall* call) {
  try {
    merge(*call, *kernels()[call->kernel]);
    return is_stopped(*call->control) ? 2 : 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Answers, or where the call has addresses for them the rows of this process's blocks. Returns 0, 1 if
// out of memory, or 2 if the call was stopped and has no result.
std::int32_t els_attend(const ElsCall* call) {
  try {
    attend(*call, *kernels()[call->kernel]);
    return is_stopped(*call->control) ? 2 : 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// The same for a pass of moments.
std::int32_t els_moments(const ElsMomentsCall* call) {
  try {
    moments(*call, *kernels()[call->kernel]);
    return is_stopped(*call->control) ? 2 : 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// The same for a pass of a fold.
std::int32_t els_fold(const ElsFoldCall* call) {
  try {
    fold(*call, *kernels()[call->kernel]);
    return is_stopped(*call->control) ? 2 : 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Merge the normalisers of the blocks of a whole bank, from any number of processes.
void els_fold_normalisers(const ElsFoldNormalisers* call) { merge_normalisers(*call); }
}
#pragma GCC visibility pop
