// A pass of a fold over blocks of the bank for one query crop, and the merge of the normalisers of a whole
// bank. Included by library.cpp.
#pragma once

#include "fold_plan.hpp"

extern "C" {

// Arguments from fold_pass.py: the same fields in the same order. Results have a row for each block.
struct ElsFoldCall {
  std::int32_t kernel, threads;
  std::int32_t pass;
  std::int32_t channels, rows, cols, window;
  std::int32_t ring;  // columns, whole vectors
  std::int32_t first_row, last_row, first_col, last_col;  // of the crop: what is answered
  std::int32_t table_taps, uniform_taps, inner_table, inner_uniform, outer_table, outer_uniform;
  std::int32_t top;    // sources of a pixel that are listed; 0 for none
  std::int32_t parts;  // most tasks of a block
  const els::FoldSource* sources;
  std::int64_t sources_count;
  const std::int64_t* block_sources;  // block b has sources [block_sources[b], block_sources[b + 1])
  std::int64_t blocks;
  const std::int32_t* row_classes;  // [rows - window + 1]
  const std::int32_t* col_classes;  // [ring]
  const float* query;               // [C][rows][cols], in units
  const float* centre;              // [C]
  const float* values;              // [C][256], or null; see FoldCell
  double bias, scale;               // see FoldCell
  double lowest;                    // whole units below every logit, by less than 2^31 for any
  double dead;
  // Taps of the fold, and of the inner and the outer filter: see FoldMoments. Rows [rows][window];
  // columns [window], or with a table [cols][window].
  const float *row_taps, *col_taps, *inner_rows, *inner_cols, *outer_rows, *outer_cols;
  const float *row_scale, *col_scale;  // [rows], [cols]: of the mean
  const std::int32_t* whole;           // [patch rows][patch cols], as is the next: see FoldNormaliser
  const float* rest;
  const float *reference, *reach, *direction, *offset, *mean, *mean_rest;  // see FoldMoments
  std::int32_t* peaks;  // results: [blocks][patch rows][patch cols], as is the next
  double* totals;
  double* planes;   // [blocks][planes][image rows][image cols], see FoldMomentSums; the mean: its channels
  double* scalars;  // [blocks][2][patch rows][patch cols]
  double* shares;   // of the images that are attended to
  // Of all blocks: [image rows][image cols][top], in units of Σ π; 0 where there are fewer.
  float* weights;
  std::int64_t* codes;    // the same: see FoldRanking; -1 where there are fewer
  std::int64_t* origins;  // [image rows][image cols][top][3]: image, row, column; or -1
  els::Control* control;
};

// Arguments from fold_pass.py: normalisers of blocks, in the order of the bank.
struct ElsFoldNormalisers {
  std::int64_t blocks, patches;
  const std::int32_t* peaks;  // [blocks][patches], as is the next
  const double* totals;
  double lowest, scale;
  std::int32_t* whole;  // results: [patches]
  float* rest;
  double* log_z;  // in bits
};
}

namespace {

using namespace els;

void plan_fold(const ElsFoldCall& call, int lanes, FoldPlan& plan) {
  FoldCell& cell = plan.cell;
  plan.sources.assign(call.sources, call.sources + call.sources_count);
  plan.scale = call.scale, plan.lowest = call.lowest;
  plan.threads = call.threads, plan.control = call.control;
  cell.channels = call.channels, cell.rows = call.rows, cell.cols = call.cols;
  cell.window = call.window;
  cell.bias = call.bias, cell.scale = float(call.scale), cell.dead = float(call.dead);
  cell.row_classes = call.row_classes, cell.col_classes = call.col_classes;
  cell.centre = call.centre, cell.values = call.values;
  measure_fold(plan, call.ring, lanes);
  cell.query = plan.striped(call.query, std::size_t(call.rows) * call.channels, call.cols);
  split_fold(plan, call.block_sources, call.blocks, call.parts);
}

FoldNormaliser striped_normaliser(const ElsFoldCall& call, FoldPlan& plan) {
  const int patch_rows = plan.cell.patch_rows(), patch_cols = plan.cell.patch_cols();
  // Bits are copied, whatever they are.
  const float* whole =
      plan.striped(reinterpret_cast<const float*>(call.whole), patch_rows, patch_cols);
  return {reinterpret_cast<const std::int32_t*>(whole),
          plan.striped(call.rest, patch_rows, patch_cols, -1e30f)};
}

// Call out(b, sum) for the sums over the tasks of each block of what is at a place of their results.
template <class Out>
void sum_tasks(const FoldPlan& plan, const double* sums, std::size_t stride, std::size_t at, Out out) {
  for (std::size_t b = 0; b + 1 < plan.blocks.size(); ++b) {
    double sum = 0.0;
    for (std::size_t t = plan.blocks[b]; t < plan.blocks[b + 1]; ++t) sum += sums[t * stride + at];
    out(b, sum);
  }
}

// Find the normaliser of each patch over each block.
void normalise_fold(const ElsFoldCall& call, const FoldPlan& plan, const Kernel& kernel) {
  const std::size_t count = plan.tasks.size(), patches = plan.patches();
  const auto scratch = plan.scratch(kernel.fold_scratch_bytes(plan.cell));
  const auto peaks = allocate<std::int32_t>(count * patches);
  const auto totals = allocate<double>(count * patches);
  const auto lowest = std::int64_t(plan.lowest);
  std::fill_n(peaks.get(), count * patches, std::int32_t(std::uint32_t(lowest)));
  std::fill_n(totals.get(), count * patches, 0.0);
  seed_peaks(plan, kernel, scratch, peaks.get(), totals.get());
  for_each_unit(plan, [&](int worker, std::size_t t, const FoldUnit& unit) {
    kernel.fold_normalise(plan.cell, unit, *plan.control, scratch[worker].get(),
                          {peaks.get() + t * patches, totals.get() + t * patches});
  });
  if (is_stopped(*plan.control)) return;
  std::size_t out = 0;
  for (std::size_t b = 0; b + 1 < plan.blocks.size(); ++b) {
    const std::size_t first = plan.blocks[b], tasks = plan.blocks[b + 1] - first;
    for (int i = 0; i < plan.cell.patch_rows(); ++i)
      for (int j = 0; j < plan.cell.patch_cols(); ++j, ++out) {
        const std::size_t q = first * patches + i * plan.row + plan.at(j);
        const FoldNormal sum(lowest, plan.scale, tasks, [&](std::size_t t) -> FoldPart {
          return {peaks[q + t * patches], totals[q + t * patches]};
        });
        call.peaks[out] = std::int32_t(std::uint32_t(lowest) + sum.top);
        call.totals[out] = sum.total;
      }
  }
}

void merge_normalisers(const ElsFoldNormalisers& call) {
  const auto lowest = std::int64_t(call.lowest);
  for (std::int64_t q = 0; q < call.patches; ++q) {
    const FoldNormal sum(lowest, call.scale, call.blocks, [&](std::size_t b) -> FoldPart {
      return {call.peaks[b * call.patches + q], call.totals[b * call.patches + q]};
    });
    // A patch of a query that repeats another has none.
    call.whole[q] = 0, call.rest[q] = -1e30f, call.log_z[q] = -__builtin_inf();
    if (!(sum.total > 0)) continue;
    const double units = call.lowest + double(sum.top) + std::log2(sum.total) / call.scale;
    split_normaliser(units, call.scale, call.whole[q], call.rest[q]);
    call.log_z[q] = units * call.scale;
  }
}

// Find the sums of the mean over each block.
void fold_mean(const ElsFoldCall& call, FoldPlan& plan, const Kernel& kernel) {
  FoldCell& cell = plan.cell;
  cell.row_scale = call.row_scale;
  cell.col_scale = plan.striped(call.col_scale, 1, call.cols);
  cell.taps = {call.row_taps, plan.striped_taps(call.col_taps, call.cols, call.table_taps != 0),
               call.table_taps != 0, call.uniform_taps != 0};
  const FoldNormaliser z = striped_normaliser(call, plan);
  const std::size_t values = call.channels * plan.values(), count = plan.tasks.size();
  const auto scratch = plan.scratch(kernel.fold_scratch_bytes(cell));
  const auto folds = allocate<double>(count * values);
  std::fill_n(folds.get(), count * values, 0.0);
  for_each_unit(plan, [&](int worker, std::size_t t, const FoldUnit& unit) {
    kernel.fold_accumulate(cell, unit, *call.control, scratch[worker].get(), z,
                           folds.get() + t * values);
  });
  if (is_stopped(*plan.control)) return;
  const std::size_t lines = std::size_t(call.channels) * call.rows;
  for (std::size_t line = 0; line < lines; ++line)
    for (int x = 0; x < call.cols; ++x)
      sum_tasks(plan, folds.get(), values, line * plan.row + plan.at(x),
                [&](std::size_t b, double sum) {
                  call.planes[(b * lines + line) * call.cols + x] = sum;
                });
}

}  // namespace
