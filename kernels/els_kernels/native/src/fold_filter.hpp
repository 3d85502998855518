// Filters of a fold: weights along columns and along rows, and the pixels that they meet.
#pragma once

#include <type_traits>

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
  Vec sum = {}, odd = {};
  for (int o = 0; o + 1 < k; o += 2) {
    sum += load(first + o * kLanes);
    odd += load(first + (o + 1) * kLanes);
  }
  sum += load(first + (k - 1) * kLanes) + odd;
  out(0, sum);
  for (int v = 1; v < K; ++v) {
    sum += load(first + (v + k - 1) * kLanes) - load(first + (v - 1) * kLanes);
    out(v, sum);
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

// sum[i] = Σ_o taps[o]·line(i + o) for taps that are the same from either end, 2R + 1 of them (R = 0:
// 2·radius + 1): lines of equal taps are added first, as additions and multiplications have units of
// their own. Each line is loaded once for all sums on either side of its tap.
template <int R, int N, class Line>
[[gnu::always_inline]] inline void filter_even(const float* taps, int radius, Line line,
                                               Vec (&sum)[N]) {
  if (R > 0) radius = R;
  Vec near[N], far[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) near[i] = line(i), far[i] = line(2 * radius + i), sum[i] = Vec{};
#pragma GCC unroll 8
  for (int o = 0; o < radius; ++o) {
    const Vec tap = splat(taps[o]);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) sum[i] += tap * (near[i] + far[i]);
#pragma GCC unroll 4
    for (int i = 1; i < N; ++i) near[i - 1] = near[i], far[N - i] = far[N - i - 1];
    near[N - 1] = line(o + N);
    far[0] = line(2 * radius - o - 1);
  }
  const Vec tap = splat(taps[radius]);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) sum[i] += tap * near[i];
}

// to[v] = Σ_o taps[o]·from[v + o] for `N` vectors from v on.
template <int R, int N>
[[gnu::always_inline]] inline void filter_along(int v, int radius, const float* taps,
                                                const float* from, float* to) {
  Vec sum[N];
  from += std::size_t(v) * kLanes;
  filter_even<R>(taps, radius, [=](int j) { return load(from + j * kLanes); }, sum);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) store(to + (v + i) * kLanes, sum[i]);
}

// The same for all vectors of a row, at least 3, in blocks of 4 and of 3; the last may begin early.
template <int R>
[[gnu::noinline]] void filter_taps(int K, int radius, const float* taps, const float* from, float* to) {
  for (int v = 0, blocks = (K + 3) / 4; blocks > 0; --blocks) {
    const int count = (K - v + blocks - 1) / blocks;
    if (count == 4)
      filter_along<R, 4>(v, radius, taps, from, to);
    else
      filter_along<R, 3>(least(v, K - 3), radius, taps, from, to);
    v += count;
  }
}

// Call work<R>() with the radius of a window, or 0 where there is no code for it alone.
template <class Work>
[[gnu::always_inline]] inline void for_radius(int window, Work work) {
  switch (window) {
    case 5: return work(std::integral_constant<int, 2>());
    case 7: return work(std::integral_constant<int, 3>());
    case 9: return work(std::integral_constant<int, 4>());
    case 11: return work(std::integral_constant<int, 5>());
    case 15: return work(std::integral_constant<int, 7>());
    default: return work(std::integral_constant<int, 0>());
  }
}

// The weights of a row, continued to the left by window - 1 vectors, filtered along columns.
inline void filter_weights(const FoldCell& cell, const float* reach, float* to) {
  const int K = cell.vectors, k = cell.window;
  if (!cell.taps.table && !cell.taps.uniform && K >= 3)
    return for_radius(k, [&](auto radius) {
      filter_taps<radius>(K, k / 2, cell.taps.cols, reach, to);
    });
  filter_columns<false>(cell, cell.taps, reach + (k - 1) * kLanes,
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

// Lines of the ring of weights in the order of rows, in groups of kGroup that start at a multiple of it.
struct FoldGroups {
  const float* const* group;
  int first;  // line 0 in its group
};

// Add kGroup rows of pixels, for `D` displacements. Line j has the filtered weights of the row that
// starts window - 1 - j rows before the first of them.
template <int C, int R, int D>
[[gnu::noinline]] void filter_group(const FoldCell& cell, const FoldTarget& target,
                                    const FoldGroups (&from)[D]) {
  constexpr int kFirst = R % 2 == 0 ? 0 : 2, kGroups = (2 * R + kFirst + 2 * kGroup - 1) / kGroup;
  const int radius = cell.window / 2, channels = C > 0 ? C : cell.channels;
  const float* taps = cell.taps.cols;
  const std::size_t row = target.row;
  const float* group[D][kGroups];
  for (int d = 0; d < D; ++d)
    for (int g = 0; g < kGroups; ++g) group[d][g] = from[d].group[g];
  for (int v = 0; v < cell.vectors; ++v) {
    const std::size_t at = std::size_t(v) * kLanes;
    Vec weight[D][kGroup];
#pragma GCC unroll 2
    for (int d = 0; d < D; ++d) {
      const auto line = [&](int j) __attribute__((always_inline)) {
        if (R > 0) return load(group[d][(j + kFirst) / kGroup] + (j + kFirst) % kGroup * row + at);
        const int i = j + from[d].first;
        return load(from[d].group[i / kGroup] + i % kGroup * row + at);
      };
      filter_even<R>(taps, radius, line, weight[d]);
    }
    for (int c = 0; c < channels; ++c)
#pragma GCC unroll 4
      for (int r = 0; r < kGroup; ++r) {
        float* place = target.sums + c * target.plane + r * row + at;
        const float* keys = target.keys + c * target.key_plane + r * row + at;
        Vec sum = load(place);
#pragma GCC unroll 2
        for (int d = 0; d < D; ++d) sum += weight[d][r] * load(keys + d * row);
        store(place, sum);
      }
  }
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
