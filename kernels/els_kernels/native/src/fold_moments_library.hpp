// The planner of moments of a fold: one pass for one query crop. Included by library.cpp.
#pragma once

#include "fold_plan.hpp"

extern "C" {

// Arguments from fold_moments_binding.py: the same fields in the same order.
struct ElsFoldMomentsCall {
  std::int32_t kernel, threads;
  std::int32_t pass;
  std::int32_t channels, rows, cols, window;
  std::int32_t ring;  // columns, whole vectors
  std::int32_t first_row, last_row, first_col, last_col;  // of the crop: the image
  std::int32_t table_taps, inner_table, inner_uniform, outer_table, outer_uniform;
  std::int32_t top;  // sources of a pixel that are listed; 0 for none
  const els::FoldSource* sources;
  std::int64_t sources_count;
  const std::int32_t* row_classes;  // [rows - window + 1]
  const std::int32_t* col_classes;  // [ring]
  const float* query;               // [C][rows][cols], in units
  const float* centre;              // [C]
  double bias, scale, lowest, dead;  // as in ElsFoldCall
  // Taps of the fold, and of the inner and the outer filter: see FoldMoments. Rows [rows][window];
  // columns [window], or with a table [cols][window].
  const float *row_taps, *col_taps, *inner_rows, *inner_cols, *outer_rows, *outer_cols;
  std::int32_t* whole;  // [patch rows][patch cols], as is the next: result of the first pass
  float* rest;
  const float *reference, *reach, *direction, *offset, *mean;  // see FoldMoments, not striped
  double* planes;   // results: [planes][image rows][image cols], see FoldMomentSums
  double* scalars;  // [2][patch rows][patch cols]
  double* shares;   // of the images that are attended to
  float* weights;   // [image rows][image cols][top], in units of Σ π; 0 where there are fewer
  std::int64_t* origins;  // [image rows][image cols][top][3]: image, row, column; or -1
  els::Control* control;
};
}

namespace {

using namespace els;

constexpr std::size_t kRankingBytes = std::size_t(24) << 20;  // of the lists of all threads

FoldMoments plan_moments(const ElsFoldMomentsCall& call, int lanes, FoldPlan& plan) {
  const int k = call.window;
  const std::size_t rows = call.rows, all_rows = rows * call.channels;
  plan.sources.assign(call.sources, call.sources + call.sources_count);
  plan.scale = call.scale, plan.lowest = call.lowest;
  plan.threads = call.threads, plan.control = call.control;
  FoldCell& cell = plan.cell;
  cell.channels = call.channels, cell.rows = call.rows, cell.cols = call.cols, cell.window = k;
  cell.bias = call.bias, cell.scale = float(call.scale), cell.dead = float(call.dead);
  cell.row_classes = call.row_classes, cell.col_classes = call.col_classes;
  cell.centre = call.centre;
  measure_fold(plan, call.ring, lanes);
  cell.query = plan.striped(call.query, all_rows, call.cols);
  FoldMoments moments{};
  const auto pass = FoldPass(call.pass);
  if (pass == FoldPass::kNormalise) return moments;
  auto taps = [&](const float* row_taps, const float* cols, bool table, bool uniform) -> FoldTaps {
    return {row_taps, plan.striped_taps(cols, call.cols, table), table, uniform};
  };
  const int patch_rows = cell.patch_rows(), patch_cols = cell.patch_cols();
  cell.taps = taps(call.row_taps, call.col_taps, call.table_taps != 0, false);
  moments.z.rest = plan.striped(call.rest, patch_rows, patch_cols, -1e30f);
  // Bits are copied, whatever they are.
  moments.z.whole = reinterpret_cast<const std::int32_t*>(
      plan.striped(reinterpret_cast<const float*>(call.whole), patch_rows, patch_cols));
  moments.first_row = call.first_row, moments.last_row = call.last_row;
  moments.reference = plan.striped(call.reference, all_rows, call.cols);
  if (pass == FoldPass::kStatistics) {
    moments.reach = plan.striped(call.reach, patch_rows, patch_cols);
    return moments;
  }
  moments.direction = plan.striped(call.direction, all_rows, call.cols);
  moments.offset = plan.striped(call.offset, rows, call.cols);
  moments.inner = taps(call.inner_rows, call.inner_cols, call.inner_table != 0, call.inner_uniform != 0);
  if (pass == FoldPass::kProduct) {
    moments.outer = taps(call.outer_rows, call.outer_cols, call.outer_table != 0, call.outer_uniform != 0);
    moments.mean = plan.striped(call.mean, patch_rows, patch_cols);
  }
  return moments;
}

// The lists of one thread: those of all, merged, do not depend on which thread met a source.
struct FoldLists {
  FoldRanking ranking;
  Buffer<float> least, weights;
  Buffer<std::int64_t> codes;

  FoldLists(const ElsFoldMomentsCall& call, const FoldPlan& plan) {
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

std::size_t ranking_bytes(const ElsFoldMomentsCall& call, const FoldPlan& plan) {
  return (call.last_row - call.first_row) * plan.row * (call.top * 12 + 4);
}

// The place in the bank of a source of pixel (i, x) of the crop.
void write_origin(const ElsFoldMomentsCall& call, std::int64_t code, int i, int x,
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

void merge_lists(const ElsFoldMomentsCall& call, const FoldPlan& plan,
                 const std::vector<FoldLists>& lists) {
  const std::size_t top = call.top;
  float* weights = call.weights;
  std::int64_t* origins = call.origins;
  std::vector<std::pair<float, std::int64_t>> found;
  for (int i = call.first_row; i < call.last_row; ++i)
    for (int x = call.first_col; x < call.last_col; ++x) {
      const std::size_t at = ((i - call.first_row) * plan.row + plan.at(x)) * top;
      found.clear();
      for (const FoldLists& list : lists)
        for (std::size_t n = at; n < at + top && list.codes[n] >= 0; ++n)
          found.emplace_back(-list.weights[n], list.codes[n]);
      std::sort(found.begin(), found.end());
      for (std::size_t n = 0; n < top; ++n, ++weights, origins += 3) {
        const bool filled = n < found.size();
        *weights = filled ? -found[n].first : 0.0f;
        origins[0] = origins[1] = origins[2] = -1;
        if (filled) write_origin(call, found[n].second, i, x, origins);
      }
    }
}

// Sums of all tasks, in order, out of the layout of the kernel.
void merge_planes(const ElsFoldMomentsCall& call, const FoldPlan& plan, int planes, int lanes,
                  const double* sums, std::size_t stride) {
  double* out = call.planes;
  for (int n = 0; n < planes; ++n)
    for (int i = 0; i < call.last_row - call.first_row; ++i)
      for (int x = call.first_col; x < call.last_col; ++x) {
        const int K = plan.cell.vectors;
        const std::size_t at =
            ((std::size_t(i) * K + x % K) * planes + n) * lanes + x / K;
        double sum = 0.0;
        for (std::size_t t = 0; t < plan.tasks.size(); ++t) sum += sums[t * stride + at];
        *out++ = sum;
      }
}

void merge_scalars(const ElsFoldMomentsCall& call, const FoldPlan& plan, int lanes,
                   const double* sums, std::size_t stride) {
  double* out = call.scalars;
  const int K = plan.cell.vectors;
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < plan.cell.patch_rows(); ++i)
      for (int x = 0; x < plan.cell.patch_cols(); ++x) {
        const std::size_t at = ((std::size_t(i) * K + x % K) * 2 + n) * lanes + x / K;
        double sum = 0.0;
        for (std::size_t t = 0; t < plan.tasks.size(); ++t) sum += sums[t * stride + at];
        *out++ = sum;
      }
}

void find_normalisers(const ElsFoldMomentsCall& call, FoldPlan& plan, const Kernel& kernel) {
  const std::size_t patches = plan.cell.patch_rows() * std::size_t(plan.cell.patch_cols());
  std::fill_n(call.whole, patches, 0);
  std::fill_n(call.rest, patches, -1e30f);
  split_fold(plan, plan.patches() * 12);
  normalise_fold(plan, kernel, [&](int i, int j, std::size_t, double units) {
    const std::size_t q = i * std::size_t(plan.cell.patch_cols()) + j;
    split_normaliser(units, plan.scale, call.whole[q], call.rest[q]);
  });
}

void fold_moments(const ElsFoldMomentsCall& call, const Kernel& kernel) {
  FoldPlan plan;
  const FoldMoments moments = plan_moments(call, kernel.lanes, plan);
  const auto pass = FoldPass(call.pass);
  if (pass == FoldPass::kNormalise) return find_normalisers(call, plan, kernel);
  const int planes = fold_planes(pass, call.channels);
  const std::size_t values = planes * (call.last_row - call.first_row) * plan.row;
  const std::size_t patches = pass == FoldPass::kTotals ? 2 * plan.patches() : 0;
  const std::size_t size = values + patches;
  split_fold(plan, size * sizeof(double));
  const bool ranked = pass == FoldPass::kStatistics && call.top > 0;
  if (ranked)
    plan.threads = std::min<int>(plan.threads, 1 + kRankingBytes / ranking_bytes(call, plan));
  std::vector<FoldLists> lists;
  for (int i = 0; i < plan.threads && ranked; ++i) lists.emplace_back(call, plan);
  const auto scratch = plan.scratch(kernel.fold_moment_scratch_bytes(plan.cell, pass));
  const std::size_t count = plan.tasks.size();
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
  merge_planes(call, plan, planes, kernel.lanes, sums.get(), size);
  if (pass == FoldPass::kTotals)
    merge_scalars(call, plan, kernel.lanes, sums.get() + values, size);
  if (ranked) merge_lists(call, plan, lists);
  if (pass != FoldPass::kStatistics) return;
  std::int64_t image = -1;
  const FoldUnit* before = nullptr;
  for (std::size_t t = 0; t < count; ++t)
    for (std::size_t n = 0; n < plan.tasks[t].size(); ++n) {
      const FoldUnit& unit = plan.tasks[t][n];
      if (before == nullptr || before->source != unit.source || before->image != unit.image)
        call.shares[++image] = 0.0;
      call.shares[image] += shares[t][n];
      before = &unit;
    }
}

}  // namespace
