// Filters of a fold: weights along columns and along rows, and the pixels that they meet.
#pragma once

#include "fold_sums.hpp"

namespace {

using els::FoldTaps;

// Call out(v, Σ_o tap(o, v)·line(o)[v]) for `N` vectors from v on: as many independent sums.
template <int N, class Tap, class Line, class Out>
[[gnu::always_inline]] inline void filter_block(int v, int taps, Tap tap, Line line, Out out) {
  Vec sum[N] = {};
  for (int o = 0; o < taps; ++o) {
    const float* from = line(o) + v * kLanes;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sum[i] += tap(o, v + i) * load(from + i * kLanes);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) out(v + i, sum[i]);
}

// The same for all vectors of a row, in blocks of at most 8 and of nearly equal size: a sum has to
// wait for its last addition, eight of them do not.
template <class Tap, class Line, class Out>
[[gnu::always_inline]] inline void filter(int K, int taps, Tap tap, Line line, Out out) {
  for (int v = 0, blocks = (K + 7) / 8; blocks > 0; --blocks) {
    const int count = (K - v + blocks - 1) / blocks;
    switch (count) {
      case 8: filter_block<8>(v, taps, tap, line, out); break;
      case 7: filter_block<7>(v, taps, tap, line, out); break;
      case 6: filter_block<6>(v, taps, tap, line, out); break;
      case 5: filter_block<5>(v, taps, tap, line, out); break;
      case 4: filter_block<4>(v, taps, tap, line, out); break;
      default:
        for (int i = 0; i < count; ++i) filter_block<1>(v + i, taps, tap, line, out);
    }
    v += count;
  }
}

// Call out(v, sum) with the sums of a row over columns, its taps to the left or, `ahead`, to the right.
// The row is continued there by window - 1 vectors.
template <bool kAhead, class Out>
[[gnu::always_inline]] inline void filter_columns(const FoldCell& cell, const FoldTaps& taps,
                                                  const float* row, Out out) {
  const int K = cell.vectors, k = cell.window;
  const float* cols = taps.cols;
  auto line = [=](int o) { return row + (kAhead ? o : -o) * kLanes; };
  if (taps.table)
    return filter(K, k, [=](int o, int v) { return load(cols + (std::size_t(o) * K + v) * kLanes); },
                  line, out);
  if (!taps.uniform)
    return filter(K, k, [=](int o, int) { return splat(cols[o]); }, line, out);
  // The sum restarts in each row, and weights are not negative: nothing cancels.
  const float* first = kAhead ? row : row - (k - 1) * kLanes;
  Vec sum = {};
  for (int o = 0; o < k - 1; ++o) sum += load(first + o * kLanes);
  for (int v = 0; v < K; ++v) {
    sum += load(first + (v + k - 1) * kLanes);
    out(v, sum);
    sum -= load(first + v * kLanes);
  }
}

// Call out(v, weight) with the weights that reach a row, filtered by the taps of both axes: `count`
// rows of weights are in scratch.lines, and their taps in scratch.taps.
template <class Out>
[[gnu::always_inline]] inline void filter_row(const FoldCell& cell, const FoldTaps& taps, int count,
                                              FoldScratch& scratch, Out out) {
  const int K = cell.vectors, k = cell.window;
  float* reach = scratch.reach + (k - 1) * kLanes;
  const float* row_taps = scratch.taps;
  const float* const* lines = scratch.lines;
  filter(K, count, [=](int o, int) { return splat(row_taps[o]); }, [=](int o) { return lines[o]; },
         [=](int v, Vec sum) { store(reach + v * kLanes, sum); });
  for (int j = 1; j < k; ++j)
    store(reach - j * kLanes, last_lane(load(reach + (K - j) * kLanes)));
  filter_columns<false>(cell, taps, reach, out);
}

// Gather the rows of the ring of weights that reach row i, from `slot` back; returns their number.
[[gnu::always_inline]] inline int gather_rows(const FoldCell& cell, const FoldTaps& taps, int i, int d,
                                              int slot, FoldScratch& scratch) {
  const int k = cell.window;
  const std::size_t row = std::size_t(cell.vectors) * kLanes;
  int count = 0;
  for (int o = 0, s = slot; o < k; ++o, s = s > 0 ? s - 1 : k - 1)
    if (scratch.live[d * k + s]) {
      scratch.taps[count] = taps.rows[i * k + o];
      scratch.lines[count++] = scratch.weights + (d * k + s) * row;
    }
  return count;
}

// to[v] = Σ_o taps[o]·from[v - o] for `N` vectors from v on, two taps at a time: each vector is
// loaded once for both.
template <int N>
[[gnu::always_inline]] inline void filter_along(int v, int k, const float* taps, const float* from,
                                                float* to) {
  Vec sum[N] = {};
  from += std::size_t(v) * kLanes;
  int o = 0;
  for (; o + 2 <= k; o += 2, from -= 2 * kLanes) {
    const Vec near = splat(taps[o]), far = splat(taps[o + 1]);
    Vec here = load(from - kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      sum[i] += far * here;
      here = load(from + i * kLanes);
      sum[i] += near * here;
    }
  }
  if (o < k) {
    const Vec last = splat(taps[o]);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sum[i] += last * load(from + i * kLanes);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(to + (v + i) * kLanes, sum[i]);
}

// The same for all vectors of a row, in blocks of nearly equal size.
[[gnu::noinline]] inline void filter_taps(int K, int k, const float* taps, const float* from,
                                          float* to) {
  for (int v = 0, blocks = (K + 5) / 6; blocks > 0; --blocks) {
    const int count = (K - v + blocks - 1) / blocks;
    switch (count) {
      case 6: filter_along<6>(v, k, taps, from, to); break;
      case 5: filter_along<5>(v, k, taps, from, to); break;
      case 4: filter_along<4>(v, k, taps, from, to); break;
      case 3: filter_along<3>(v, k, taps, from, to); break;
      case 2: filter_along<2>(v, k, taps, from, to); break;
      default: filter_along<1>(v, k, taps, from, to); break;
    }
    v += count;
  }
}

// The weights of a row, which start at scratch.reach + (k - 1) vectors, filtered along columns.
inline void filter_weights(const FoldCell& cell, const FoldScratch& scratch, float* to) {
  const int K = cell.vectors, k = cell.window;
  float* reach = scratch.reach + (k - 1) * kLanes;
  for (int j = 1; j < k; ++j)
    store(reach - j * kLanes, last_lane(load(reach + (K - j) * kLanes)));
  if (!cell.taps.table && !cell.taps.uniform)
    return filter_taps(K, k, cell.taps.cols, reach, to);
  filter_columns<false>(cell, cell.taps, reach,
                        [=](int v, Vec sum) { store(to + v * kLanes, sum); });
}

// Rows of pixels that the weights of one displacement reach, and where their keys are.
struct FoldTarget {
  float* sums;        // of channel 0, as its keys
  const float* keys;
  std::size_t plane, key_plane, row;
};

// sums += weight·keys for one vector of one row.
template <int C>
[[gnu::always_inline]] inline void add_keys(const FoldCell& cell, const FoldTarget& target,
                                            std::size_t at, Vec weight) {
  const int channels = C > 0 ? C : cell.channels;
  for (int c = 0; c < channels; ++c) {
    float* place = target.sums + c * target.plane + at;
    store(place, load(place) + weight * load(target.keys + c * target.key_plane + at));
  }
}

// Add kGroup rows of pixels from p on. Line j has the filtered weights of row p - k + 1 + j.
template <int C, int W>
[[gnu::always_inline]] inline void filter_group_at(const FoldCell& cell, const FoldTarget& target,
                                                   const float* const* lines, int p, int v) {
  const int k = cell.window;
  const std::size_t at = std::size_t(v) * kLanes;
  const float* taps[kGroup];  // of line 0
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) taps[r] = cell.taps.rows + std::size_t(p + r) * k + k - 1 + r;
  Vec sum[kGroup][W] = {};
  auto add = [&](int j, int first, int last) __attribute__((always_inline)) {
    const float* line = lines[j] + at;
    Vec weight[W];
#pragma GCC unroll 2
    for (int i = 0; i < W; ++i) weight[i] = load(line + i * kLanes);
#pragma GCC unroll 4
    for (int r = first; r <= last; ++r) {
      const Vec tap = splat(taps[r][-j]);
#pragma GCC unroll 2
      for (int i = 0; i < W; ++i) sum[r][i] += tap * weight[i];
    }
  };
  add(0, 0, 0);
  add(1, 0, 1);
  add(2, 0, 2);
  for (int j = 3; j < k; ++j) add(j, 0, 3);
  add(k, 1, 3);
  add(k + 1, 2, 3);
  add(k + 2, 3, 3);
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < W; ++i)
      add_keys<C>(cell, target, r * target.row + at + i * kLanes, sum[r][i]);
}

template <int C>
[[gnu::noinline]] void filter_group(const FoldCell& cell, const FoldTarget& target,
                                    const float* const* lines, int p) {
  int v = 0;
  for (; v + 2 <= cell.vectors; v += 2) filter_group_at<C, 2>(cell, target, lines, p, v);
  if (v < cell.vectors) filter_group_at<C, 1>(cell, target, lines, p, v);
}

// Add one row of pixels, which `taps` rows of filtered weights reach.
template <int C>
[[gnu::noinline]] void add_row_of_pixels(const FoldCell& cell, const FoldTarget& target, int taps,
                                  const FoldScratch& scratch) {
  const float* tap = scratch.taps;
  const float* const* lines = scratch.lines;
  filter(
      cell.vectors, taps, [=](int o, int) { return splat(tap[o]); },
      [=](int o) { return lines[o]; },
      [&](int v, Vec weight)
          __attribute__((always_inline)) { add_keys<C>(cell, target, v * kLanes, weight); });
}

}  // namespace
