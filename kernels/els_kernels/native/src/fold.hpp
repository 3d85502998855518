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

// Rows in a row whose weights count, from which the next is expected to count, too: its weights are
// computed along with its logits.
constexpr int kDenseRows = 2;

template <int C, int N>
[[gnu::noinline]] void normalise_block(const FoldCell& cell, const FoldKeys& keys, int dy,
                                       std::int32_t* peak, FoldScratch& scratch) {
  const FoldBlock<N> block(cell, keys, dy);
  if (block.first >= block.last) return;
  const int K = cell.vectors, k = cell.window;
  const std::size_t length = (K + k) * kLanes;
  const Vec scale = splat(cell.scale);
  int streak[N] = {};
  start_block(cell, N, scratch);
  for (int t = block.first, slot = 0; t < block.last + k - 1; ++t, slot = slot + 1 < k ? slot + 1 : 0) {
    advance_products<C, N>(cell, keys, dy, t, slot, scratch);
    const int i = t - k + 1;
    if (i < block.first) continue;
    std::int32_t* row_peak = peak + i * keys.row;
    float* total = scratch.sums + i * keys.row;
    for (int d = 0; d < N; ++d) {
      if (!block.has(d, i)) continue;
      const std::int32_t* before = scratch.columns + d * length;
      const std::int32_t* bias = scratch.bias + (i + dy + d) * keys.row;
      if (streak[d] >= kDenseRows) {
        Vec top = splat(kNoPatch);
        window_sums(cell, before, [&](int v, Units S) __attribute__((always_inline)) {
          const std::size_t at = std::size_t(v) * kLanes;
          const Units units = S + (load_units(bias + at) - load_units(row_peak + at));
          const Vec logit = to_float(units) * scale + load(scratch.mask + at);
          store(total + at, load(total + at) + fold_exp2(logit));
          top = larger(top, logit);
        });
        if (__builtin_expect(any_above(top, kDenseHeadroom), 0))
          raise_peaks<true>(cell, before, bias, row_peak, total, scratch);
        if (!any_above(top, -cell.dead)) streak[d] = 0;
        continue;
      }
      const Vec top = row_logits<false>(cell, before, bias, row_peak, nullptr, scratch);
      streak[d] = any_above(top, -cell.dead) ? streak[d] + 1 : 0;
      if (streak[d] == 0) continue;
      if (__builtin_expect(any_above(top, kFoldHeadroom), 0)) {
        raise_peaks<false>(cell, before, bias, row_peak, total, scratch);
        row_logits<false>(cell, before, bias, row_peak, nullptr, scratch);
      }
      for (int v = 0; v < K; ++v) {
        const std::size_t at = std::size_t(v) * kLanes;
        store(total + at, load(total + at) + fold_exp2(load(scratch.logits + at)));
      }
    }
  }
}

// Weights of a row of patches into `to`; returns their maximum in each lane as a logit.
[[gnu::always_inline]] inline Vec row_weights(const FoldCell& cell, const std::int32_t* before,
                                              const std::int32_t* bias, const std::int32_t* whole,
                                              const float* rest, const float* mask, float* to) {
  const Vec scale = splat(cell.scale);
  Vec top = splat(kNoPatch);
  window_sums(cell, before, [&](int v, Units S) __attribute__((always_inline)) {
    const std::size_t at = std::size_t(v) * kLanes;
    const Units units = S + (load_units(bias + at) - load_units(whole + at));
    const Vec logit = to_float(units) * scale + (load(mask + at) + load(rest + at));
    store(to + at, fold_exp2(logit));
    top = larger(top, logit);
  });
  return top;
}

// The last rows of filtered weights of one displacement, a ring of window + kGroup - 1.
struct FoldLines {
  const FoldCell& cell;
  FoldScratch& scratch;
  int first;         // row of weights that is in slot 0
  float* weights;    // [slots][vectors] vectors
  bool* live;        // [slots]
  float* running;    // sums of the last rows, for uniform taps
  int last_live;     // row of the last weights that count

  int slots() const { return cell.window + kGroup - 1; }
  std::size_t row() const { return std::size_t(cell.vectors) * kLanes; }
  // Weights of a row, or zeros.
  const float* line(int i) const {
    if (i < first) return scratch.zeros;
    const int slot = (i - first) % slots();
    return live[slot] ? weights + slot * row() : scratch.zeros;
  }
};

// Add `count` rows of pixels from p on.
template <int C>
void add_pixels(const FoldLines& from, const FoldTarget& target, int p, int count) {
  const FoldCell& cell = from.cell;
  const int k = cell.window;
  if (p - from.last_live >= k) return;
  const float** lines = from.scratch.lines + k + kGroup;
  int live = 0;
  for (int j = 0; j < k - 1 + count; ++j) {
    lines[j] = from.line(p - k + 1 + j);
    live += lines[j] != from.scratch.zeros;
  }
  if (count == kGroup && k >= 3 && 2 * live >= k) return filter_group<C>(cell, target, lines, p);
  FoldTarget one = target;
  for (int r = 0; r < count; ++r, one.sums += target.row, one.keys += target.row) {
    int taps = 0;
    for (int o = 0; o < k; ++o) {
      const float* line = lines[r + k - 1 - o];
      if (line == from.scratch.zeros) continue;
      from.scratch.taps[taps] = cell.taps.rows[std::size_t(p + r) * k + o];
      from.scratch.lines[taps++] = line;
    }
    if (taps > 0) add_row_of_pixels<C>(cell, one, taps, from.scratch);
  }
}

// The same for one row and uniform taps: a running sum of the rows that reach it. What rounding
// leaves in it is small beside weights of the last rows.
template <int C>
[[gnu::noinline]] void add_uniform(const FoldLines& from, const FoldTarget& target, int p) {
  const FoldCell& cell = from.cell;
  const int k = cell.window;
  if (p - from.last_live > k) return;
  if (p - from.last_live == k) {
    std::memset(from.running, 0, from.row() * sizeof(float));
    return;
  }
  const float *in = from.line(p), *out = from.line(p - k);
  // A patch that starts so many rows above p is one of the image.
  const Vec tap = splat(cell.taps.rows[std::size_t(p) * k + least(p, k - 1)]);
  for (int v = 0; v < cell.vectors; ++v) {
    const std::size_t at = std::size_t(v) * kLanes;
    const Vec sum = load(from.running + at) + (load(in + at) - load(out + at));
    store(from.running + at, sum);
    add_keys<C>(cell, target, at, sum * tap);
  }
}

template <int C, int N>
[[gnu::noinline]] void accumulate_block(const FoldCell& cell, const FoldKeys& keys, int dy,
                                        const FoldNormaliser& z, FoldScratch& scratch) {
  static_assert(N <= 2, "one or two displacements at a time");
  const FoldBlock<N> block(cell, keys, dy);
  if (block.first >= block.last) return;
  const int k = cell.window, slots = k + kGroup - 1;
  const std::size_t row = keys.row, length = (cell.vectors + k) * kLanes;
  const std::size_t plane = std::size_t(cell.rows) * row;
  const int stop = block.last + k - 1;  // row after the last that weights reach
  auto lines_of = [&](int d) {
    return FoldLines{cell, scratch, block.first, scratch.weights + d * slots * row,
                     scratch.live + d * slots, scratch.running + d * row, block.first - k - 1};
  };
  auto target = [&](int d, int p) {
    return FoldTarget{scratch.sums + p * row, scratch.keys + (p + dy + d + kMostRows) * row, plane,
                      keys.plane, row};
  };
  start_block(cell, N, scratch);
  std::memset(scratch.live, 0, N * slots);
  std::memset(scratch.running, 0, N * row * sizeof(float));
  FoldLines lines[2] = {lines_of(0), lines_of(N - 1)};
  int streak[N] = {};
  float* reach = scratch.reach + (k - 1) * kLanes;
  for (int t = block.first, slot = 0, place = 0; t < stop + k - 1;
       ++t, slot = slot + 1 < k ? slot + 1 : 0) {
    if (t < stop) advance_products<C, N>(cell, keys, dy, t, slot, scratch);
    const int i = t - k + 1;
    if (i < block.first) continue;
    for (int d = 0; d < N; ++d) {
      bool live = false;
      if (block.has(d, i)) {
        const std::int32_t* before = scratch.columns + d * length;
        const std::int32_t* bias = scratch.bias + (i + dy + d) * row;
        live = streak[d] >= kDenseRows;
        if (live) {
          const Vec top = row_weights(cell, before, bias, z.whole + i * row, z.rest + i * row,
                                      scratch.mask, reach);
          if (!any_above(top, -cell.dead)) streak[d] = 0;
        } else {
          const Vec top = row_logits<true>(cell, before, bias, z.whole + i * row,
                                           z.rest + i * row, scratch);
          live = any_above(top, -cell.dead);
          streak[d] = live ? streak[d] + 1 : 0;
          if (live)
            for (int v = 0; v < cell.vectors; ++v)
              store(reach + v * kLanes, fold_exp2(load(scratch.logits + v * kLanes)));
        }
      }
      lines[d].live[place] = live;
      if (live) {
        filter_weights(cell, scratch, lines[d].weights + place * row);
        lines[d].last_live = i;
      }
      if (cell.taps.uniform) add_uniform<C>(lines[d], target(d, i), i);
    }
    place = place + 1 < slots ? place + 1 : 0;
    const int count = (i - block.first) % kGroup + 1;
    if (cell.taps.uniform || (count < kGroup && i + 1 < stop)) continue;
    for (int d = 0; d < N; ++d)
      add_pixels<C>(lines[d], target(d, i + 1 - count), i + 1 - count, count);
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
    for_each_block(keys, 4, control, [&](int dy) {
      normalise_block<C, 4>(cell, keys, dy, sums.peak, scratch);
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
  const std::size_t count = std::size_t(cell.rows) * keys.row;
  std::memset(scratch.sums, 0, cell.channels * count * sizeof(float));
  if (keys.last_row - keys.first_row == 1)
    for_each_block(keys, 1, control, [&](int dy) {
      accumulate_block<C, 1>(cell, keys, dy, z, scratch);
    });
  else
    for_each_block(keys, 2, control, [&](int dy) {
      accumulate_block<C, 2>(cell, keys, dy, z, scratch);
    });
  for (std::size_t i = 0; i < cell.channels * count; ++i)
    fold[i] += double(scratch.sums[i]) * cell.col_scale[i % keys.row];
}

std::size_t fold_scratch_bytes(const FoldCell& cell) {
  return FoldScratch(cell, cell.channels, nullptr).bytes;
}

void fold_normalise(const FoldCell& cell, const FoldUnit& unit, Control& control, char* memory,
                    FoldSums sums) {
  FoldScratch scratch(cell, cell.channels, memory);
  for_each_shift(cell, unit, control, scratch, [&](const FoldKeys& keys, int) {
    switch (cell.channels) {
      case 1: return fold_normalise_unit<1>(cell, keys, control, sums, scratch);
      case 3: return fold_normalise_unit<3>(cell, keys, control, sums, scratch);
      default: return fold_normalise_unit<0>(cell, keys, control, sums, scratch);
    }
  });
}

void fold_accumulate(const FoldCell& cell, const FoldUnit& unit, Control& control, char* memory,
                     const FoldNormaliser& z, double* fold) {
  FoldScratch scratch(cell, cell.channels, memory);
  for_each_shift(cell, unit, control, scratch, [&](const FoldKeys& keys, int) {
    switch (cell.channels) {
      case 1: return fold_accumulate_unit<1>(cell, keys, control, z, fold, scratch);
      case 3: return fold_accumulate_unit<3>(cell, keys, control, z, fold, scratch);
      default: return fold_accumulate_unit<0>(cell, keys, control, z, fold, scratch);
    }
  });
}

}  // namespace
