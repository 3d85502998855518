// The planner of moments: one pass for one query, split into tasks whose results are merged in order for
// every block of the bank, so that they do not depend on the number of threads. Included by
// library.cpp.
#pragma once

#include "blocks.hpp"
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
  ElsBlocks blocks;
  std::int64_t lo, hi;  // of the whole bank
  double norm, scale;  // as in MomentQuery, as are the next
  std::int32_t origin, forbidden, headroom, dead, least;
  const float *units, *reference;
  const std::int32_t* final_peak;
  const float *rate, *mean, *direction, *offset, *cotangent;
  // Results: MomentSums of each block, in order; shares are [images], 0 outside of the range.
  std::int32_t* peak;
  double* sums;
  std::int32_t* logits;  // [H][W][top], falling; -1 where there are fewer sources
  std::int64_t* origins;  // [H][W][top][2]: image of this process and place
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

// Merge the partial results of one pixel and block in the order of the tasks.
void merge_moments(const ElsMomentsCall& call, const MomentSums* parts, std::size_t count,
                   std::size_t pixels, std::size_t u, std::int32_t* peaks, double* sums) {
  const bool weighted = MomentPass(call.pass) == MomentPass::kStatistics;
  std::int32_t peak = 0;
  if (weighted) {
    for (std::size_t i = 0; i < count; ++i) peak = std::max(peak, parts[i].peak[u]);
    peaks[u] = peak;
  }
  for (int i = 0; i < call.vectors; ++i) sums[i * pixels + u] = 0.0;
  for (std::size_t t = 0; t < count; ++t) {
    const MomentSums& part = parts[t];
    const double behind = weighted ? double(part.peak[u]) - peak : 0.0;
    const double scale = behind == 0.0 ? 1.0 : std::exp2(behind * call.scale);
    for (int i = 0; i < call.vectors; ++i) {
      double sum = part.sums[i * pixels + u];
      if (i == 1 && weighted) sum += behind * part.sums[u];
      sums[i * pixels + u] += scale * sum;
    }
  }
}

struct MomentTaskOf {
  std::size_t run;
  Share share;
};

void moments(const ElsMomentsCall& call, const Kernel& kernel) {
  const Bank bank = {call.bank, call.images, call.channels, call.height, call.width};
  const Geometry geometry = {Sources(call.sources), Padding(call.padding), false};
  const auto pass = MomentPass(call.pass);
  const std::size_t pixels = bank.pixels();
  const Tasks plan =
      plan_tasks(bank, geometry, call.window, call.blocks, call.lo, call.hi, kernel.lanes);
  const std::vector<Run> runs = runs_of(call.blocks, call.lo, call.hi, kernel.lanes);
  std::vector<MomentTaskOf> tasks;
  std::vector<std::size_t> first;  // task of each run, and their number
  for (std::size_t r = 0; r < runs.size(); ++r) {
    first.push_back(tasks.size());
    for (int i = 0; i < plan.count(runs[r]); ++i) tasks.push_back({r, plan.share(runs[r], i)});
  }
  first.push_back(tasks.size());
  const std::size_t count = tasks.size();
  const bool shares = pass == MomentPass::kShares, ranked = call.top > 0;
  const std::size_t size = shares ? plan.chunk * kernel.lanes : call.vectors * pixels;
  RankedSources ranking(call, ranked ? pixels : 0);
  const MomentQuery query = {
      call.units, call.norm, float(call.scale), call.origin, call.forbidden, call.headroom, call.dead,
      call.least, call.window, 0, 0, call.reference, ranked ? &ranking : nullptr,
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
    MomentQuery own = query;
    own.lo = runs[tasks[t].run].lo;
    own.hi = runs[tasks[t].run].hi;
    kernel.moments(bank, geometry, pass, own, tasks[t].share, *call.control, scratch[worker].get(),
                   parts[t]);
  });
  if (is_stopped(*call.control)) return;
  if (ranked) ranking.write();
  if (shares) {
    std::fill_n(call.sums, call.images, 0.0);
    for (std::size_t t = 0; t < count; ++t) {
      const Run& run = runs[tasks[t].run];
      const Share& share = tasks[t].share;
      for (std::int64_t image = std::max(run.lo, share.first * kernel.lanes);
           image < std::min(run.hi, share.last * kernel.lanes); ++image)
        call.sums[image] += parts[t].sums[image - share.first * kernel.lanes];
    }
    return;
  }
  for (std::size_t r = 0; r < runs.size(); ++r)
    for (std::size_t u = 0; u < pixels; ++u)
      merge_moments(call, &parts[first[r]], first[r + 1] - first[r], pixels, u,
                    call.peak + r * pixels, call.sums + r * call.vectors * pixels);
}

}  // namespace
