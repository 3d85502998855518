// Passes for moments of a fold, and the choice of the pass of a call. Included by library.cpp.
#pragma once

#include "fold_library.hpp"

namespace {

using namespace els;

constexpr std::size_t kRankingBytes = std::size_t(24) << 20;  // of the lists of all threads

FoldMoments plan_moments(const ElsFoldCall& call, FoldPlan& plan) {
  const std::size_t rows = call.rows, all_rows = rows * call.channels;
  FoldCell& cell = plan.cell;
  FoldMoments moments{};
  const auto pass = FoldPass(call.pass);
  auto taps = [&](const float* row_taps, const float* cols, bool table, bool uniform) -> FoldTaps {
    return {row_taps, plan.striped_taps(cols, call.cols, table), table, uniform};
  };
  const int patch_rows = cell.patch_rows(), patch_cols = cell.patch_cols();
  cell.taps = taps(call.row_taps, call.col_taps, call.table_taps != 0, false);
  moments.z = striped_normaliser(call, plan);
  moments.first_row = call.first_row, moments.last_row = call.last_row;
  moments.reference = plan.striped(call.reference, all_rows, call.cols);
  if (pass == FoldPass::kStatistics) {
    moments.reach = plan.striped(call.reach, patch_rows, patch_cols);
    return moments;
  }
  moments.direction = plan.striped(call.direction, all_rows, call.cols);
  moments.offset = plan.striped(call.offset, rows, call.cols);
  moments.inner = taps(call.inner_rows, call.inner_cols, call.inner_table != 0, call.inner_uniform != 0);
  moments.mean = plan.striped(call.mean, patch_rows, patch_cols);
  moments.mean_rest = plan.striped(call.mean_rest, patch_rows, patch_cols);
  if (pass == FoldPass::kProduct)
    moments.outer = taps(call.outer_rows, call.outer_cols, call.outer_table != 0, call.outer_uniform != 0);
  return moments;
}

// The lists of one thread: those of all, merged, do not depend on which thread met a source.
struct FoldLists {
  FoldRanking ranking;
  Buffer<float> least, weights;
  Buffer<std::int64_t> codes;

  FoldLists(const ElsFoldCall& call, const FoldPlan& plan) {
    const std::size_t rows = call.last_row - call.first_row, places = rows * plan.row;
    least = allocate<float>(places);
    weights = allocate<float>(places * call.top);
    codes = allocate<std::int64_t>(places * call.top);
    std::fill_n(least.get(), places, __builtin_inff());
    for (std::size_t i = 0; i < rows; ++i)
      for (int x = call.first_col; x < call.last_col; ++x) least[i * plan.row + plan.at(x)] = 0.0f;
    std::fill_n(weights.get(), places * call.top, 0.0f);
    std::fill_n(codes.get(), places * call.top, -1);
    ranking = {call.top, least.get(), weights.get(), codes.get()};
  }
};

std::size_t ranking_bytes(const ElsFoldCall& call, const FoldPlan& plan) {
  return (call.last_row - call.first_row) * plan.row * (call.top * 12 + 4);
}

// The place in the bank of a source of pixel (i, x) of the crop.
void write_origin(const ElsFoldCall& call, std::int64_t code, int i, int x,
                  std::int64_t* origin) {
  const std::int64_t image = code >> 32;
  for (std::int64_t n = 0; n < call.sources_count; ++n) {
    const FoldSource& source = call.sources[n];
    if (image < source.first + source.lo || image >= source.first + source.hi) continue;
    origin[0] = image;
    origin[1] = source.rows[i + int(code & 0xffff) + source.first_row];
    origin[2] = source.cols[x + int(code >> 16 & 0xffff)];
  }
}

void merge_lists(const ElsFoldCall& call, const FoldPlan& plan, const std::vector<FoldLists>& lists) {
  const std::size_t top = call.top;
  float* weights = call.weights;
  std::int64_t *codes = call.codes, *origins = call.origins;
  std::vector<std::pair<float, std::int64_t>> found;
  for (int i = call.first_row; i < call.last_row; ++i)
    for (int x = call.first_col; x < call.last_col; ++x) {
      const std::size_t at = ((i - call.first_row) * plan.row + plan.at(x)) * top;
      found.clear();
      for (const FoldLists& list : lists)
        for (std::size_t n = at; n < at + top && list.codes[n] >= 0; ++n)
          found.emplace_back(-list.weights[n], list.codes[n]);
      std::sort(found.begin(), found.end());
      for (std::size_t n = 0; n < top; ++n, origins += 3) {
        const bool filled = n < found.size();
        *weights++ = filled ? -found[n].first : 0.0f;
        *codes++ = filled ? found[n].second : -1;
        origins[0] = origins[1] = origins[2] = -1;
        if (filled) write_origin(call, found[n].second, i, x, origins);
      }
    }
}

// Sums of the tasks of each block, out of the layout of the kernel: [blocks][planes][rows][cols].
void merge_planes(const FoldPlan& plan, int planes, int rows, int first_col, int last_col, int lanes,
                  const double* sums, std::size_t stride, double* out) {
  const int K = plan.cell.vectors, cols = last_col - first_col;
  for (int n = 0; n < planes; ++n)
    for (int i = 0; i < rows; ++i)
      for (int x = first_col; x < last_col; ++x)
        sum_tasks(plan, sums, stride,
                  ((std::size_t(i) * K + x % K) * planes + n) * lanes + x / K,
                  [&](std::size_t b, double sum) {
                    out[((b * planes + n) * rows + i) * cols + x - first_col] = sum;
                  });
}

// What each image counts, from the units of all tasks in order.
void merge_shares(const FoldPlan& plan, const std::vector<std::vector<double>>& shares, double* out) {
  const FoldUnit* before = nullptr;
  --out;
  for (std::size_t t = 0; t < plan.tasks.size(); ++t)
    for (std::size_t n = 0; n < plan.tasks[t].size(); ++n) {
      const FoldUnit& unit = plan.tasks[t][n];
      if (before == nullptr || before->source != unit.source || before->image != unit.image)
        *++out = 0.0;
      *out += shares[t][n];
      before = &unit;
    }
}

void fold_moments(const ElsFoldCall& call, FoldPlan& plan, const Kernel& kernel) {
  const FoldMoments moments = plan_moments(call, plan);
  const auto pass = FoldPass(call.pass);
  const int planes = fold_planes(pass, call.channels), rows = call.last_row - call.first_row;
  const std::size_t values = std::size_t(planes) * rows * plan.row;
  const std::size_t patches = pass == FoldPass::kTotals ? 2 * plan.patches() : 0;
  const std::size_t size = values + patches, count = plan.tasks.size();
  const bool ranked = pass == FoldPass::kStatistics && call.top > 0;
  if (ranked)
    plan.threads = std::min<int>(plan.threads, 1 + kRankingBytes / ranking_bytes(call, plan));
  std::vector<FoldLists> lists;
  for (int i = 0; i < plan.threads && ranked; ++i) lists.emplace_back(call, plan);
  const auto scratch = plan.scratch(kernel.fold_moment_scratch_bytes(plan.cell, pass));
  const auto sums = allocate<double>(count * size);
  std::fill_n(sums.get(), count * size, 0.0);
  std::vector<std::vector<double>> shares(count);
  for_each_unit(plan, [&](int worker, std::size_t t, const FoldUnit& unit) {
    double* planes_of = sums.get() + t * size;
    shares[t].push_back(0.0);
    kernel.fold_moments(plan.cell, pass, unit, *call.control, scratch[worker].get(), moments,
                        {planes_of, planes_of + values, &shares[t].back(),
                         ranked ? &lists[worker].ranking : nullptr});
  });
  if (is_stopped(*call.control)) return;
  merge_planes(plan, planes, rows, call.first_col, call.last_col, kernel.lanes, sums.get(), size,
               call.planes);
  if (pass == FoldPass::kTotals)
    merge_planes(plan, 2, plan.cell.patch_rows(), 0, plan.cell.patch_cols(), kernel.lanes,
                 sums.get() + values, size, call.scalars);
  if (ranked) merge_lists(call, plan, lists);
  if (pass == FoldPass::kStatistics) merge_shares(plan, shares, call.shares);
}

void fold(const ElsFoldCall& call, const Kernel& kernel) {
  FoldPlan plan;
  plan_fold(call, kernel.lanes, plan);
  switch (FoldPass(call.pass)) {
    case FoldPass::kNormalise: return normalise_fold(call, plan, kernel);
    case FoldPass::kMean: return fold_mean(call, plan, kernel);
    default: return fold_moments(call, plan, kernel);
  }
}

}  // namespace
