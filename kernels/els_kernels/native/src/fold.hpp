// Patch attention with a fold: box sums of products for each displacement, and weights filtered by
// the taps of the fold for each displacement, so that no mean patch is formed.
//
//     S(q) = Σ_{v in q} g(v)                            fold_sums.hpp; integers, so that sums are exact
//     A(p) = Σ_q taps(p - q)·2^(S + bias - log Z)(q)    fold_filter.hpp
//     D(p) += A(p)·φ(p + δ)
#pragma once

#include "fold_filter.hpp"

namespace {

using els::FoldNormaliser;
using els::FoldSums;

// Rows of logits of `N` displacements that count, one bit each; their maxima are raised where need be.
template <int N>
unsigned normaliser_logits(const FoldCell& cell, const FoldKeys& keys, const FoldBlock<N>& block,
                           int dy, int i, std::int32_t* peak, FoldScratch& scratch) {
  const std::size_t row = keys.row, length = row + std::size_t(cell.window) * kLanes;
  auto logits = [&](int d) {
    return row_logits(cell, scratch.columns + d * length, scratch.bias + (i + dy + d) * row, peak,
                      scratch.mask, scratch.logits + d * row);
  };
  unsigned live = 0, raise = 0;
  for (int d = 0; d < N; ++d) {
    if (!block.has(d, i)) continue;
    const Vec top = logits(d);
    live |= unsigned(any_above(top, -cell.dead)) << d;
    raise |= unsigned(any_above(top, kFoldHeadroom)) << d;
  }
  if (__builtin_expect(raise != 0, 0)) {
    for (int d = 0; d < N; ++d)
      if (raise >> d & 1)
        raise_peaks(cell, scratch.columns + d * length, scratch.bias + (i + dy + d) * row, peak,
                    scratch.sums + i * row, scratch);
    for (int d = 0; d < N; ++d)
      if (live >> d & 1) logits(d);
  }
  return live;
}

template <int C, int N>
[[gnu::noinline]] void normalise_block(const FoldCell& cell, const FoldKeys& keys, int dy,
                                       std::int32_t* peak, FoldScratch& scratch) {
  const FoldBlock<N> block(cell, keys, dy);
  if (block.first >= block.last) return;
  const int K = cell.vectors, k = cell.window;
  start_block(cell, N, scratch);
  for (int t = block.first, slot = 0; t < block.last + k - 1; ++t, slot = slot + 1 < k ? slot + 1 : 0) {
    advance_products<C, N>(cell, keys, dy, t, slot, scratch);
    const int i = t - k + 1;
    if (i < block.first) continue;
    const unsigned live =
        normaliser_logits(cell, keys, block, dy, i, peak + i * keys.row, scratch);
    float* total = scratch.sums + i * keys.row;
    if (live == (1u << N) - 1)
      add_weights<N>(K, scratch.logits, total);
    else
      for (int d = 0; d < N; ++d)
        if (live >> d & 1) add_weights<1>(K, scratch.logits + d * keys.row, total);
  }
}

// The last rows of filtered weights of one displacement, in a ring of whole groups.
struct FoldLines {
  float* weights;  // [slots][vectors] vectors
  bool* live;      // [slots]
  bool* clean;     // [slots]: whether a slot that is not live holds zeros
  float* running;  // sums of the last rows, for uniform taps
  int last_live;   // row of the last weights that count

  // Weights of a slot, or zeros.
  const float* line(int slot, const FoldScratch& scratch, std::size_t row) const {
    return live[slot] ? weights + slot * row : scratch.zeros;
  }
};

// Rows of pixels [p, p + count) of a block, and where the weights are that reach them.
struct FoldRows {
  const FoldCell& cell;
  FoldScratch& scratch;
  int slots, start;  // start: slot of row p - window + 1
  int p, count;

  std::size_t row() const { return std::size_t(cell.vectors) * kLanes; }
  int next(int slot) const { return slot + 1 < slots ? slot + 1 : 0; }
};

// Find the lines of a whole group if most of them count, so that it pays to read all.
inline bool group_lines(const FoldRows& rows, const FoldLines& from, const float** group,
                        FoldGroups& out) {
  const int k = rows.cell.window, lines = k + kGroup - 1;
  const std::size_t row = rows.row();
  int live = 0;
  for (int j = 0, slot = rows.start; j < lines; ++j, slot = rows.next(slot)) live += from.live[slot];
  if (2 * live < k) return false;
  if (live < lines)
    for (int j = 0, slot = rows.start; j < lines; ++j, slot = rows.next(slot)) {
      if (from.live[slot] || from.clean[slot]) continue;
      std::memset(from.weights + slot * row, 0, row * sizeof(float));
      from.clean[slot] = true;
    }
  out = {group, rows.start % kGroup};
  int at = rows.start - out.first;
  for (int j = -out.first; j < lines; j += kGroup) {
    *group++ = from.weights + at * row;
    at = at + kGroup < rows.slots ? at + kGroup : 0;
  }
  return true;
}

// Add rows of pixels one by one.
template <int C>
void add_rows(const FoldRows& rows, const FoldLines& from, FoldTarget target) {
  const int k = rows.cell.window;
  FoldScratch& scratch = rows.scratch;
  int first = rows.start;
  for (int r = 0; r < rows.count; ++r, first = rows.next(first)) {
    const float* taps = rows.cell.taps.rows + std::size_t(rows.p + r) * k;
    int found = 0;
    for (int o = k - 1, slot = first; o >= 0; --o, slot = rows.next(slot)) {
      if (!from.live[slot]) continue;
      scratch.taps[found] = taps[o];
      scratch.lines[found++] = from.weights + slot * rows.row();
    }
    if (found > 0) add_row_of_pixels<C>(rows.cell, target, found, scratch);
    target.sums += target.row, target.keys += target.row;
  }
}

// Add rows of pixels, for `N` displacements.
template <int C, int N>
[[gnu::noinline]] void add_pixels(const FoldRows& rows, const FoldLines* from,
                                  const FoldTarget& target) {
  const int k = rows.cell.window;
  const bool whole = rows.count == kGroup && k >= 3 && !rows.cell.taps.table;
  FoldGroups groups[N];
  const float** lines = rows.scratch.lines + k + kGroup;
  bool grouped[N], reached[N];
  for (int d = 0; d < N; ++d) {
    reached[d] = rows.p - from[d].last_live < k;
    grouped[d] = reached[d] && whole &&
                 group_lines(rows, from[d], lines + d * (k + 2 * kGroup), groups[d]);
  }
  if (N == 2 && grouped[0] && grouped[N - 1])
    return for_radius(k, [&](auto r) { filter_group<C, r, N>(rows.cell, target, groups); });
  for (int d = 0; d < N; ++d) {
    FoldTarget one = target;
    one.keys += d * target.row;
    const FoldGroups own[1] = {groups[d]};
    if (grouped[d])
      for_radius(k, [&](auto r) { filter_group<C, r, 1>(rows.cell, one, own); });
    else if (reached[d])
      add_rows<C>(rows, from[d], one);
  }
}

// The same for one row and uniform taps: a running sum of the rows that reach it. What rounding
// leaves in it is small beside weights of the last rows.
template <int C, int N>
[[gnu::noinline]] void add_uniform(const FoldRows& rows, const FoldLines* from,
                                   const FoldTarget& target) {
  const FoldCell& cell = rows.cell;
  const int k = cell.window, channels = C > 0 ? C : cell.channels;
  const std::size_t row = rows.row();
  const int newest = (rows.start + k - 1) % rows.slots;
  const int oldest = rows.start > 0 ? rows.start - 1 : rows.slots - 1;
  const float *in[N], *out[N];
  bool reached = false;
  for (int d = 0; d < N; ++d) {
    in[d] = from[d].line(newest, rows.scratch, row), out[d] = from[d].line(oldest, rows.scratch, row);
    if (rows.p - from[d].last_live == k) {
      std::memset(from[d].running, 0, row * sizeof(float));
      out[d] = rows.scratch.zeros;
    }
    reached |= rows.p - from[d].last_live < k;
  }
  if (!reached) return;
  for (int v = 0; v < cell.vectors; ++v) {
    const std::size_t at = std::size_t(v) * kLanes;
    Vec weight[N];
#pragma GCC unroll 2
    for (int d = 0; d < N; ++d) {
      weight[d] = load(from[d].running + at) + (load(in[d] + at) - load(out[d] + at));
      store(from[d].running + at, weight[d]);
    }
    for (int c = 0; c < channels; ++c) {
      float* place = target.sums + c * target.plane + at;
      const float* keys = target.keys + c * target.key_plane + at;
      Vec sum = load(place);
#pragma GCC unroll 2
      for (int d = 0; d < N; ++d) sum += weight[d] * load(keys + d * row);
      store(place, sum);
    }
  }
}

// Weights of row i of patches, filtered along columns, into a slot of each displacement's lines.
template <int N>
void filter_weights(const FoldCell& cell, const FoldKeys& keys, const FoldBlock<N>& block, int dy,
                    int i, const std::int32_t* whole, FoldLines (&lines)[N], int slot,
                    FoldScratch& scratch) {
  const int K = cell.vectors, k = cell.window;
  const std::size_t row = keys.row, length = row + std::size_t(k) * kLanes;
  unsigned live = 0;
  for (int d = 0; d < N; ++d) {
    lines[d].live[slot] = lines[d].clean[slot] = false;
    if (!block.has(d, i)) continue;
    const Vec top = row_logits(cell, scratch.columns + d * length, scratch.bias + (i + dy + d) * row,
                               whole + i * row, scratch.rest + i * row, scratch.logits + d * row);
    live |= unsigned(any_above(top, -cell.dead)) << d;
  }
  if (live == (1u << N) - 1)
    write_weights<N>(K, k, scratch.logits, scratch.reach);
  else
    for (int d = 0; d < N; ++d)
      if (live >> d & 1)
        write_weights<1>(K, k, scratch.logits + d * row, scratch.reach + d * length);
  for (int d = 0; d < N; ++d) {
    if (!(live >> d & 1)) continue;
    filter_weights(cell, scratch.reach + d * length, lines[d].weights + slot * row);
    lines[d].live[slot] = true;
    lines[d].last_live = i;
  }
}

template <int C, int N>
[[gnu::noinline]] void accumulate_block(const FoldCell& cell, const FoldKeys& keys, int dy,
                                        const FoldNormaliser& z, FoldScratch& scratch) {
  const FoldBlock<N> block(cell, keys, dy);
  if (block.first >= block.last) return;
  const int k = cell.window, slots = (k + 2 * kGroup - 2) / kGroup * kGroup;
  const std::size_t row = keys.row, plane = std::size_t(cell.rows) * row;
  const int stop = block.last + k - 1;  // row after the last that weights reach
  start_block(cell, N, scratch);
  std::memset(scratch.live, 0, 2 * N * slots);
  std::memset(scratch.running, 0, N * row * sizeof(float));
  FoldLines lines[N];
  for (int d = 0; d < N; ++d)
    lines[d] = {scratch.weights + d * slots * row, scratch.live + 2 * d * slots,
                scratch.live + (2 * d + 1) * slots, scratch.running + d * row, block.first - k - 1};
  constexpr int kPair = N < 2 ? 1 : 2;
  int slot = 0, place = 0;  // of products and of weights
  for (int t = block.first; t < stop + k - 1; ++t, slot = slot + 1 < k ? slot + 1 : 0) {
    if (t < stop) advance_products<C, N>(cell, keys, dy, t, slot, scratch);
    const int i = t - k + 1;
    if (i < block.first) continue;
    filter_weights<N>(cell, keys, block, dy, i, z.whole, lines, place, scratch);
    const int count = cell.taps.uniform ? 1 : (i - block.first) % kGroup + 1;
    const int start = (place + 2 * slots - k + 2 - count) % slots;
    place = place + 1 < slots ? place + 1 : 0;
    if (!cell.taps.uniform && count < kGroup && i + 1 < stop) continue;
    const int p = i + 1 - count;
    const FoldRows rows = {cell, scratch, slots, start, p, count};
    for (int d = 0; d < N; d += kPair) {
      const float* near = scratch.keys + (p + dy + d + kMostRows) * row;
      const FoldTarget target = {scratch.sums + p * row, near, plane, keys.plane, row};
      if (cell.taps.uniform)
        add_uniform<C, kPair>(rows, lines + d, target);
      else
        add_pixels<C, kPair>(rows, lines + d, target);
    }
  }
}

template <int C>
void fold_normalise_unit(const FoldCell& cell, const FoldKeys& keys, Control& control,
                         FoldSums sums, FoldScratch& scratch) {
  const std::size_t count = cell.patch_rows() * keys.row;
  std::memset(scratch.sums, 0, count * sizeof(float));
  std::memcpy(scratch.flushed, sums.peak, count * sizeof(std::int32_t));
  if (keys.last_row - keys.first_row == 1)
    for_each_block(keys, 1, control, [&](int dy) {
      normalise_block<C, 1>(cell, keys, dy, sums.peak, scratch);
    });
  else
    for_each_block(keys, kMostRows, control, [&](int dy) {
      normalise_block<C, kMostRows>(cell, keys, dy, sums.peak, scratch);
    });
  for (std::size_t i = 0; i < count; ++i) {
    const auto raised = std::uint32_t(sums.peak[i]) - std::uint32_t(scratch.flushed[i]);
    if (raised != 0) sums.total[i] *= __builtin_exp2(-double(raised) * cell.scale);
    sums.total[i] += scratch.sums[i];
  }
}

template <int C>
void fold_accumulate_unit(const FoldCell& cell, const FoldKeys& keys, Control& control,
                          const FoldNormaliser& z, double* fold, FoldScratch& scratch) {
  const std::size_t lines = std::size_t(cell.channels) * cell.rows;
  std::memset(scratch.sums, 0, lines * keys.row * sizeof(float));
  mask_rest(cell, z.rest, scratch);
  if (keys.last_row - keys.first_row == 1)
    for_each_block(keys, 1, control, [&](int dy) {
      accumulate_block<C, 1>(cell, keys, dy, z, scratch);
    });
  else
    for_each_block(keys, kMostRows, control, [&](int dy) {
      accumulate_block<C, kMostRows>(cell, keys, dy, z, scratch);
    });
  const float* sums = scratch.sums;
  for (std::size_t line = 0; line < lines; ++line, sums += keys.row, fold += keys.row) {
    const double scale = cell.row_scale[line % cell.rows];
    for (std::size_t i = 0; i < keys.row; ++i) fold[i] += double(sums[i]) * (cell.col_scale[i] * scale);
  }
}

std::size_t fold_scratch_bytes(const FoldCell& cell) {
  return FoldScratch(cell, cell.channels, nullptr).bytes;
}

void fold_normalise(const FoldCell& cell, const FoldUnit& unit, Control& control, char* memory,
                    FoldSums sums) {
  FoldScratch scratch(cell, cell.channels, memory);
  for_each_shift(cell, unit, control, scratch, [&](const FoldKeys& keys, int) {
    by_channels(cell.channels, [&](auto c) {
      fold_normalise_unit<c.value>(cell, keys, control, sums, scratch);
    });
  });
}

void fold_accumulate(const FoldCell& cell, const FoldUnit& unit, Control& control, char* memory,
                     const FoldNormaliser& z, double* fold) {
  FoldScratch scratch(cell, cell.channels, memory);
  for_each_shift(cell, unit, control, scratch, [&](const FoldKeys& keys, int) {
    by_channels(cell.channels, [&](auto c) {
      fold_accumulate_unit<c.value>(cell, keys, control, z, fold, scratch);
    });
  });
}

}  // namespace
