// The C interface: selects a kernel, splits a call into tasks, runs them and merges their results.
//
// A task is one query and one chunk of the bank, or a part of one. Chunks depend on the bank and on
// the range, not on the batch or the number of threads, and results are merged in order, so they are
// batch invariant. Tasks of one chunk are consecutive, so that its tiles are still in the cache for
// the next query.
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

#include "problem.hpp"

extern "C" {
#if defined(__x86_64__)
extern const els::Kernel els_kernel_avx512, els_kernel_avx2;
#endif
extern const els::Kernel els_kernel_baseline;
}

namespace {

using namespace els;

constexpr double kLog2E = 1.4426950408889634;
constexpr int kMostChunks = 64;
constexpr int kLeastChunks = 24;  // so that a small bank keeps every core busy to the end
constexpr int kLeastSame = 16;  // tiles of a chunk where each costs little: same place, ideal
constexpr std::size_t kPartialBytes = std::size_t(24) << 20;  // of partial results at a time

// Kernels that this processor can run, best first.
std::vector<const Kernel*> kernels() {
  std::vector<const Kernel*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
    found.push_back(&els_kernel_avx512);
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

// How the tiles of a query's range are cut into tasks; depends on sizes only.
struct Tasks {
  std::int64_t chunk = 0;  // tiles
  int chunks = 0, parts = 1;

  int count() const { return chunks * parts; }
  Share share(std::int64_t first, std::int64_t last, int index) const {
    const std::int64_t begin = first + index / parts * chunk;
    return {begin, std::min(last, begin + chunk), index % parts, parts};
  }
};

Tasks plan_tasks(const Bank& bank, const Geometry& geometry, int window, std::int64_t tiles) {
  Tasks out;
  out.chunk = (tiles + kMostChunks - 1) / kMostChunks;
  if (geometry.sources == Sources::kSame) out.chunk = std::max<std::int64_t>(kLeastSame, out.chunk);
  out.chunks = int((tiles + out.chunk - 1) / out.chunk);
  if (geometry.sources == Sources::kEvery && !geometry.whole && out.chunks < kLeastChunks) {
    const bool clipped = geometry.padding == Padding::kZeros;
    const int displacements = clipped ? bank.height - 2 * (window / 2) : bank.height;
    const int parts = (kLeastChunks + out.chunks - 1) / out.chunks;
    out.parts = std::max(1, std::min(parts, displacements));
  }
  return out;
}

}  // namespace

#include "fold_library.hpp"
#include "fold_moments_library.hpp"
#include "moments_library.hpp"

namespace {

// ‖q[u+Ω]‖²/2s² of every pixel, in double precision: the term of a logit that depends on the query only.
void energies(const Bank& bank, const Geometry& geometry, const double* squares, int window,
              double scale, double* energy) {
  const int height = bank.height, width = bank.width, r = window / 2;
  const bool cyclic = geometry.padding != Padding::kZeros;
  if (geometry.whole) {
    double sum = 0.0;
    for (std::size_t u = 0; u < bank.pixels(); ++u) sum += squares[u];
    std::fill_n(energy, bank.pixels(), sum * scale);
    return;
  }
  auto box = [&](const double* line, std::size_t stride, int length, int place) {
    double sum = 0.0;
    if (cyclic)
      for (int o = 0; o < window; ++o) sum += line[(place + o - r + length) % length * stride];
    else
      for (int i = std::max(0, place - r); i <= std::min(length - 1, place + r); ++i)
        sum += line[i * stride];
    return sum;
  };
  std::vector<double> rows(bank.pixels());
  for (int i = 0; i < height; ++i)
    for (int j = 0; j < width; ++j)
      rows[i * width + j] = box(squares + std::size_t(i) * width, 1, width, j);
  for (int i = 0; i < height; ++i)
    for (int j = 0; j < width; ++j)
      energy[i * width + j] = box(rows.data() + j, width, height, i) * scale;
}

}  // namespace

extern "C" {

// Arguments from binding.py: the same fields in the same order.
struct ElsCall {
  std::int32_t kernel;  // index as in els_kernel_name
  std::int32_t threads;
  const float* bank;     // packed
  const double* centre;  // [C], what was subtracted from the bank, as float
  std::int64_t images;
  std::int32_t channels, height, width;
  std::int32_t sources, padding, whole;
  std::int64_t batch;
  const float* x;           // [B][C][H][W]
  const double* a;          // [B]
  const double* s;          // [B]
  const std::int64_t* window;  // [B]
  const std::int64_t* ranges;  // [B][2]
  float* mean;              // [B][C][H][W]
  float* log_evidence;      // [B][H][W]
  els::Control* control;
};
}

namespace {

struct Prepared {
  Query query;
  Buffer<float> scaled;
  Buffer<double> energy;
  std::int64_t first, last;  // tiles
  Tasks tasks;
  std::size_t slot;  // of its first partial result
};

Prepared prepare(const ElsCall& call, const Bank& bank, const Geometry& geometry, int lanes,
                 std::int64_t b) {
  const std::size_t pixels = bank.pixels(), values = bank.channels * pixels;
  const double a = call.a[b], s = call.s[b];
  Prepared out{{}, allocate<float>(values), allocate<double>(pixels), 0, 0, {}, 0};
  std::vector<double> squares(pixels, 0.0);
  for (std::size_t v = 0; v < values; ++v) {
    const double q = double(call.x[b * values + v]) - a * call.centre[v / pixels];
    out.scaled[v] = float(q * (a / s / s * kLog2E));
    squares[v % pixels] += q * q;
  }
  const int window = int(call.window[b]);
  energies(bank, geometry, squares.data(), window, 1.0 / (2.0 * s * s), out.energy.get());
  const std::int64_t lo = call.ranges[2 * b], hi = call.ranges[2 * b + 1];
  out.query = {out.scaled.get(), float(-(a / s) * (a / s) * kLog2E / 2.0), window, lo, hi};
  out.first = lo / lanes;
  out.last = (hi + lanes - 1) / lanes;
  out.tasks = plan_tasks(bank, geometry, window, out.last - out.first);
  return out;
}

// Merge one pixel's partial results in the order of the chunks.
void merge(const ElsCall& call, const Bank& bank, const Prepared& image, std::int64_t b,
           const Partial* parts, std::size_t u) {
  const std::size_t pixels = bank.pixels();
  float peak = parts[0].peak[u];
  const int tasks = image.tasks.count();
  for (int i = 1; i < tasks; ++i) peak = std::max(peak, parts[i].peak[u]);
  double weight = 0.0;
  double responses[16] = {};
  // More than 16 channels are merged 16 at a time; the weight is the same each time.
  for (int from = 0; from < bank.channels; from += 16) {
    const int count = std::min(16, bank.channels - from);
    std::fill_n(responses, count, 0.0);
    weight = 0.0;
    for (int i = 0; i < tasks; ++i) {
      const float behind = parts[i].peak[u] - peak;
      if (behind < -1000.0f) continue;  // 2^-1000 of the rest
      const double scale = behind == 0.0f ? 1.0 : std::exp2(double(behind));
      weight += scale * parts[i].sums[u];
      for (int c = 0; c < count; ++c)
        responses[c] += scale * parts[i].sums[(1 + from + c) * pixels + u];
    }
    for (int c = 0; c < count; ++c)
      call.mean[(b * bank.channels + from + c) * pixels + u] =
          float(responses[c] / weight + double(float(call.centre[from + c])));
  }
  call.log_evidence[b * pixels + u] =
      float((double(peak) + std::log2(weight)) / kLog2E - image.energy[u]);
}

struct Task {
  std::int64_t image;
  int index;  // of its partial result: chunk · parts + part
};

void attend(const ElsCall& call, const Kernel& kernel) {
  const Bank bank = {call.bank, call.images, call.channels, call.height, call.width};
  const Geometry geometry = {Sources(call.sources), Padding(call.padding), call.whole != 0};
  const std::size_t pixels = bank.pixels(), sums = (1 + bank.channels) * pixels;
  const std::size_t partial_bytes = pixels * sizeof(float) + sums * sizeof(double);
  const int threads = std::max(1, int(call.threads));
  std::vector<Buffer<float>> scratch;
  for (int i = 0; i < threads; ++i) scratch.push_back(allocate<float>(kernel.scratch_floats(bank)));

  for (std::int64_t begin = 0; begin < call.batch && !is_stopped(*call.control);) {
    // As many images as the memory for partial results allows, at least one.
    std::vector<Prepared> images;
    std::vector<Task> tasks;
    std::size_t slots = 0;
    std::int64_t end = begin;
    while (end < call.batch && (images.empty() || slots * partial_bytes < kPartialBytes)) {
      images.push_back(prepare(call, bank, geometry, kernel.lanes, end++));
      images.back().slot = slots;
      const int count = images.back().tasks.count();
      slots += count;
      for (int i = 0; i < count; ++i)
        tasks.push_back({std::int64_t(images.size()) - 1, i});
    }
    auto first_tile = [&](const Task& task) {
      const Prepared& image = images[task.image];
      return image.tasks.share(image.first, image.last, task.index).first;
    };
    std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& left, const Task& right) {
      return first_tile(left) < first_tile(right);
    });
    const auto peaks = allocate<float>(slots * pixels);
    const auto totals = allocate<double>(slots * sums);
    std::vector<Partial> partials(slots);
    for (std::size_t i = 0; i < slots; ++i)
      partials[i] = {peaks.get() + i * pixels, totals.get() + i * sums};
    for_each(tasks.size(), threads, *call.control, [&](int worker, std::size_t i) {
      const Prepared& image = images[tasks[i].image];
      const Share share = image.tasks.share(image.first, image.last, tasks[i].index);
      kernel.attend(bank, geometry, image.query, share, *call.control, scratch[worker].get(),
                    partials[image.slot + tasks[i].index]);
    });
    for_each(images.size() * bank.height, threads, *call.control, [&](int, std::size_t i) {
      const std::size_t index = i / bank.height, row = i % bank.height * bank.width;
      for (std::size_t u = row; u < row + bank.width; ++u)
        merge(call, bank, images[index], begin + std::int64_t(index),
              partials.data() + images[index].slot, u);
    });
    begin = end;
  }
}

}  // namespace

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

// Returns 0, 1 if out of memory, or 2 if the call was stopped and has no result.
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

// The same for a fold.
std::int32_t els_fold(const ElsFoldCall* call) {
  try {
    fold(*call, *kernels()[call->kernel]);
    return is_stopped(*call->control) ? 2 : 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// The same for a pass of moments of a fold.
std::int32_t els_fold_moments(const ElsFoldMomentsCall* call) {
  try {
    fold_moments(*call, *kernels()[call->kernel]);
    return is_stopped(*call->control) ? 2 : 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
}
#pragma GCC visibility pop
