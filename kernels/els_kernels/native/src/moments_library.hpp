// The planner of moments: one pass for one query, split into tasks whose results are merged in order,
// so that they do not depend on the number of threads. Included by library.cpp.
#pragma once

#include "moments_problem.hpp"

extern "C" {

// Arguments from moments_binding.py: the same fields in the same order.
struct ElsMomentsCall {
  std::int32_t kernel, threads;
  const float* bank;  // packed
  std::int64_t images;
  std::int32_t channels, height, width;
  std::int32_t sources, padding;
  std::int32_t pass;
  std::int32_t window;
  std::int32_t top;  // sources of a pixel that are listed; 0 for none
  std::int32_t vectors;  // sums of a pixel, see MomentSums; not shares
  std::int64_t lo, hi;
  double norm, scale;  // as in MomentQuery, as are the next
  std::int32_t origin, forbidden, headroom, dead, least;
  const float *units, *reference;
  const std::int32_t* final_peak;
  const float *rate, *mean, *direction, *offset, *cotangent;
  std::int32_t* peak;   // results: MomentSums, with shares [hi - lo]
  double* sums;
  std::int32_t* logits;  // [H][W][top], falling; -1 where there are fewer sources
  std::int64_t* origins;  // [H][W][top][2]: image and place
  els::Control* control;
};
}

namespace {

using namespace els;

// The lists behind Ranking, shared by all tasks.
class RankedSources : public Ranking {
 public:
  RankedSources(const ElsMomentsCall& call, std::size_t pixels)
      : Ranking{nullptr, &RankedSources::insert}, call_(call), least_(pixels), lists_(pixels) {
    std::fill(least_.begin(), least_.end(), -(std::int64_t(1) << 32));
    Ranking::least = least_.data();
    for (auto& list : lists_) list.reserve(call.top + 1);
  }

  void write() const {
    for (std::size_t u = 0; u < lists_.size(); ++u)
      for (std::size_t i = 0; i < std::size_t(call_.top); ++i) {
        const bool filled = i < lists_[u].size();
        const std::size_t at = u * call_.top + i;
        call_.logits[at] = filled ? lists_[u][i].logit : -1;
        call_.origins[2 * at] = filled ? lists_[u][i].image : -1;
        call_.origins[2 * at + 1] = filled ? lists_[u][i].place : -1;
      }
  }

 private:
  struct Source {
    std::int32_t logit, slot;
    std::int64_t image;
    int place;
  };

  static void insert(Ranking& base, int pixel, std::int32_t logit, std::int32_t slot,
                     std::int64_t image, int place) {
    auto& self = static_cast<RankedSources&>(base);
    auto& list = self.lists_[pixel];
    const std::lock_guard<std::mutex> lock(self.locks_[pixel % kLocks]);
    std::size_t at = list.size();
    while (at > 0 && (list[at - 1].logit < logit ||
                      (list[at - 1].logit == logit && list[at - 1].slot > slot)))
      --at;
    const std::size_t top = self.call_.top;
    if (at == top) return;
    list.insert(list.begin() + at, {logit, slot, image, place});
    if (list.size() > top) list.pop_back();
    if (list.size() == top) {
      const std::int64_t worst = (std::int64_t(list.back().logit) << 32) | list.back().slot;
      __atomic_store_n(&self.least_[pixel], worst, __ATOMIC_RELAXED);
    }
  }

  static constexpr int kLocks = 64;
  const ElsMomentsCall& call_;
  std::vector<std::int64_t> least_;
  std::vector<std::vector<Source>> lists_;
  std::mutex locks_[kLocks];
};

// Merge the partial results of one pixel in the order of the tasks.
void merge_moments(const ElsMomentsCall& call, const std::vector<MomentSums>& parts, int vectors,
                   std::size_t pixels, std::size_t u) {
  const bool weighted = MomentPass(call.pass) == MomentPass::kStatistics;
  std::int32_t peak = 0;
  if (weighted) {
    for (const MomentSums& part : parts) peak = std::max(peak, part.peak[u]);
    call.peak[u] = peak;
  }
  for (int i = 0; i < vectors; ++i) call.sums[i * pixels + u] = 0.0;
  for (const MomentSums& part : parts) {
    const double behind = weighted ? double(part.peak[u]) - peak : 0.0;
    const double scale = behind == 0.0 ? 1.0 : std::exp2(behind * call.scale);
    for (int i = 0; i < vectors; ++i) {
      double sum = part.sums[i * pixels + u];
      if (i == 1 && weighted) sum += behind * part.sums[u];
      call.sums[i * pixels + u] += scale * sum;
    }
  }
}

void moments(const ElsMomentsCall& call, const Kernel& kernel) {
  const Bank bank = {call.bank, call.images, call.channels, call.height, call.width};
  const Geometry geometry = {Sources(call.sources), Padding(call.padding), false};
  const auto pass = MomentPass(call.pass);
  const std::size_t pixels = bank.pixels();
  const std::int64_t first = call.lo / kernel.lanes;
  const std::int64_t last = (call.hi + kernel.lanes - 1) / kernel.lanes;
  const Tasks tasks = plan_tasks(bank, geometry, call.window, last - first);
  const std::size_t count = tasks.count();
  const bool shares = pass == MomentPass::kShares, ranked = call.top > 0;
  const int vectors = call.vectors;
  const std::size_t size = shares ? tasks.chunk * kernel.lanes : vectors * pixels;
  RankedSources ranking(call, ranked ? pixels : 0);
  const MomentQuery query = {
      call.units, call.norm, float(call.scale), call.origin, call.forbidden, call.headroom, call.dead,
      call.least, call.window, call.lo, call.hi, call.reference, ranked ? &ranking : nullptr,
      call.final_peak, call.rate, call.mean, call.direction, call.offset, call.cotangent};
  const auto sums = allocate<double>(count * size);
  const auto peaks = allocate<std::int32_t>(count * pixels);
  std::vector<MomentSums> parts(count);
  for (std::size_t t = 0; t < count; ++t)
    parts[t] = {peaks.get() + t * pixels, sums.get() + t * size};
  const int threads = std::max(1, int(call.threads));
  std::vector<Buffer<float>> scratch;
  for (int i = 0; i < threads && std::size_t(i) < count; ++i)
    scratch.push_back(allocate<float>(kernel.moment_scratch_floats(bank, call.window)));
  for_each(count, threads, *call.control, [&](int worker, std::size_t t) {
    kernel.moments(bank, geometry, pass, query, tasks.share(first, last, int(t)), *call.control,
                   scratch[worker].get(), parts[t]);
  });
  if (is_stopped(*call.control)) return;
  if (ranked) ranking.write();
  if (shares) {
    std::fill_n(call.sums, call.hi - call.lo, 0.0);
    for (std::size_t t = 0; t < count; ++t) {
      const Share share = tasks.share(first, last, int(t));
      for (std::int64_t image = std::max(call.lo, share.first * kernel.lanes);
           image < std::min(call.hi, share.last * kernel.lanes); ++image)
        call.sums[image - call.lo] += parts[t].sums[image - share.first * kernel.lanes];
    }
    return;
  }
  for (std::size_t u = 0; u < pixels; ++u) merge_moments(call, parts, vectors, pixels, u);
}

}  // namespace
