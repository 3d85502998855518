// What the passes of a fold share: a query crop in the layout of the kernel, and tasks. Tasks are
// within a block of the bank (see blocks.hpp), and their results are merged in order, so that those of a
// block depend neither on the number of threads nor on the other blocks of the process. Included by
// library.cpp.
#pragma once

#include "fold_problem.hpp"

namespace {

using namespace els;

constexpr std::size_t kLeastSeeded = 8;  // tasks of a block whose maxima are started together

struct FoldPlan {
  FoldCell cell{};
  std::vector<FoldSource> sources;
  std::vector<std::vector<FoldUnit>> tasks;
  std::vector<std::size_t> blocks;  // block b has tasks [blocks[b], blocks[b + 1])
  std::vector<Buffer<float>> kept;
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

// Split images × horizontal displacements of each block into equal runs, at most `parts` of them.
void split_fold(FoldPlan& plan, const std::int64_t* block_sources, std::int64_t blocks, int parts) {
  plan.blocks.assign(1, 0);
  for (std::int64_t b = 0; b < blocks; ++b) {
    const FoldSource* first = plan.sources.data() + block_sources[b];
    const FoldSource* last = plan.sources.data() + block_sources[b + 1];
    std::int64_t units = 0;
    for (const FoldSource* source = first; source < last; ++source)
      units += (source->hi - source->lo) * source->shifts;
    const std::int64_t count = std::min<std::int64_t>(units, parts);
    const std::size_t before = plan.tasks.size();
    plan.tasks.resize(before + count);
    plan.blocks.push_back(plan.tasks.size());
    std::int64_t index = 0;  // of the first unit of an image
    for (const FoldSource* source = first; source < last; ++source)
      for (std::int64_t n = source->lo; n < source->hi; ++n, index += source->shifts)
        for (std::int64_t dx = 0; dx < source->shifts;) {
          const std::int64_t task = (index + dx) * count / units;
          const std::int64_t end = ((task + 1) * units + count - 1) / count - index;
          const std::int64_t to = std::min<std::int64_t>(source->shifts, std::max(dx + 1, end));
          plan.tasks[before + task].push_back({source, n, int(dx), int(to)});
          dx = to;
        }
  }
  const std::int64_t most = std::max<std::int64_t>(1, plan.tasks.size());
  plan.threads = int(std::max<std::int64_t>(1, std::min<std::int64_t>(plan.threads, most)));
}

// Call work(worker, task, unit) for every unit of every task, in order within a task.
template <class Work>
void for_each_unit(const FoldPlan& plan, Work work) {
  for_each(plan.tasks.size(), plan.threads, *plan.control, [&](int worker, std::size_t t) {
    for (const FoldUnit& unit : plan.tasks[t])
      if (!is_stopped(*plan.control)) work(worker, t, unit);
  });
}

// The sum in bits of several normalisers of one patch: peaks in units, and totals relative to them.
struct FoldNormal {
  std::uint32_t top = 0;  // above the lowest unit
  double total = 0;

  template <class At>
  FoldNormal(std::int64_t lowest, double scale, std::size_t count, At at) {
    const auto low = std::uint32_t(lowest);
    for (std::size_t t = 0; t < count; ++t)
      if (at(t).total > 0) top = std::max(top, std::uint32_t(at(t).peak) - low);
    for (std::size_t t = 0; t < count; ++t) {
      const double below = double(top) - double(std::uint32_t(at(t).peak) - low);
      if (at(t).total > 0) total += at(t).total * std::exp2(-below * scale);
    }
  }
};

struct FoldPart {
  std::int32_t peak;
  double total;
};

// A normaliser in units, as FoldNormaliser has it.
void split_normaliser(double units, double scale, std::int32_t& whole, float& rest) {
  const double down = std::floor(units);
  whole = std::int32_t(std::uint32_t(std::int64_t(down)));
  rest = float((down - units) * scale);
}

// Start the maxima of the tasks of a block at those of one displacement: to raise a maximum costs as
// much as a hundred logits. Of each block by itself, as its results must not depend on others.
void seed_peaks(const FoldPlan& plan, const Kernel& kernel, const std::vector<Buffer<char>>& scratch,
                std::int32_t* peaks, double* totals) {
  const std::size_t patches = plan.patches();
  for_each(plan.blocks.size() - 1, plan.threads, *plan.control, [&](int worker, std::size_t b) {
    const std::size_t first = plan.blocks[b], last = plan.blocks[b + 1];
    if (last - first < kLeastSeeded) return;
    FoldUnit unit = plan.tasks[first].front();
    unit.last = unit.first + 1;
    std::int32_t* seeds = peaks + first * patches;
    kernel.fold_normalise(plan.cell, unit, *plan.control, scratch[worker].get(),
                          {seeds, totals + first * patches});
    std::fill_n(totals + first * patches, patches, 0.0);
    for (std::size_t t = first + 1; t < last; ++t)
      std::copy_n(seeds, patches, peaks + t * patches);
  });
}

}  // namespace
