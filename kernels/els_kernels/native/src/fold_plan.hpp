// What the planners of a fold share: a query crop in the layout of the kernel, split into tasks whose
// results are merged in order, so that they do not depend on the number of threads. Included by
// library.cpp.
#pragma once

#include "fold_problem.hpp"

namespace {

using namespace els;

constexpr int kMostFoldTasks = 32, kLeastFoldTasks = 4;
constexpr std::size_t kLeastSeeded = 8;  // tasks from which their maxima are started together
constexpr std::size_t kFoldBytes = std::size_t(24) << 20;  // of partial results

struct FoldPlan {
  FoldCell cell{};
  std::vector<FoldSource> sources;
  std::vector<std::vector<FoldUnit>> tasks;
  std::vector<Buffer<float>> kept;
  std::vector<std::vector<std::int32_t>> lines;
  double scale, lowest;  // see FoldCell; whole units below every logit, by less than 2^31 for any
  std::size_t row;       // floats of a striped row
  int threads;
  Control* control;

  std::size_t patches() const { return cell.patch_rows() * row; }
  std::size_t values() const { return cell.rows * row; }  // of a plane
  std::size_t at(int x) const {
    return std::size_t(x % cell.vectors) * (row / cell.vectors) + x / cell.vectors;
  }

  // Rows [count][cols] in the layout of the kernel, `padding` past their end.
  const float* striped(const float* rows, std::size_t count, int cols, float padding = 0.0f) {
    kept.push_back(allocate<float>(count * row));
    float* to = kept.back().get();
    std::fill_n(to, count * row, padding);
    for (std::size_t i = 0; i < count; ++i)
      for (int x = 0; x < cols; ++x) to[i * row + at(x)] = rows[i * cols + x];
    return to;
  }

  // Taps of columns: [window], or with `table` [cols][window].
  const float* striped_taps(const float* taps, int cols, bool table) {
    if (!table) return taps;
    const int k = cell.window;
    kept.push_back(allocate<float>(k * row));
    float* to = kept.back().get();
    std::fill_n(to, k * row, 0.0f);
    for (int x = 0; x < cols; ++x)
      for (int o = 0; o < k; ++o) to[o * row + at(x)] = taps[x * k + o];
    return to;
  }

  // Taps of rows: [window], or with `table` [rows][window].
  const float* repeated_taps(const float* taps, int rows, bool table) {
    if (table) return taps;
    const std::size_t k = cell.window;
    kept.push_back(allocate<float>(rows * k));
    for (int i = 0; i < rows; ++i) std::copy_n(taps, k, kept.back().get() + i * k);
    return kept.back().get();
  }

  // Start the threads' memory, one for each.
  std::vector<Buffer<char>> scratch(std::size_t bytes) const {
    std::vector<Buffer<char>> out;
    for (int i = 0; i < threads && std::size_t(i) < std::max<std::size_t>(1, tasks.size()); ++i)
      out.push_back(allocate<char>(bytes));
    return out;
  }
};

// Set the ring of a plan, and the longest lines of its sources.
void measure_fold(FoldPlan& plan, int ring, int lanes) {
  FoldCell& cell = plan.cell;
  cell.vectors = (ring + lanes - 1) / lanes;
  plan.row = std::size_t(cell.vectors) * lanes;
  for (const FoldSource& source : plan.sources) {
    cell.key_rows = std::max(cell.key_rows, int(source.crop_rows));
    cell.key_cols = std::max(cell.key_cols, int(plan.row) + source.shifts);
  }
  cell.key_cols = (cell.key_cols + cell.vectors - 1) / cell.vectors * cell.vectors;
}

// Split images × horizontal displacements into equal runs; their number depends on shapes only.
void split_fold(FoldPlan& plan, std::size_t bytes) {
  std::int64_t units = 0;
  for (const FoldSource& source : plan.sources) units += (source.hi - source.lo) * source.shifts;
  const int most = int(std::min<std::size_t>(kMostFoldTasks, kFoldBytes / bytes));
  const std::int64_t count = std::min<std::int64_t>(units, std::max(kLeastFoldTasks, most));
  plan.tasks.assign(count, {});
  plan.threads = int(std::max<std::int64_t>(1, std::min<std::int64_t>(plan.threads, count)));
  std::int64_t index = 0;  // of the first unit of an image
  for (const FoldSource& source : plan.sources)
    for (std::int64_t n = source.lo; n < source.hi; ++n, index += source.shifts)
      for (std::int64_t dx = 0; dx < source.shifts;) {
        const std::int64_t task = (index + dx) * count / units;
        const std::int64_t end = ((task + 1) * units + count - 1) / count - index;
        const std::int64_t last = std::min<std::int64_t>(source.shifts, std::max(dx + 1, end));
        plan.tasks[task].push_back({&source, n, int(dx), int(last)});
        dx = last;
      }
}

// Call work(worker, task, unit) for every unit of every task, in order within a task.
template <class Work>
void for_each_unit(const FoldPlan& plan, Work work) {
  for_each(plan.tasks.size(), plan.threads, *plan.control, [&](int worker, std::size_t t) {
    for (const FoldUnit& unit : plan.tasks[t])
      if (!is_stopped(*plan.control)) work(worker, t, unit);
  });
}

// The normaliser of each patch, in units, from the sums of all tasks: call out(i, j, place, units).
template <class Out>
void merge_peaks(const FoldPlan& plan, const std::int32_t* peaks, const double* totals, Out out) {
  const std::size_t patches = plan.patches();
  const auto lowest = std::uint32_t(std::int64_t(plan.lowest));
  for (int i = 0; i < plan.cell.patch_rows(); ++i)
    for (int j = 0; j < plan.cell.patch_cols(); ++j) {
      const std::size_t q = i * plan.row + plan.at(j);
      std::uint32_t top = 0;
      for (std::size_t t = 0; t < plan.tasks.size(); ++t)
        if (totals[t * patches + q] > 0)
          top = std::max(top, std::uint32_t(peaks[t * patches + q]) - lowest);
      double total = 0;
      for (std::size_t t = 0; t < plan.tasks.size(); ++t) {
        const double below = double(top) - double(std::uint32_t(peaks[t * patches + q]) - lowest);
        if (totals[t * patches + q] > 0)
          total += totals[t * patches + q] * std::exp2(-below * plan.scale);
      }
      if (total > 0) out(i, j, q, plan.lowest + double(top) + std::log2(total) / plan.scale);
    }
}

// A normaliser in units, as FoldNormaliser has it.
void split_normaliser(double units, double scale, std::int32_t& whole, float& rest) {
  const double down = std::floor(units);
  whole = std::int32_t(std::uint32_t(std::int64_t(down)));
  rest = float((down - units) * scale);
}

// Start the maxima of all tasks at those of one displacement: to raise a maximum costs as much as
// a hundred logits. The same for any number of threads, as all results must be.
void seed_peaks(const FoldPlan& plan, const Kernel& kernel, char* scratch, std::int32_t* peaks,
                double* totals) {
  const std::size_t count = plan.tasks.size(), patches = plan.patches();
  if (count < kLeastSeeded) return;
  FoldUnit unit = plan.tasks[0].front();
  unit.last = unit.first + 1;
  kernel.fold_normalise(plan.cell, unit, *plan.control, scratch, {peaks, totals});
  std::fill_n(totals, patches, 0.0);
  for (std::size_t t = 1; t < count; ++t) std::copy_n(peaks, patches, peaks + t * patches);
}

// Find the normaliser of each patch; see merge_peaks.
template <class Out>
void normalise_fold(const FoldPlan& plan, const Kernel& kernel, Out out) {
  const std::size_t count = plan.tasks.size(), patches = plan.patches();
  const auto scratch = plan.scratch(kernel.fold_scratch_bytes(plan.cell));
  const auto peaks = allocate<std::int32_t>(count * patches);
  const auto totals = allocate<double>(count * patches);
  std::fill_n(peaks.get(), count * patches,
              std::int32_t(std::uint32_t(std::int64_t(plan.lowest))));
  std::fill_n(totals.get(), count * patches, 0.0);
  seed_peaks(plan, kernel, scratch[0].get(), peaks.get(), totals.get());
  for_each_unit(plan, [&](int worker, std::size_t t, const FoldUnit& unit) {
    kernel.fold_normalise(plan.cell, unit, *plan.control, scratch[worker].get(),
                          {peaks.get() + t * patches, totals.get() + t * patches});
  });
  if (!is_stopped(*plan.control)) merge_peaks(plan, peaks.get(), totals.get(), out);
}

}  // namespace
