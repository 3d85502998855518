// Moments of a fold: the sweeps of fold.hpp with other sums.
//
// The posterior of a pixel is the plane A of weights, filtered by the taps of the fold, so that each pair
// of a pixel and a source is met once and its sums are those of any posterior. A Jacobian product has a
// scalar c for each pair of patches, the plane ⟨direction, φ⟩ filtered over the patch, and what is
// filtered then are the weights w·(c - mean of c): for Jᵀ the first filter is the fold and the second
// the box, for J the other way round.
#pragma once

#include "fold.hpp"

namespace {

using els::FoldMoments;
using els::FoldMomentSums;
using els::FoldPass;
using els::FoldRanking;

constexpr int kMomentRows = 2;  // displacements worked on together

struct FoldMomentScratch : FoldScratch {
  float* inner;     // [kMomentRows][window][vectors] vectors: ⟨direction, e⟩ of rows of pixels
  float* along;     // [vectors + window] vectors: the same, filtered along rows
  float* scalars;   // [vectors] vectors
  float* filtered;  // [kMomentRows][vectors] vectors
  float* totals;    // [patch_rows][vectors][2] vectors

  FoldMomentScratch(const FoldCell& cell, FoldPass pass, char* memory)
      : FoldScratch(cell, els::fold_planes(pass, cell.channels), memory) {
    const std::size_t row = std::size_t(cell.vectors) * kLanes * sizeof(float);
    inner = take<float>(memory, kMomentRows * cell.window * row);
    along = take<float>(memory, row + std::size_t(cell.window) * kLanes * sizeof(float));
    scalars = take<float>(memory, row);
    filtered = take<float>(memory, kMomentRows * row);
    totals = take<float>(memory, pass == FoldPass::kTotals ? 2 * cell.patch_rows() * row : 0);
  }
};

// Where a block of displacements is, and what it adds to.
struct FoldMomentTask {
  const FoldCell& cell;
  const FoldKeys& keys;
  const FoldMoments& moments;
  FoldMomentScratch& scratch;
  FoldRanking* ranking;
  std::int64_t code;  // of displacement 0 of rows, see FoldRanking
  double* share;
};

// Insert the sources of a vector that exceed the least of their pixels' lists. Rare.
[[gnu::noinline, gnu::cold]] inline void rank_sources(const FoldRanking& ranking, std::size_t place,
                                                      const float* weights, std::int64_t code) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const float weight = weights[lane];
    if (!(weight > ranking.least[place + lane])) continue;
    float* listed = ranking.weights + (place + lane) * ranking.top;
    std::int64_t* codes = ranking.codes + (place + lane) * ranking.top;
    int at = ranking.top - 1;
    for (; at > 0 && listed[at - 1] < weight; --at)
      listed[at] = listed[at - 1], codes[at] = codes[at - 1];
    listed[at] = weight, codes[at] = code;
    ranking.least[place + lane] = listed[ranking.top - 1];
  }
}

// The scalars of row i of patches, for displacement `d` of a block; rows of pixels from `known` on are
// not in the ring yet.
template <int C>
[[gnu::noinline]] void scalar_row(const FoldMomentTask& task, int dy, int d, int i, int& known) {
  const FoldCell& cell = task.cell;
  FoldMomentScratch& scratch = task.scratch;
  const int K = cell.vectors, k = cell.window, channels = C > 0 ? C : cell.channels;
  const std::size_t row = task.keys.row, plane = cell.rows * row;
  float* ring = scratch.inner + d * k * row;
  for (int t = most(known, i); t < i + k; ++t) {
    const float* direction = task.moments.direction + t * row;
    const float* offset = task.moments.offset + t * row;
    const float* near = scratch.keys + (t + dy + d + kMostRows) * row;
    float* to = ring + t % k * row;
    for (int v = 0; v < K; ++v) {
      const std::size_t at = std::size_t(v) * kLanes;
      Vec sum = -load(offset + at);
      for (int c = 0; c < channels; ++c)
        sum += load(direction + c * plane + at) * load(near + c * task.keys.plane + at);
      store(to + at, sum);
    }
  }
  known = i + k;
  const FoldTaps& taps = task.moments.inner;
  for (int o = 0; o < k; ++o) {
    scratch.lines[o] = ring + (i + o) % k * row;
    scratch.taps[o] = taps.rows[(i + o) * k + o];
  }
  const float* row_taps = scratch.taps;
  const float* const* lines = scratch.lines;
  float* along = scratch.along;
  filter(K, k, [=](int o, int) { return splat(row_taps[o]); }, [=](int o) { return lines[o]; },
         [=](int v, Vec sum) { store(along + v * kLanes, sum); });
  for (int v = 0; v < k - 1; ++v)
    store(along + (K + v) * kLanes, next_lane(load(along + v * kLanes)));
  float* scalars = scratch.scalars;
  filter_columns<true>(cell, taps, along, [=](int v, Vec sum) { store(scalars + v * kLanes, sum); });
}

// Weights of row i of patches from their logits, into `to`, and the sums of the patches.
template <FoldPass P>
[[gnu::always_inline]] inline void weigh_row(const FoldMomentTask& task, int i, float* to) {
  FoldMomentScratch& scratch = task.scratch;
  const std::size_t row = task.keys.row;
  Vec share = {};
  for (int v = 0; v < task.cell.vectors; ++v) {
    const std::size_t at = std::size_t(v) * kLanes;
    Vec weight = exp2(load(scratch.logits + at));
    if (P == FoldPass::kStatistics) share += weight * load(task.moments.reach + i * row + at);
    if (P != FoldPass::kStatistics) {
      const Vec scalar = load(scratch.scalars + at) - load(task.moments.mean + i * row + at) -
                         load(task.moments.mean_rest + i * row + at);
      if (P == FoldPass::kTotals) {
        float* total = scratch.totals + 2 * (i * row + at);
        store(total, load(total) + weight);
        store(total + kLanes, load(total + kLanes) + weight * scalar);
      } else {
        weight *= scalar;
      }
    }
    store(to + at, weight);
  }
  if (P == FoldPass::kStatistics) *task.share += double(lane_sum(share));
}

// Add filtered weights to the sums of pixel row i, for `D` displacements from dy + first on: what is
// dear here is to load and store the sums.
template <FoldPass P, int C, int D>
[[gnu::always_inline]] inline void add_sources(const FoldMomentTask& task, int dy, int first, int i) {
  const FoldCell& cell = task.cell;
  const int K = cell.vectors, channels = C > 0 ? C : cell.channels;
  const int planes = els::fold_planes(P, channels);
  const std::size_t row = task.keys.row, plane = cell.rows * row;
  const std::size_t place = (i - task.moments.first_row) * row;
  const float* reference = task.moments.reference + i * row;
  const float* filtered = task.scratch.filtered + first * row;
  const float* near = task.scratch.keys + (i + dy + first + kMostRows) * row;
  float* sums = task.scratch.sums + place * planes;
  const FoldRanking* ranking = P == FoldPass::kStatistics ? task.ranking : nullptr;
  for (int v = 0; v < K; ++v) {
    const std::size_t at = std::size_t(v) * kLanes;
    Vec weight[D];
#pragma GCC unroll 2
    for (int d = 0; d < D; ++d) weight[d] = load(filtered + d * row + at);
    if (ranking != nullptr) {
#pragma GCC unroll 2
      for (int d = 0; d < D; ++d)
        if (__builtin_expect(any_above(weight[d] - load(ranking->least + place + at), 0.0f), 0))
          rank_sources(*ranking, place + at, filtered + d * row + at, task.code + dy + first + d);
    }
    if (P != FoldPass::kProduct) {
      store(sums, load(sums) + (D == 2 ? weight[0] + weight[D - 1] : weight[0]));
      sums += kLanes;
    }
    if (P == FoldPass::kStatistics) {
      Vec surprise = load(sums);
#pragma GCC unroll 2
      for (int d = 0; d < D; ++d) surprise += weight[d] * log2(weight[d]);
      store(sums, surprise);
      sums += kLanes;
    }
    for (int c = 0; c < channels; ++c) {
      const Vec origin = load(reference + c * plane + at);
      Vec first_moment = load(sums), second = {};
      if (P == FoldPass::kStatistics) second = load(sums + kLanes);
#pragma GCC unroll 2
      for (int d = 0; d < D; ++d) {
        const Vec e = load(near + c * task.keys.plane + d * row + at) - origin;
        const Vec weighted = weight[d] * e;
        first_moment += weighted;
        if (P == FoldPass::kStatistics) second += weighted * e;
      }
      store(sums, first_moment);
      sums += kLanes;
      if (P == FoldPass::kStatistics) store(sums, second), sums += kLanes;
    }
  }
}

// Filter the weights of row i of pixels, for displacement `d` of a block; one for all passes.
[[gnu::noinline]] void filter_moments(const FoldCell& cell, const FoldTaps& taps, int i, int d,
                                      int slot, FoldMomentScratch& scratch) {
  const int count = gather_rows(cell, taps, i, d, slot, scratch);
  float* filtered = scratch.filtered + std::size_t(d) * cell.vectors * kLanes;
  filter_row(cell, taps, count, scratch,
             [=](int v, Vec weight) { store(filtered + v * kLanes, weight); });
}

template <FoldPass P, int C, int N>
[[gnu::noinline]] void moment_block(const FoldMomentTask& task, int dy) {
  const FoldCell& cell = task.cell;
  const FoldMoments& moments = task.moments;
  FoldMomentScratch& scratch = task.scratch;
  const FoldBlock<N> block(cell, task.keys, dy);
  if (block.first >= block.last) return;
  const int K = cell.vectors, k = cell.window;
  const std::size_t row = task.keys.row, length = (K + k) * kLanes;
  const FoldTaps& taps = P == FoldPass::kProduct ? moments.outer : cell.taps;
  start_block(cell, N, scratch);
  int last_live[N], known[N];
  for (int d = 0; d < N; ++d) last_live[d] = -k - 1, known[d] = 0;
  std::memset(scratch.live, 0, N * k);
  for (int t = block.first, slot = 0; t < block.last + 2 * (k - 1);
       ++t, slot = slot + 1 < k ? slot + 1 : 0) {
    if (t < block.last + k - 1) advance_products<C, N>(cell, task.keys, dy, t, slot, scratch);
    const int i = t - k + 1;
    if (i < block.first) continue;
    bool reached[N] = {};
    for (int d = 0; d < N; ++d) {
      scratch.live[d * k + slot] = false;
      if (block.has(d, i)) {
        const Vec top = row_logits(cell, scratch.columns + d * length,
                                   scratch.bias + (i + dy + d) * row, moments.z.whole + i * row,
                                   scratch.rest + i * row, scratch.logits);
        if (any_above(top, -cell.dead)) {
          if (P != FoldPass::kStatistics) scalar_row<C>(task, dy, d, i, known[d]);
          weigh_row<P>(task, i, scratch.weights + (d * k + slot) * row);
          scratch.live[d * k + slot] = true;
          last_live[d] = i;
        }
      }
      if (i - last_live[d] >= k || i < moments.first_row || i >= moments.last_row) continue;
      filter_moments(cell, taps, i, d, slot, scratch);
      reached[d] = true;
    }
    for (int d = 0; d < N; d += 2) {
      const bool one = reached[d], other = d + 1 < N && reached[least(d + 1, N - 1)];
      if (one && other)
        add_sources<P, C, 2>(task, dy, d, i);
      else if (one || other)
        add_sources<P, C, 1>(task, dy, one ? d : d + 1, i);
    }
  }
}

// Add float sums to sums in double precision, and clear them.
inline void flush_sums(std::size_t count, float* sums, double* out) {
  for (std::size_t i = 0; i < count; ++i) out[i] += double(sums[i]), sums[i] = 0.0f;
}

// The blocks of a pass over a number of channels. What calls them is compiled once for all of them.
struct MomentBlocks {
  void (*one)(const FoldMomentTask&, int);
  void (*several)(const FoldMomentTask&, int);
};

template <FoldPass P>
MomentBlocks moment_blocks(int channels) {
  return by_channels(channels, [](auto c) {
    return MomentBlocks{moment_block<P, c.value, 1>, moment_block<P, c.value, kMomentRows>};
  });
}

void fold_moments_of(const FoldCell& cell, FoldPass pass, const MomentBlocks& blocks,
                     const FoldUnit& unit, Control& control, char* memory,
                     const FoldMoments& moments, FoldMomentSums out) {
  FoldMomentScratch scratch(cell, pass, memory);
  const std::size_t row = std::size_t(cell.vectors) * kLanes;
  const std::size_t planes = els::fold_planes(pass, cell.channels);
  const std::size_t count = (moments.last_row - moments.first_row) * planes * row;
  const std::size_t patches = pass == FoldPass::kTotals ? 2 * cell.patch_rows() * row : 0;
  std::memset(scratch.sums, 0, count * sizeof(float));
  std::memset(scratch.totals, 0, patches * sizeof(float));
  const std::int64_t image = (unit.source->first + unit.image) << 32;
  for_each_shift(cell, unit, control, scratch, [&](const FoldKeys& keys, int dx) {
    const std::int64_t code = image + (std::int64_t(dx) << 16) - keys.first_row;
    mask_rest(cell, moments.z.rest, scratch);
    const FoldMomentTask task = {cell, keys, moments, scratch, out.ranking, code, out.share};
    if (keys.last_row - keys.first_row == 1)
      for_each_block(keys, 1, control, [&](int dy) { blocks.one(task, dy); });
    else
      for_each_block(keys, kMomentRows, control, [&](int dy) { blocks.several(task, dy); });
    flush_sums(count, scratch.sums, out.planes);
    flush_sums(patches, scratch.totals, out.scalars);
  });
}

std::size_t fold_moment_scratch_bytes(const FoldCell& cell, FoldPass pass) {
  return FoldMomentScratch(cell, pass, nullptr).bytes;
}

void fold_moments(const FoldCell& cell, FoldPass pass, const FoldUnit& unit, Control& control,
                  char* memory, const FoldMoments& moments, FoldMomentSums out) {
  MomentBlocks blocks = {};
  switch (pass) {
    case FoldPass::kNormalise:
    case FoldPass::kMean: return;
    case FoldPass::kStatistics:
      blocks = moment_blocks<FoldPass::kStatistics>(cell.channels);
      break;
    case FoldPass::kTotals: blocks = moment_blocks<FoldPass::kTotals>(cell.channels); break;
    case FoldPass::kProduct: blocks = moment_blocks<FoldPass::kProduct>(cell.channels); break;
  }
  fold_moments_of(cell, pass, blocks, unit, control, memory, moments, out);
}

}  // namespace
