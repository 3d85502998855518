// The planner of patch attention. Included by library.cpp.
//
// A task is one query and one chunk of a block of the bank, or a part of one. Blocks and chunks depend
// on the bank and on the range, not on the batch or the number of threads, and results are merged in
// order, those of a block first, so they are batch invariant. Tasks of one chunk are consecutive, so
// that its tiles are still in the cache for the next query, or taken in groups by a kernel for which work
// on the chunk serves several queries.
#pragma once

#include "blocks.hpp"

namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr std::size_t kPartialBytes = std::size_t(24) << 20;  // of partial results at a time
constexpr std::size_t kMergedAlone = std::size_t(1) << 17;  // numbers of rows merged by one thread

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

// Arguments from binding.py: the same fields in the same order. A row is the sums of one image over
// one block of the bank, or one group of blocks, see Partial; rows are in the order of the images, then
// of groups, then of blocks.
struct ElsCall {
  std::int32_t kernel;  // index as in els_kernel_name
  std::int32_t threads;
  const float* bank;     // packed
  const double* centre;  // [C], what was subtracted from the bank, as float
  std::int64_t images;
  std::int32_t channels, height, width;
  std::int32_t sources, padding, whole;
  ElsBlocks blocks;
  std::int32_t grouped;  // whether a row is of a group, of which the process has all blocks
  std::int64_t batch;
  const float* x;           // [B][C][H][W]
  const double* a;          // [B]
  const double* s;          // [B]
  const std::int64_t* window;  // [B]
  const std::int64_t* ranges;  // [B][2], of the whole bank
  float* const* row_peaks;   // [rows]: [H][W] each; null, result of els_attend or argument of els_merge
  double* const* row_sums;   // [rows]: [1 + C][H][W] each
  float* mean;              // [B][C][H][W]; results where there are no rows, and of els_merge
  float* log_evidence;      // [B][H][W]
  els::Control* control;
};
}

namespace {

struct Prepared {
  Query query;
  Buffer<float> scaled;
  Buffer<double> exact;
  Buffer<double> energy;
  std::vector<Run> runs;            // by group
  std::vector<std::size_t> groups;  // begins of groups of runs, and the end
  Tasks tasks;
  std::size_t slot;  // of its first partial result
};

Prepared prepare(const ElsCall& call, const Bank& bank, const Geometry& geometry, int lanes,
                 std::int64_t b) {
  const std::size_t pixels = bank.pixels(), values = bank.channels * pixels;
  const double a = call.a[b], s = call.s[b];
  Prepared out{{}, allocate<float>(values), allocate<double>(values), allocate<double>(pixels), {}, {}, {}, 0};
  std::vector<double> squares(pixels, 0.0);
  for (std::size_t v = 0; v < values; ++v) {
    const double q = double(call.x[b * values + v]) - a * call.centre[v / pixels];
    out.exact[v] = q * (a / s / s * kLog2E);
    out.scaled[v] = float(out.exact[v]);
    squares[v % pixels] += q * q;
  }
  const int window = int(call.window[b]);
  energies(bank, geometry, squares.data(), window, 1.0 / (2.0 * s * s), out.energy.get());
  const std::int64_t lo = call.ranges[2 * b], hi = call.ranges[2 * b + 1];
  const double bias = -(a / s) * (a / s) * kLog2E / 2.0;
  out.query = {out.scaled.get(), float(bias), window, 0, 0, out.exact.get(), bias};
  out.runs = runs_of(call.blocks, lo, hi, lanes);
  std::stable_sort(out.runs.begin(), out.runs.end(),
                   [](const Run& left, const Run& right) { return left.group < right.group; });
  for (std::size_t r = 0; r < out.runs.size(); ++r)
    if (r == 0 || out.runs[r].group != out.runs[r - 1].group) out.groups.push_back(r);
  out.groups.push_back(out.runs.size());
  out.tasks = plan_tasks(bank, geometry, window, call.blocks, lo, hi, lanes);
  return out;
}

// Call work(u, count) for piece `index` of the pixels of an image.
template <class Work>
void on_piece(std::size_t pixels, std::size_t index, Work work) {
  const std::size_t u = index * kPiece;
  work(u, int(std::min(kPiece, pixels - u)));
}

std::size_t row_count(const ElsCall& call, const Prepared& image) {
  return call.grouped ? image.groups.size() - 1 : image.runs.size();
}

// The answer of `count` pixels from their sums over the whole range.
void answer(const ElsCall& call, const Bank& bank, const double* energy, std::int64_t b,
            const Partial& row, std::size_t u, int count) {
  const std::size_t pixels = bank.pixels();
  for (int c = 0; c < bank.channels; ++c) {
    const double centre = float(call.centre[c]);
    float* mean = call.mean + (b * bank.channels + c) * pixels;
    for (std::size_t k = u; k < u + count; ++k)
      mean[k] = float(row.sums[(1 + c) * pixels + k] / row.sums[k] + centre);
  }
  for (std::size_t k = u; k < u + count; ++k)
    call.log_evidence[b * pixels + k] =
        float((double(row.peak[k]) + std::log2(row.sums[k])) / kLog2E - energy[k]);
}

// A row for each of several images.
struct RowBuffer {
  Buffer<float> peaks;
  Buffer<double> sums;
  std::size_t pixels, values;

  RowBuffer(const Bank& bank, std::size_t count)
      : peaks(allocate<float>(count * bank.pixels())),
        sums(allocate<double>(count * (1 + bank.channels) * bank.pixels())),
        pixels(bank.pixels()),
        values((1 + bank.channels) * bank.pixels()) {}

  Partial operator[](std::size_t i) const {
    return {peaks.get() + i * pixels, sums.get() + i * values};
  }
};

// Boundaries of stretches of consecutive tasks of one share: at most `most` tasks each, or one.
template <class ShareOf>
std::vector<std::size_t> stretches_of(std::size_t tasks, std::size_t most, ShareOf share_of) {
  std::vector<std::size_t> begins;
  for (std::size_t i = 0; i < tasks; ++i)
    if (begins.empty() || i - begins.back() >= most || !(share_of(i) == share_of(begins.back())))
      begins.push_back(i);
  begins.push_back(tasks);
  return begins;
}

struct Task {
  std::int64_t image;
  int run, index;  // its partial result: that of the run's first, plus the index
  std::size_t slot;
};

// Sums of images [begin, end) over every run, and what is done with them: rows are merged if there are
// no addresses for them.
void attend_some(const ElsCall& call, const Kernel& kernel, const Bank& bank,
                 const Geometry& geometry, std::vector<Prepared>& images, std::int64_t begin,
                 std::size_t first_row, std::vector<Buffer<float>>& scratch) {
  const std::size_t pixels = bank.pixels();
  const int threads = int(scratch.size());
  std::vector<Task> tasks;
  std::vector<std::vector<std::size_t>> slots(images.size());  // of each run's first result
  std::vector<std::vector<int>> counts(images.size());         // of each run's results
  std::size_t count = 0, rows_count = 0;
  for (std::size_t i = 0; i < images.size(); ++i)
    for (std::size_t r = 0; r < images[i].runs.size(); ++r, ++rows_count) {
      slots[i].push_back(count);
      const int own = images[i].tasks.count(images[i].runs[r]);
      counts[i].push_back(own);
      for (int k = 0; k < own; ++k) tasks.push_back({std::int64_t(i), int(r), k, count + k});
      count += own;
    }
  auto share_of = [&](const Task& task) {
    const Prepared& image = images[task.image];
    return image.tasks.share(image.runs[task.run], task.index);
  };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& left, const Task& right) {
    return share_of(left).first < share_of(right).first;
  });
  const RowBuffer results(bank, count);
  std::vector<Partial> partials(count);
  for (std::size_t i = 0; i < count; ++i) partials[i] = results[i];
  const std::vector<std::size_t> stretches = stretches_of(
      tasks.size(), std::min<std::size_t>(kernel.queries(bank, geometry), tasks.size() / threads),
      [&](std::size_t i) { return share_of(tasks[i]); });
  for_each(stretches.size() - 1, threads, *call.control, [&](int worker, std::size_t g) {
    Query queries[kMostQueries];
    Partial out[kMostQueries];
    int together = 0;
    for (std::size_t i = stretches[g]; i < stretches[g + 1]; ++i, ++together) {
      const Prepared& image = images[tasks[i].image];
      queries[together] = image.query;
      queries[together].lo = image.runs[tasks[i].run].lo;
      queries[together].hi = image.runs[tasks[i].run].hi;
      out[together] = partials[tasks[i].slot];
    }
    kernel.attend(bank, geometry, queries, together, share_of(tasks[stretches[g]]), *call.control,
                  scratch[worker].get(), out);
  });

  const bool here = call.row_peaks == nullptr;
  const RowBuffer own_blocks(bank, count > rows_count ? rows_count : 0);
  const RowBuffer own_groups(bank, here ? images.size() * kGroups : 0);
  const RowBuffer answers(bank, here ? images.size() : 0);
  std::vector<std::vector<Partial>> blocks(images.size()), groups(images.size());
  for (std::size_t i = 0, block = 0; i < images.size(); ++i) {
    for (std::size_t r = 0; r < images[i].runs.size(); ++r, ++block)
      blocks[i].push_back(counts[i][r] > 1 ? own_blocks[block] : partials[slots[i][r]]);
    const std::size_t rows = row_count(call, images[i]);
    for (std::size_t row = 0; row < rows; ++row, ++first_row)
      groups[i].push_back(here ? own_groups[i * kGroups + row]
                               : Partial{call.row_peaks[first_row], call.row_sums[first_row]});
  }
  const std::size_t pieces = (pixels + kPiece - 1) / kPiece;
  for_each(images.size() * pieces, threads, *call.control, [&](int, std::size_t t) {
    const std::size_t i = t / pieces;
    on_piece(pixels, t % pieces, [&](std::size_t u, int some) {
      for (std::size_t r = 0; r < blocks[i].size(); ++r)
        if (counts[i][r] > 1)
          kernel.merge(bank, &partials[slots[i][r]], counts[i][r], u, some, blocks[i][r]);
      const std::vector<std::size_t>& begins = images[i].groups;
      for (std::size_t row = 0; row < groups[i].size(); ++row) {
        const std::size_t first = call.grouped ? begins[row] : row;
        const std::size_t last = call.grouped ? begins[row + 1] : row + 1;
        kernel.merge(bank, &blocks[i][first], int(last - first), u, some, groups[i][row]);
      }
      if (!here) return;
      kernel.merge(bank, groups[i].data(), int(groups[i].size()), u, some, answers[i]);
      answer(call, bank, images[i].energy.get(), begin + std::int64_t(i), answers[i], u, some);
    });
  });
}

void attend(const ElsCall& call, const Kernel& kernel) {
  const Bank bank = {call.bank, call.images, call.channels, call.height, call.width};
  const Geometry geometry = {Sources(call.sources), Padding(call.padding), call.whole != 0};
  const std::size_t pixels = bank.pixels(), sums = (1 + bank.channels) * pixels;
  const std::size_t partial_bytes = pixels * sizeof(float) + sums * sizeof(double);
  const int threads = std::max(1, int(call.threads));
  std::vector<Buffer<float>> scratch;
  for (int i = 0; i < threads; ++i) scratch.push_back(allocate<float>(kernel.scratch_floats(bank, geometry)));

  std::size_t row = 0;
  for (std::int64_t begin = 0; begin < call.batch && !is_stopped(*call.control);) {
    // As many images as the memory for partial results allows, at least one.
    std::vector<Prepared> images;
    std::size_t slots = 0, rows = 0;
    std::int64_t end = begin;
    while (end < call.batch && (images.empty() || slots * partial_bytes < kPartialBytes)) {
      images.push_back(prepare(call, bank, geometry, kernel.lanes, end++));
      for (const Run& run : images.back().runs) slots += images.back().tasks.count(run);
      rows += row_count(call, images.back());
    }
    attend_some(call, kernel, bank, geometry, images, begin, row, scratch);
    row += rows;
    begin = end;
  }
}

// Answers from the rows of a whole bank.
void merge(const ElsCall& call, const Kernel& kernel) {
  const Bank bank = {nullptr, call.images, call.channels, call.height, call.width};
  const Geometry geometry = {Sources(call.sources), Padding(call.padding), call.whole != 0};
  const RowBuffer own_groups(bank, call.grouped ? 0 : kGroups), whole(bank, 1);
  std::size_t row = 0;
  // Threads cost as much as some thousand numbers.
  const std::size_t numbers = bank.pixels() * (2 + bank.channels);
  for (std::int64_t b = 0; b < call.batch; ++b) {
    const Prepared image = prepare(call, bank, geometry, kernel.lanes, b);
    std::vector<Partial> rows, groups;
    for (std::size_t end = row + row_count(call, image); row < end; ++row)
      rows.push_back({call.row_peaks[row], call.row_sums[row]});
    for (std::size_t g = 0; g + 1 < image.groups.size(); ++g)
      groups.push_back(call.grouped ? rows[g] : own_groups[g]);
    const std::size_t most = 1 + rows.size() * numbers / kMergedAlone;
    const int threads = int(std::min<std::size_t>(most, std::max(1, int(call.threads))));
    const std::size_t pixels = bank.pixels(), pieces = (pixels + kPiece - 1) / kPiece;
    for_each(pieces, threads, *call.control, [&](int, std::size_t i) {
      on_piece(pixels, i, [&](std::size_t u, int some) {
        for (std::size_t g = 0; g < groups.size() && !call.grouped; ++g)
          kernel.merge(bank, &rows[image.groups[g]], int(image.groups[g + 1] - image.groups[g]), u,
                       some, groups[g]);
        kernel.merge(bank, groups.data(), int(groups.size()), u, some, whole[0]);
        answer(call, bank, image.energy.get(), b, whole[0], u, some);
      });
    });
  }
}

}  // namespace

