// The planner of a fold: one query crop, and crops of the bank in which every patch fits. Included by
// library.cpp.
#pragma once

#include "fold_plan.hpp"

extern "C" {

// Images of one size; a crop of each is what patches are taken from.
struct ElsFoldSource {
  const void* images;   // [N][C][height][width], see FoldSource
  std::int64_t lo, hi;  // those that are attended to
  std::int32_t height, width;
  std::int32_t crop_rows, crop_cols;
  const std::int32_t* rows;  // [crop_rows]: row of the image, or -1 for zeros
  const std::int32_t* cols;  // [crop_cols]
};

// Arguments from fold_binding.py: the same fields in the same order.
struct ElsFoldCall {
  std::int32_t kernel, threads;
  std::int32_t channels, rows, cols, window;
  std::int32_t same_rows, same_cols, table_taps, uniform_taps;
  const ElsFoldSource* sources;
  std::int64_t sources_count;
  const float* query;  // [C][rows][cols], in units
  double bias, scale;  // see FoldCell
  double lowest;       // whole units below every logit, by less than 2^31 for any
  double dead;
  // [window], or with table_taps [rows][window] and [cols][window].
  const float *row_taps, *col_taps;
  const float *row_scale, *col_scale;  // [rows], [cols]
  const float* centre;     // [C]
  const float* values;     // [C][256], or null; see FoldCell
  double* log_z;  // [patch rows][patch cols], in bits
  double* fold;   // [C][rows][cols]
  els::Control* control;
};
}

namespace {

using namespace els;

// A source whose columns are on a ring, twice: its displacements are the rotations of the ring.
FoldSource ring_source(const ElsFoldCall& call, const ElsFoldSource& source, int ring,
                       FoldPlan& plan) {
  const int k = call.window, patch_rows = call.rows - k + 1;
  const int key_rows = source.crop_rows - k + 1, shifts = call.same_cols ? 1 : ring;
  std::vector<std::int32_t> cols(ring + shifts), classes(ring + shifts - k + 1);
  for (int t = 0; t < ring + shifts; ++t)
    cols[t] = t % ring < source.crop_cols ? source.cols[t % ring] : -1;
  for (std::size_t t = 0; t < classes.size(); ++t)
    classes[t] = int(t) % ring <= source.crop_cols - k ? 0 : -2;
  plan.lines.push_back(std::move(cols));
  plan.lines.push_back(std::move(classes));
  plan.lines.emplace_back(key_rows, 0);
  const auto lines = plan.lines.end();
  return {source.images, source.lo, source.hi, 0, source.height, source.width, source.crop_rows,
          ring + shifts, source.rows, lines[-3].data(), lines[-1].data(), lines[-2].data(),
          call.same_rows ? 0 : 1 - patch_rows, call.same_rows ? 1 : key_rows, shifts};
}

void plan_fold(const ElsFoldCall& call, int lanes, FoldPlan& plan) {
  const int k = call.window;
  int ring = call.cols;
  for (std::int64_t i = 0; i < call.sources_count; ++i)
    ring = std::max(ring, int(call.sources[i].crop_cols));
  ring = (ring + lanes - 1) / lanes * lanes;
  for (std::int64_t i = 0; i < call.sources_count; ++i)
    plan.sources.push_back(ring_source(call, call.sources[i], ring, plan));
  plan.scale = call.scale, plan.lowest = call.lowest;
  plan.threads = call.threads, plan.control = call.control;
  FoldCell& cell = plan.cell;
  cell.channels = call.channels, cell.rows = call.rows, cell.cols = call.cols, cell.window = k;
  cell.bias = call.bias, cell.scale = float(call.scale), cell.dead = float(call.dead);
  measure_fold(plan, ring, lanes);
  plan.lines.emplace_back(cell.patch_rows(), 0);
  cell.row_classes = plan.lines.back().data();
  plan.lines.emplace_back(ring, -1);
  std::fill_n(plan.lines.back().begin(), cell.patch_cols(), 0);
  cell.col_classes = plan.lines.back().data();
  cell.centre = call.centre, cell.values = call.values;
  cell.query = plan.striped(call.query, std::size_t(call.channels) * call.rows, call.cols);
  cell.col_scale = plan.striped(call.col_scale, 1, call.cols);
  cell.row_scale = call.row_scale;
  cell.taps = {plan.repeated_taps(call.row_taps, call.rows, call.table_taps != 0),
               plan.striped_taps(call.col_taps, call.cols, call.table_taps != 0),
               call.table_taps != 0, call.uniform_taps != 0};
}

void fold(const ElsFoldCall& call, const Kernel& kernel) {
  FoldPlan plan;
  plan_fold(call, kernel.lanes, plan);
  const std::size_t patches = plan.patches(), values = call.channels * plan.values();
  split_fold(plan, values * sizeof(double) + patches * 12);
  const std::size_t count = plan.tasks.size();
  const auto whole = allocate<std::int32_t>(patches);
  const auto rest = allocate<float>(patches);
  std::fill_n(whole.get(), patches, 0);
  std::fill_n(rest.get(), patches, -1e30f);
  normalise_fold(plan, kernel, [&](int i, int j, std::size_t q, double units) {
    split_normaliser(units, plan.scale, whole[q], rest[q]);
    call.log_z[i * plan.cell.patch_cols() + j] = units * plan.scale;
  });
  if (is_stopped(*call.control)) return;
  const auto scratch = plan.scratch(kernel.fold_scratch_bytes(plan.cell));
  const auto folds = allocate<double>(count * values);
  std::fill_n(folds.get(), count * values, 0.0);
  for_each_unit(plan, [&](int worker, std::size_t t, const FoldUnit& unit) {
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
