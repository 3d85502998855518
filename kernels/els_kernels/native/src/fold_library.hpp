// The planner of a fold: one query crop, split into tasks whose results are merged in order, so that
// they do not depend on the number of threads. Included by library.cpp.
#pragma once

#include "fold_problem.hpp"

extern "C" {

// Arguments from fold_binding.py: the same fields in the same order.
struct ElsFoldCall {
  std::int32_t kernel, threads;
  std::int32_t channels, rows, cols, window;
  std::int32_t same_rows, same_cols, table_taps, uniform_taps;
  const els::FoldSource* sources;
  std::int64_t sources_count;
  const float* query;  // [C][rows][cols], in units
  double bias, scale;  // see FoldCell
  double lowest;       // whole units below every logit, by less than 2^31 for any
  double dead;
  const float* row_taps;   // [rows][window]
  const float* col_taps;   // [window], or with table_taps [cols][window]
  const float* col_scale;  // [cols]
  const float* centre;     // [C]
  const float* values;     // [C][256], or null; see FoldCell
  double* log_z;  // [patch rows][patch cols], in bits
  double* fold;   // [C][rows][cols]
  els::Control* control;
};
}

namespace {

using namespace els;

constexpr int kMostFoldTasks = 32, kLeastFoldTasks = 4;
constexpr std::size_t kLeastSeeded = 8;  // tasks from which their maxima are started together
constexpr std::size_t kFoldBytes = std::size_t(24) << 20;  // of partial results

struct FoldPlan {
  FoldCell cell;
  Buffer<float> query, col_taps, col_scale;
  std::vector<std::vector<FoldUnit>> tasks;
  std::size_t row;  // floats of a striped row

  std::size_t patches() const { return cell.patch_rows() * row; }
  std::size_t values() const { return cell.channels * cell.rows * row; }
  std::size_t at(int x) const {
    return std::size_t(x % cell.vectors) * (row / cell.vectors) + x / cell.vectors;
  }
};

FoldPlan plan_fold(const ElsFoldCall& call, int lanes) {
  int ring = call.cols, key_rows = 0;
  for (std::int64_t i = 0; i < call.sources_count; ++i) {
    ring = std::max(ring, int(call.sources[i].crop_cols));
    key_rows = std::max(key_rows, int(call.sources[i].crop_rows));
  }
  const int vectors = (ring + lanes - 1) / lanes;
  FoldPlan plan{};
  plan.row = std::size_t(vectors) * lanes;
  plan.cell = {call.channels, call.rows, call.cols, call.window, call.same_rows != 0,
               call.same_cols != 0, vectors, key_rows, nullptr, call.bias, float(call.scale),
               float(call.dead), call.row_taps, call.col_taps, nullptr, call.table_taps != 0,
               call.uniform_taps != 0, call.centre, call.values};
  plan.query = allocate<float>(plan.values());
  std::fill_n(plan.query.get(), plan.values(), 0.0f);
  for (std::size_t line = 0; line < std::size_t(call.channels) * call.rows; ++line)
    for (int x = 0; x < call.cols; ++x)
      plan.query[line * plan.row + plan.at(x)] = call.query[line * call.cols + x];
  plan.col_scale = allocate<float>(plan.row);
  std::fill_n(plan.col_scale.get(), plan.row, 0.0f);
  for (int x = 0; x < call.cols; ++x) plan.col_scale[plan.at(x)] = call.col_scale[x];
  if (call.table_taps != 0) {
    plan.col_taps = allocate<float>(call.window * plan.row);
    std::fill_n(plan.col_taps.get(), call.window * plan.row, 0.0f);
    for (int x = 0; x < call.cols; ++x)
      for (int o = 0; o < call.window; ++o)
        plan.col_taps[o * plan.row + plan.at(x)] = call.col_taps[x * call.window + o];
    plan.cell.col_taps = plan.col_taps.get();
  }
  plan.cell.query = plan.query.get();
  plan.cell.col_scale = plan.col_scale.get();
  return plan;
}

// Split images × horizontal displacements into equal runs; their number depends on shapes only.
void split_fold(const ElsFoldCall& call, FoldPlan& plan) {
  const std::int64_t shifts = plan.cell.same_cols ? 1 : std::int64_t(plan.row);
  std::int64_t units = 0;
  for (std::int64_t i = 0; i < call.sources_count; ++i)
    units += (call.sources[i].hi - call.sources[i].lo) * shifts;
  const std::size_t bytes = plan.values() * sizeof(double) + plan.patches() * 12;
  const int most = int(std::min<std::size_t>(kMostFoldTasks, kFoldBytes / bytes));
  const std::int64_t count = std::min<std::int64_t>(units, std::max(kLeastFoldTasks, most));
  plan.tasks.resize(count);
  std::int64_t index = 0;  // of the first unit of an image
  for (std::int64_t i = 0; i < call.sources_count; ++i)
    for (std::int64_t n = call.sources[i].lo; n < call.sources[i].hi; ++n, index += shifts)
      for (std::int64_t dx = 0; dx < shifts;) {
        const std::int64_t task = (index + dx) * count / units;
        const std::int64_t end = ((task + 1) * units + count - 1) / count - index;
        const std::int64_t last = std::min(shifts, std::max(dx + 1, end));
        plan.tasks[task].push_back({call.sources + i, n, int(dx), int(last)});
        dx = last;
      }
}

// log₂ of the normaliser of each patch, from the sums of all tasks.
void merge_fold(const ElsFoldCall& call, const FoldPlan& plan, const std::int32_t* peaks,
                const double* totals, std::int32_t* whole, float* rest) {
  const std::size_t patches = plan.patches();
  const auto lowest = std::uint32_t(std::int64_t(call.lowest));
  std::fill_n(whole, patches, 0);
  std::fill_n(rest, patches, -1e30f);
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
          total += totals[t * patches + q] * std::exp2(-below * call.scale);
      }
      const double units = call.lowest + double(top) + std::log2(total) / call.scale;
      const double down = std::floor(units);
      whole[q] = std::int32_t(std::uint32_t(std::int64_t(down)));
      rest[q] = float((down - units) * call.scale);
      call.log_z[i * plan.cell.patch_cols() + j] = units * call.scale;
    }
}

// Start the maxima of all tasks at those of one displacement: to raise a maximum costs as much as
// a hundred logits. The same for any number of threads, as all results must be.
void seed_peaks(const ElsFoldCall& call, const FoldPlan& plan, const Kernel& kernel, char* scratch,
                std::int32_t* peaks, double* totals) {
  const std::size_t count = plan.tasks.size(), patches = plan.patches();
  if (count < kLeastSeeded) return;
  FoldUnit unit = plan.tasks[0].front();
  unit.last = unit.first + 1;
  kernel.fold_normalise(plan.cell, unit, *call.control, scratch, {peaks, totals});
  std::fill_n(totals, patches, 0.0);
  for (std::size_t t = 1; t < count; ++t) std::copy_n(peaks, patches, peaks + t * patches);
}

void fold(const ElsFoldCall& call, const Kernel& kernel) {
  FoldPlan plan = plan_fold(call, kernel.lanes);
  split_fold(call, plan);
  const std::size_t count = plan.tasks.size(), patches = plan.patches(), values = plan.values();
  const int threads = std::max(1, std::min(int(call.threads), int(count)));
  std::vector<Buffer<char>> scratch;
  for (int i = 0; i < threads; ++i)
    scratch.push_back(allocate<char>(kernel.fold_scratch_bytes(plan.cell)));
  const auto whole = allocate<std::int32_t>(patches);
  const auto rest = allocate<float>(patches);
  {
    const auto peaks = allocate<std::int32_t>(count * patches);
    const auto totals = allocate<double>(count * patches);
    std::fill_n(peaks.get(), count * patches,
                std::int32_t(std::uint32_t(std::int64_t(call.lowest))));
    std::fill_n(totals.get(), count * patches, 0.0);
    seed_peaks(call, plan, kernel, scratch[0].get(), peaks.get(), totals.get());
    for_each(count, threads, *call.control, [&](int worker, std::size_t t) {
      for (const FoldUnit& unit : plan.tasks[t])
        if (!is_stopped(*call.control))
          kernel.fold_normalise(plan.cell, unit, *call.control, scratch[worker].get(),
                                {peaks.get() + t * patches, totals.get() + t * patches});
    });
    if (is_stopped(*call.control)) return;
    merge_fold(call, plan, peaks.get(), totals.get(), whole.get(), rest.get());
  }
  const auto folds = allocate<double>(count * values);
  std::fill_n(folds.get(), count * values, 0.0);
  for_each(count, threads, *call.control, [&](int worker, std::size_t t) {
    for (const FoldUnit& unit : plan.tasks[t])
      if (!is_stopped(*call.control))
        kernel.fold_accumulate(plan.cell, unit, *call.control, scratch[worker].get(),
                               {whole.get(), rest.get()}, folds.get() + t * values);
  });
  for (std::size_t line = 0; line < std::size_t(call.channels) * call.rows; ++line)
    for (int x = 0; x < call.cols; ++x) {
      double sum = 0.0;
      for (std::size_t t = 0; t < count; ++t)
        sum += folds[t * values + line * plan.row + plan.at(x)];
      call.fold[line * call.cols + x] = sum;
    }
}

}  // namespace
