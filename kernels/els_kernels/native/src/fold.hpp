// Patch attention with a fold: box sums of products for each displacement, and weights filtered by
// the taps of the fold for each displacement, so that no mean patch is formed.
//
//     g(v) = Σ_c x_c(v)·φ_c(v + δ)     V += g(new row) - g(old row)     S += V(right) - V(left)
//     A(p) = Σ_q taps(p - q)·2^(S + bias - log Z)(q)                    D(p) += A(p)·φ(p + δ)
//
// V and S are integers, so that running sums are exact; see fold_problem.hpp for units and layout.
#pragma once

#include "fold_image.hpp"

namespace {

using els::FoldNormaliser;
using els::FoldSums;
using els::FoldTaps;

constexpr float kFoldHeadroom = 10.0f;  // bits by which a logit may exceed the running maximum

// V += products of query row t - products of the row that left, for each displacement.
template <int C, int N>
[[gnu::always_inline]] inline void advance_products(const FoldCell& cell, const FoldKeys& keys,
                                                    int dy, int t, int slot, FoldScratch& scratch) {
  const int K = cell.vectors, channels = C > 0 ? C : cell.channels;
  const std::size_t row = keys.row, plane = std::size_t(cell.rows) * row;
  const std::size_t length = (K + cell.window) * kLanes, ring = cell.window * row;
  const float* query = cell.query + t * row;
  const float* near = scratch.keys + (t + dy + kMostRows) * row;
  std::int32_t* old = scratch.ring + slot * row;
  std::int32_t* V = scratch.columns;
  for (int v = 0; v < K; ++v) {
    const std::size_t at = std::size_t(v) * kLanes;
    Vec g[N] = {};
    for (int c = 0; c < channels; ++c) {
      const Vec x = load(query + c * plane + at);
#pragma GCC unroll 4
      for (int d = 0; d < N; ++d) g[d] += x * load(near + c * keys.plane + d * row + at);
    }
#pragma GCC unroll 4
    for (int d = 0; d < N; ++d) {
      const Units product = nearest(g[d]);
      std::int32_t* place = old + d * ring + at;
      store_units(V + d * length + at, load_units(V + d * length + at) + product - load_units(place));
      store_units(place, product);
    }
  }
#pragma GCC unroll 4
  for (int d = 0; d < N; ++d) {
    std::int32_t* line = V + d * length;
    for (int v = 0; v < cell.window - 1; ++v)
      store_units(line + (K + v) * kLanes, next_lane(load_units(line + v * kLanes)));
  }
}

inline void start_block(const FoldCell& cell, int count, FoldScratch& scratch) {
  const std::size_t row = std::size_t(cell.vectors) * kLanes;
  std::memset(scratch.ring, 0, count * cell.window * row * sizeof(std::int32_t));
  std::memset(scratch.columns, 0,
              count * (row + std::size_t(cell.window) * kLanes) * sizeof(std::int32_t));
}

// Logits of a row of patches relative to `peak`, in bits, into scratch.logits; returns their
// maximum in each lane.
template <bool kRest>
[[gnu::always_inline]] inline Vec row_logits(const FoldCell& cell, const std::int32_t* V,
                                             const std::int32_t* bias, const std::int32_t* peak,
                                             const float* rest, const FoldScratch& scratch) {
  const int K = cell.vectors, k = cell.window;
  const Vec scale = splat(cell.scale);
  Units even = {}, odd = {};
  int o = 0;
  for (; o + 2 <= k; o += 2) {
    even += load_units(V + o * kLanes);
    odd += load_units(V + (o + 1) * kLanes);
  }
  if (o < k) even += load_units(V + o * kLanes);
  Units S = even + odd;
  Vec top = splat(kNoPatch);
  for (int v = 0; v < K; ++v) {
    const std::size_t at = std::size_t(v) * kLanes;
    const Units units = S + (load_units(bias + at) - load_units(peak + at));
    Vec logit = to_float(units) * scale + load(scratch.mask + at);
    if (kRest) logit += load(rest + at);
    store(scratch.logits + at, logit);
    top = larger(top, logit);
    S += load_units(V + at + k * kLanes) - load_units(V + at);
  }
  return top;
}

// Raise the maxima that a row of logits exceeds by more than the headroom, as integers: a maximum
// rounded to a float would be wrong by as much as a logit. Logits have to be computed again. Rare.
[[gnu::noinline, gnu::cold]] inline void raise_peaks(const FoldCell& cell, const std::int32_t* V,
                                                     const std::int32_t* bias, std::int32_t* peak,
                                                     float* total, const float* logits) {
  Units S = {};
  for (int o = 0; o < cell.window; ++o) S += load_units(V + o * kLanes);
  for (int v = 0; v < cell.vectors; ++v) {
    const std::size_t at = std::size_t(v) * kLanes;
    const Units units = S + (load_units(bias + at) - load_units(peak + at));
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(logits[at + lane] > kFoldHeadroom)) continue;
      peak[at + lane] = std::int32_t(std::uint32_t(peak[at + lane]) + units[lane]);
      const float bits = float(std::int32_t(units[lane])) * cell.scale;
      total[at + lane] = bits > 126.0f ? 0.0f : total[at + lane] * float(__builtin_exp2(-bits));
    }
    S += load_units(V + at + cell.window * kLanes) - load_units(V + at);
  }
}

template <int C, int N>
[[gnu::noinline]] void normalise_block(const FoldCell& cell, const FoldKeys& keys, int dy,
                                       std::int32_t* peak, FoldScratch& scratch) {
  const FoldBlock<N> block(cell, keys, dy);
  if (block.first >= block.last) return;
  const int K = cell.vectors, k = cell.window;
  const std::size_t length = (K + k) * kLanes;
  start_block(cell, N, scratch);
  for (int t = block.first, slot = 0; t < block.last + k - 1; ++t, slot = slot + 1 < k ? slot + 1 : 0) {
    advance_products<C, N>(cell, keys, dy, t, slot, scratch);
    const int i = t - k + 1;
    if (i < block.first) continue;
    std::int32_t* row_peak = peak + i * keys.row;
    float* total = scratch.sums + i * keys.row;
    for (int d = 0; d < N; ++d) {
      if (!block.has(d, i)) continue;
      const std::int32_t* V = scratch.columns + d * length;
      const std::int32_t* bias = scratch.bias + (i + dy + d) * keys.row;
      const Vec top = row_logits<false>(cell, V, bias, row_peak, nullptr, scratch);
      if (!any_above(top, -cell.dead)) continue;
      if (__builtin_expect(any_above(top, kFoldHeadroom), 0)) {
        raise_peaks(cell, V, bias, row_peak, total, scratch.logits);
        row_logits<false>(cell, V, bias, row_peak, nullptr, scratch);
      }
      for (int v = 0; v < K; ++v) {
        const std::size_t at = std::size_t(v) * kLanes;
        store(total + at, load(total + at) + exp2(load(scratch.logits + at)));
      }
    }
  }
}

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

template <int C, int N>
[[gnu::noinline]] void accumulate_block(const FoldCell& cell, const FoldKeys& keys, int dy,
                                        const FoldNormaliser& z, FoldScratch& scratch) {
  const FoldBlock<N> block(cell, keys, dy);
  if (block.first >= block.last) return;
  const int K = cell.vectors, k = cell.window, channels = C > 0 ? C : cell.channels;
  const std::size_t row = keys.row, length = (K + k) * kLanes, ring = k * row;
  const std::size_t plane = std::size_t(cell.rows) * row;
  start_block(cell, N, scratch);
  int last_live[N];  // query row of the last weights that count
  for (int d = 0; d < N; ++d) last_live[d] = -k - 1;
  std::memset(scratch.live, 0, N * k);
  for (int t = block.first, slot = 0; t < block.last + 2 * (k - 1);
       ++t, slot = slot + 1 < k ? slot + 1 : 0) {
    if (t < block.last + k - 1) advance_products<C, N>(cell, keys, dy, t, slot, scratch);
    const int i = t - k + 1;
    if (i < block.first) continue;
    for (int d = 0; d < N; ++d) {
      scratch.live[d * k + slot] = false;
      if (block.has(d, i)) {
        const Vec top = row_logits<true>(cell, scratch.columns + d * length,
                                         scratch.bias + (i + dy + d) * row, z.whole + i * row,
                                         z.rest + i * row, scratch);
        if (any_above(top, -cell.dead)) {
          float* w = scratch.weights + d * ring + slot * row;
          for (int v = 0; v < K; ++v)
            store(w + v * kLanes, exp2(load(scratch.logits + v * kLanes)));
          scratch.live[d * k + slot] = true;
          last_live[d] = i;
        }
      }
      if (i - last_live[d] >= k) continue;
      const int count = gather_rows(cell, cell.taps, i, d, slot, scratch);
      const float* near = scratch.keys + (i + dy + d + kMostRows) * row;
      const std::size_t near_plane = keys.plane;
      float* out = scratch.sums + i * row;
      filter_row(cell, cell.taps, count, scratch, [=](int v, Vec weight) {
        for (int c = 0; c < channels; ++c) {
          float* place = out + c * plane + v * kLanes;
          store(place, load(place) + weight * load(near + c * near_plane + v * kLanes));
        }
      });
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
