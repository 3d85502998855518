// The planner of patch attention. Included by library.cpp.
//
// A task is one query and one chunk of a block of the bank, or a part of one. Blocks and chunks depend
// on the bank and on the range, not on the batch or the number of threads, and results are merged in
// order, those of a block first, so they are batch invariant. Tasks of one chunk are consecutive, so
// that its tiles are still in the cache for the next query, or taken in groups by a kernel for which work
// on the chunk serves several queries.
#pragma once

#include "merge.hpp"

namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr std::size_t kPartialBytes = std::size_t(24) << 20;  // of partial results at a time
constexpr std::size_t kPiece = 64;  // pixels that are merged by one thread
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
// one block of the bank, see Partial; rows are in the order of the images, then of the blocks.
struct ElsCall {
  std::int32_t kernel;  // index as in els_kernel_name
  std::int32_t threads;
  const float* bank;     // packed
  const double* centre;  // [C], what was subtracted from the bank, as float
  std::int64_t images;
  std::int32_t channels, height, width;
  std::int32_t sources, padding, whole;
  ElsBlocks blocks;
  std::int64_t batch;
  const float* x;           // [B][C][H][W]
  const double* a;          // [B]
  const double* s;          // [B]
  const std::int64_t* window;  // [B]
  const std::int64_t* ranges;  // [B][2], of the whole bank
  float* const* row_peaks;   // [rows]: [H][W] each; result of els_sums, argument of els_merge
  double* const* row_sums;   // [rows]: [1 + C][H][W] each
  float* mean;              // [B][C][H][W]; results, but of els_sums
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
  std::vector<Run> runs;
  Tasks tasks;
  std::size_t slot;  // of its first partial result
};

Prepared prepare(const ElsCall& call, const Bank& bank, const Geometry& geometry, int lanes,
                 std::int64_t b) {
  const std::size_t pixels = bank.pixels(), values = bank.channels * pixels;
  const double a = call.a[b], s = call.s[b];
  Prepared out{{}, allocate<float>(values), allocate<double>(values), allocate<double>(pixels), {}, {}, 0};
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
  out.tasks = plan_tasks(bank, geometry, window, call.blocks, lo, hi, lanes);
  return out;
}

// The answer of `count` pixels: their rows, merged in the order of the blocks.
void merge_rows(const ElsCall& call, const Bank& bank, const double* energy, std::int64_t b,
                const Partial* rows, int number, std::size_t u, int count) {
  const std::size_t pixels = bank.pixels();
  Doubles weight = {};
  // More than 16 sums are merged 16 at a time; the weight is the first of them.
  for (int from = 0; from <= bank.channels; from += kMostSums) {
    const int sums = std::min(kMostSums, bank.channels + 1 - from);
    const Floats peak = merge_pixels(
        rows, number, u, count, pixels, from, sums, [&](int v, const Doubles& sum) {
          if (v == 0) {
            weight = sum;
            return;
          }
          float* mean = call.mean + (b * bank.channels + v - 1) * pixels + u;
          const Doubles centred = sum / weight + double(float(call.centre[v - 1]));
          store_pixels(__builtin_convertvector(centred, Floats), count, mean);
        });
    for (int k = 0; k < count && from == 0; ++k)
      call.log_evidence[b * pixels + u + k] =
          float((double(peak[k]) + std::log2(weight[k])) / kLog2E - energy[u + k]);
  }
}

// Boundaries of groups of consecutive tasks of one share: at most `most` tasks each, or one.
template <class ShareOf>
std::vector<std::size_t> groups_of(std::size_t tasks, std::size_t most, ShareOf share_of) {
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
  const std::size_t pixels = bank.pixels(), sums = (1 + bank.channels) * pixels;
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
  const auto peaks = allocate<float>(count * pixels);
  const auto totals = allocate<double>(count * sums);
  std::vector<Partial> partials(count);
  for (std::size_t i = 0; i < count; ++i)
    partials[i] = {peaks.get() + i * pixels, totals.get() + i * sums};
  const std::vector<std::size_t> groups = groups_of(
      tasks.size(), std::min<std::size_t>(kernel.queries(bank, geometry), tasks.size() / threads),
      [&](std::size_t i) { return share_of(tasks[i]); });
  for_each(groups.size() - 1, threads, *call.control, [&](int worker, std::size_t g) {
    Query queries[kMostQueries];
    Partial out[kMostQueries];
    int together = 0;
    for (std::size_t i = groups[g]; i < groups[g + 1]; ++i, ++together) {
      const Prepared& image = images[tasks[i].image];
      queries[together] = image.query;
      queries[together].lo = image.runs[tasks[i].run].lo;
      queries[together].hi = image.runs[tasks[i].run].hi;
      out[together] = partials[tasks[i].slot];
    }
    kernel.attend(bank, geometry, queries, together, share_of(tasks[groups[g]]), *call.control,
                  scratch[worker].get(), out);
  });

  // A row of one task is its result, where rows are merged here.
  const bool here = call.row_peaks == nullptr;
  const bool rows_here = here && count > rows_count;
  const auto row_peaks = allocate<float>(rows_here ? rows_count * pixels : 0);
  const auto row_sums = allocate<double>(rows_here ? rows_count * sums : 0);
  std::vector<std::vector<Partial>> rows(images.size());
  for (std::size_t i = 0, row = 0; i < images.size(); ++i)
    for (std::size_t r = 0; r < images[i].runs.size(); ++r, ++row)
      if (!here)
        rows[i].push_back({call.row_peaks[first_row + row], call.row_sums[first_row + row]});
      else if (counts[i][r] == 1)
        rows[i].push_back(partials[slots[i][r]]);
      else
        rows[i].push_back({row_peaks.get() + row * pixels, row_sums.get() + row * sums});
  const std::size_t pieces = (pixels + kPiece - 1) / kPiece;
  for_each(images.size() * pieces, threads, *call.control, [&](int, std::size_t t) {
    const std::size_t i = t / pieces, begins = t % pieces * kPiece;
    const std::size_t ends = std::min(pixels, begins + kPiece);
    const int runs = int(images[i].runs.size());
    const int* own = counts[i].data();
    for (std::size_t u = begins; u < ends; u += kTogether) {
      const int some = int(std::min<std::size_t>(kTogether, ends - u));
      if (here && runs == 1) {
        // The same bits as by way of a row.
        merge_rows(call, bank, images[i].energy.get(), begin + std::int64_t(i),
                   &partials[slots[i][0]], own[0], u, some);
        continue;
      }
      for (int r = 0; r < runs; ++r)
        if (!here || own[r] > 1)
          merge_block(bank, &partials[slots[i][r]], own[r], u, some, rows[i][r]);
      if (here)
        merge_rows(call, bank, images[i].energy.get(), begin + std::int64_t(i), rows[i].data(),
                   runs, u, some);
    }
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
      rows += images.back().runs.size();
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
  std::size_t row = 0;
  // Threads cost as much as some thousand numbers.
  const std::size_t numbers = bank.pixels() * (2 + bank.channels);
  for (std::int64_t b = 0; b < call.batch; ++b) {
    const Prepared image = prepare(call, bank, geometry, kernel.lanes, b);
    std::vector<Partial> rows;
    for (std::size_t r = 0; r < image.runs.size(); ++r, ++row)
      rows.push_back({call.row_peaks[row], call.row_sums[row]});
    const std::size_t most = 1 + rows.size() * numbers / kMergedAlone;
    const int threads = int(std::min<std::size_t>(most, std::max(1, int(call.threads))));
    const std::size_t pixels = bank.pixels(), pieces = (pixels + kPiece - 1) / kPiece;
    for_each(pieces, threads, *call.control, [&](int, std::size_t i) {
      const std::size_t end = std::min(pixels, (i + 1) * kPiece);
      for (std::size_t u = i * kPiece; u < end; u += kTogether)
        merge_rows(call, bank, image.energy.get(), b, rows.data(), int(rows.size()), u,
                   int(std::min<std::size_t>(kTogether, end - u)));
    });
  }
}

}  // namespace

