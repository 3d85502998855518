// Patch attention with a fold: box sums of products for each displacement, and weights filtered by
// the taps of the fold for each displacement, so that no mean patch is formed.
//
//     g(v) = Σ_c x_c(v)·φ_c(v + δ)     V += g(new row) - g(old row)     S += V(right) - V(left)
//     A(p) = Σ_q taps(p - q)·2^(S + bias - log Z)(q)                    D(p) += A(p)·φ(p + δ)
//
// V and S are integers, so that running sums are exact; see fold_problem.hpp for units and layout.
#pragma once

#include "fold_problem.hpp"
#include "scratch.hpp"
#include "units.hpp"

namespace {

using els::FoldCell;
using els::FoldNormaliser;
using els::FoldSource;
using els::FoldSums;
using els::FoldUnit;

constexpr int kMostRows = 4;          // displacements that a pass works on together, at most
constexpr float kNoPatch = -1e30f;    // added to the logit of what is no patch
constexpr float kFoldHeadroom = 10.0f;  // bits by which a logit may exceed the running maximum

// The column to the right of, or to the left of, the last or first vector of a row.
template <class V>
[[gnu::always_inline]] inline V next_lane(V v) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return (V)_mm512_alignr_epi32((__m512i)v, (__m512i)v, 1);
#elif defined(__AVX2__)
  return (V)_mm256_permutevar8x32_epi32((__m256i)v, _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0));
#else
  return __builtin_shufflevector(v, v, 1, 2, 3, 0);
#endif
}
template <class V>
[[gnu::always_inline]] inline V last_lane(V v) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return (V)_mm512_alignr_epi32((__m512i)v, (__m512i)v, 15);
#elif defined(__AVX2__)
  return (V)_mm256_permutevar8x32_epi32((__m256i)v, _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6));
#else
  return __builtin_shufflevector(v, v, 3, 0, 1, 2);
#endif
}

// A thread's working memory.
struct FoldScratch {
  float* base;            // [C][padded][vectors][2] vectors: an image, its lanes twice
  std::int32_t* base_bias;  // [key_rows][vectors][2] vectors
  float* keys;            // [C][padded][vectors] vectors: the image moved by a displacement
  std::int32_t* bias;     // [key_rows][vectors] vectors
  float* mask;            // [vectors] vectors
  std::int32_t* ring;     // [kMostRows][window][vectors] vectors: products of the last rows
  std::int32_t* columns;  // [kMostRows][vectors + window] vectors: V, continued past its end
  float* logits;          // [vectors] vectors
  float* weights;         // [kMostRows][window][vectors] vectors: of the last rows
  float* reach;           // [window + vectors] vectors: weights filtered along columns
  float* sums;            // [patch_rows][vectors] vectors, or the fold: [C][rows][vectors]
  std::int32_t* flushed;  // [patch_rows][vectors] vectors
  double* norms;          // [key_rows + 1][columns]
  bool* live;             // [kMostRows][window]: whether a slot of the ring of weights holds any
  float* taps;            // [window]: of the rows of weights that reach a row
  const float** lines;    // [window]: where these are
  std::size_t bytes = 0;

  FoldScratch(const FoldCell& cell, char* memory) {
    auto take = [&](std::size_t size) {
      char* at = memory == nullptr ? nullptr : memory + bytes;
      // A cache line more each time, so that their rows do not share the sets of the cache.
      bytes += (size + 63) / 64 * 64 + 64;
      return at;
    };
    const std::size_t row = std::size_t(cell.vectors) * kLanes * sizeof(float);
    const std::size_t vec = kLanes * sizeof(float), k = cell.window;
    const std::size_t padded = cell.key_rows + 2 * kMostRows;
    const std::size_t most = cell.rows > cell.key_rows ? cell.rows : cell.key_rows;
    base = reinterpret_cast<float*>(take(2 * cell.channels * padded * row));
    base_bias = reinterpret_cast<std::int32_t*>(take(2 * cell.key_rows * row));
    keys = reinterpret_cast<float*>(take(cell.channels * padded * row));
    bias = reinterpret_cast<std::int32_t*>(take(cell.key_rows * row));
    mask = reinterpret_cast<float*>(take(row));
    ring = reinterpret_cast<std::int32_t*>(take(kMostRows * k * row));
    columns = reinterpret_cast<std::int32_t*>(take(kMostRows * (row + k * vec)));
    logits = reinterpret_cast<float*>(take(row));
    weights = reinterpret_cast<float*>(take(kMostRows * k * row));
    reach = reinterpret_cast<float*>(take(row + k * vec));
    sums = reinterpret_cast<float*>(take(cell.channels * most * row));
    flushed = reinterpret_cast<std::int32_t*>(take(cell.rows * row));
    norms = reinterpret_cast<double*>(take((cell.key_rows + 1) * row * 2));
    live = reinterpret_cast<bool*>(take(kMostRows * k));
    taps = reinterpret_cast<float*>(take(k * sizeof(float)));
    lines = reinterpret_cast<const float**>(take(k * sizeof(float*)));
  }
};

// The image that a thread works on, moved by one displacement.
struct FoldKeys {
  int crop_rows, patch_rows, patch_cols;
  std::size_t plane, row;  // floats
};

inline std::size_t striped(const FoldCell& cell, int x) {
  return std::size_t(x % cell.vectors) * kLanes + x / cell.vectors;
}

// One number of the images of a source, less the centre of its channel.
inline float centred(const FoldCell& cell, const FoldSource& source, int channel, std::int64_t at) {
  if (cell.values != nullptr)
    return cell.values[256 * channel + static_cast<const std::uint8_t*>(source.images)[at]];
  return static_cast<const float*>(source.images)[at] - cell.centre[channel];
}

// Write an image's crop, and the bias of each of its patches, into base and base_bias.
inline void load_image(const FoldCell& cell, const FoldSource& source, std::int64_t image,
                       FoldScratch& scratch) {
  const int rows = source.crop_rows, cols = source.crop_cols, k = cell.window;
  const std::size_t row = std::size_t(2) * cell.vectors * kLanes;
  const std::size_t plane = (cell.key_rows + 2 * kMostRows) * row;
  std::memset(scratch.base, 0, cell.channels * plane * sizeof(float));
  std::memset(scratch.base_bias, 0, cell.key_rows * row * sizeof(std::int32_t));
  double* norms = scratch.norms;  // [rows][cols]
  double* line = norms + std::size_t(cell.key_rows) * cell.vectors * kLanes;
  for (int i = 0; i < rows * cols; ++i) norms[i] = 0.0;
  const std::int64_t pixels = std::int64_t(source.height) * source.width;
  std::int64_t first = image * cell.channels * pixels;  // of the channel
  for (int c = 0; c < cell.channels; ++c, first += pixels)
    for (int i = 0; i < rows; ++i) {
      if (source.rows[i] < 0) continue;
      const std::int64_t line = first + std::int64_t(source.rows[i]) * source.width;
      float* to = scratch.base + c * plane + (i + kMostRows) * row;
      for (int j = 0; j < cols; ++j) {
        if (source.cols[j] < 0) continue;
        const float value = centred(cell, source, c, line + source.cols[j]);
        const int v = j % cell.vectors, lane = j / cell.vectors;
        to[2 * v * kLanes + lane] = to[(2 * v + 1) * kLanes + lane] = value;
        norms[i * cols + j] += double(value) * value;
      }
    }
  for (int j = 0; j < cols; ++j) line[j] = 0.0;
  for (int i = 0; i < rows; ++i) {
    // Sums of float squares in double precision: what running sums lose is far below one unit.
    for (int j = 0; j < cols; ++j) {
      line[j] += norms[i * cols + j];
      if (i >= k) line[j] -= norms[(i - k) * cols + j];
    }
    if (i < k - 1) continue;
    std::int32_t* to = scratch.base_bias + (i - k + 1) * row;
    double sum = 0.0;
    for (int j = 0; j < cols; ++j) {
      sum += line[j];
      if (j >= k) sum -= line[j - k];
      if (j < k - 1) continue;
      const int u = j - k + 1, v = u % cell.vectors, lane = u / cell.vectors;
      const double units = sum * cell.bias;
      const auto bias = std::int32_t(std::uint32_t(std::int64_t(units < 0 ? units - 0.5 : units + 0.5)));
      to[2 * v * kLanes + lane] = to[(2 * v + 1) * kLanes + lane] = bias;
    }
  }
}

// Rotate base by dx columns into keys and bias, and mask what is no patch.
inline FoldKeys move_image(const FoldCell& cell, const FoldSource& source, int dx,
                           FoldScratch& scratch) {
  const int K = cell.vectors, lanes = dx / K, shift = dx % K;
  const std::size_t row = std::size_t(K) * kLanes;
  const int padded = cell.key_rows + 2 * kMostRows;
  const int last = source.crop_rows + 2 * kMostRows;
  for (int v = 0; v < K; ++v) {
    const int from = v + shift < K ? v + shift : v + shift - K;
    const int lane = (lanes + (v + shift >= K)) % kLanes;
    const std::size_t at = std::size_t(2) * from * kLanes + lane, to = std::size_t(v) * kLanes;
    for (int c = 0; c < cell.channels; ++c)
      for (int i = 0; i < last; ++i) {
        const std::size_t line = std::size_t(c) * padded + i;
        std::memcpy(scratch.keys + line * row + to, scratch.base + 2 * line * row + at,
                    kLanes * sizeof(float));
      }
    for (int i = 0; i <= source.crop_rows - cell.window; ++i)
      std::memcpy(scratch.bias + i * row + to, scratch.base_bias + 2 * i * row + at,
                  kLanes * sizeof(float));
    for (int lane_ = 0; lane_ < kLanes; ++lane_) {
      const int q = lane_ * K + v, u = (q + dx) % (K * kLanes);
      const bool valid = q < cell.patch_cols() && u <= source.crop_cols - cell.window;
      scratch.mask[to + lane_] = valid ? 0.0f : kNoPatch;
    }
  }
  return {source.crop_rows, source.crop_rows - cell.window + 1, source.crop_cols - cell.window + 1,
          padded * row, row};
}

// A block of `N` vertical displacements from dy on: which query patches each has keys for.
template <int N>
struct FoldBlock {
  int dy, first, last;
  int from[N], to[N];

  FoldBlock(const FoldCell& cell, const FoldKeys& keys, int dy_, int end) : dy(dy_) {
    first = cell.patch_rows(), last = 0;
    for (int d = 0; d < N; ++d) {
      from[d] = most(0, -dy - d);
      to[d] = dy + d < end ? least(cell.patch_rows(), keys.patch_rows - dy - d) : from[d];
      if (from[d] < to[d]) first = least(first, from[d]), last = most(last, to[d]);
    }
  }
  bool has(int d, int i) const { return i >= from[d] && i < to[d]; }
};

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
[[gnu::noinline]] void normalise_block(const FoldCell& cell, const FoldKeys& keys, int dy, int end,
                                       std::int32_t* peak, FoldScratch& scratch) {
  const FoldBlock<N> block(cell, keys, dy, end);
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

// Call out(v, weight) with the weights that reach row p, filtered by the taps of both axes.
template <class Out>
[[gnu::always_inline]] inline void filter_row(const FoldCell& cell, int taps, FoldScratch& scratch,
                                              Out out) {
  const int K = cell.vectors, k = cell.window;
  float* reach = scratch.reach + (k - 1) * kLanes;
  const float* row_taps = scratch.taps;
  const float* const* lines = scratch.lines;
  filter(K, taps, [=](int o, int) { return splat(row_taps[o]); }, [=](int o) { return lines[o]; },
         [=](int v, Vec sum) { store(reach + v * kLanes, sum); });
  for (int j = 1; j < k; ++j)
    store(reach - j * kLanes, last_lane(load(reach + (K - j) * kLanes)));
  const float* col_taps = cell.col_taps;
  auto line = [=](int o) { return reach - o * kLanes; };
  if (cell.table_taps)
    return filter(K, k,
                  [=](int o, int v) { return load(col_taps + (std::size_t(o) * K + v) * kLanes); },
                  line, out);
  if (!cell.uniform_taps)
    return filter(K, k, [=](int o, int) { return splat(col_taps[o]); }, line, out);
  // Weights are not negative, and the sum restarts in each row: nothing cancels.
  Vec sum = {};
  for (int o = 1; o < k; ++o) sum += load(reach - o * kLanes);
  for (int v = 0; v < K; ++v) {
    sum += load(reach + v * kLanes);
    out(v, sum);
    sum -= load(reach + (v - k + 1) * kLanes);
  }
}

template <int C, int N>
[[gnu::noinline]] void accumulate_block(const FoldCell& cell, const FoldKeys& keys, int dy, int end,
                                        const FoldNormaliser& z, FoldScratch& scratch) {
  const FoldBlock<N> block(cell, keys, dy, end);
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
      int taps = 0;
      for (int o = 0, s = slot; o < k; ++o, s = s > 0 ? s - 1 : k - 1)
        if (scratch.live[d * k + s]) {
          scratch.taps[taps] = cell.row_taps[i * k + o];
          scratch.lines[taps++] = scratch.weights + d * ring + s * row;
        }
      const float* near = scratch.keys + (i + dy + d + kMostRows) * row;
      const std::size_t near_plane = keys.plane;
      float* out = scratch.sums + i * row;
      filter_row(cell, taps, scratch, [=](int v, Vec weight) {
        for (int c = 0; c < channels; ++c) {
          float* place = out + c * plane + v * kLanes;
          store(place, load(place) + weight * load(near + c * near_plane + v * kLanes));
        }
      });
    }
  }
}

// Call work(dy, end) for each block of N vertical displacements, until the control is stopped.
template <class Work>
void for_each_block(const FoldCell& cell, const FoldKeys& keys, int count, Control& control,
                    Work work) {
  const int low = cell.same_rows ? 0 : 1 - cell.patch_rows();
  const int high = cell.same_rows ? 1 : keys.patch_rows;
  for (int dy = low; dy < high && advance(control); dy += count) work(dy, high);
}

template <int C>
void fold_normalise_unit(const FoldCell& cell, const FoldKeys& keys, Control& control,
                         FoldSums sums, FoldScratch& scratch) {
  const std::size_t count = cell.patch_rows() * keys.row;
  std::memset(scratch.sums, 0, count * sizeof(float));
  std::memcpy(scratch.flushed, sums.peak, count * sizeof(std::int32_t));
  if (cell.same_rows)
    for_each_block(cell, keys, 1, control, [&](int dy, int end) {
      normalise_block<C, 1>(cell, keys, dy, end, sums.peak, scratch);
    });
  else
    for_each_block(cell, keys, 4, control, [&](int dy, int end) {
      normalise_block<C, 4>(cell, keys, dy, end, sums.peak, scratch);
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
  if (cell.same_rows)
    for_each_block(cell, keys, 1, control, [&](int dy, int end) {
      accumulate_block<C, 1>(cell, keys, dy, end, z, scratch);
    });
  else
    for_each_block(cell, keys, 2, control, [&](int dy, int end) {
      accumulate_block<C, 2>(cell, keys, dy, end, z, scratch);
    });
  for (std::size_t i = 0; i < cell.channels * count; ++i)
    fold[i] += double(scratch.sums[i]) * cell.col_scale[i % keys.row];
}

std::size_t fold_scratch_bytes(const FoldCell& cell) { return FoldScratch(cell, nullptr).bytes; }

// Call work(keys) for every displacement of a unit.
template <class Work>
void for_each_shift(const FoldCell& cell, const FoldUnit& unit, Control& control,
                    FoldScratch& scratch, Work work) {
  const FlushToZero flush_to_zero;
  load_image(cell, *unit.source, unit.image, scratch);
  for (int dx = unit.first; dx < unit.last && !is_stopped(control); ++dx)
    work(move_image(cell, *unit.source, dx, scratch));
}

void fold_normalise(const FoldCell& cell, const FoldUnit& unit, Control& control, char* memory,
                    FoldSums sums) {
  FoldScratch scratch(cell, memory);
  for_each_shift(cell, unit, control, scratch, [&](const FoldKeys& keys) {
    switch (cell.channels) {
      case 1: return fold_normalise_unit<1>(cell, keys, control, sums, scratch);
      case 3: return fold_normalise_unit<3>(cell, keys, control, sums, scratch);
      default: return fold_normalise_unit<0>(cell, keys, control, sums, scratch);
    }
  });
}

void fold_accumulate(const FoldCell& cell, const FoldUnit& unit, Control& control, char* memory,
                     const FoldNormaliser& z, double* fold) {
  FoldScratch scratch(cell, memory);
  for_each_shift(cell, unit, control, scratch, [&](const FoldKeys& keys) {
    switch (cell.channels) {
      case 1: return fold_accumulate_unit<1>(cell, keys, control, z, fold, scratch);
      case 3: return fold_accumulate_unit<3>(cell, keys, control, z, fold, scratch);
      default: return fold_accumulate_unit<0>(cell, keys, control, z, fold, scratch);
    }
  });
}

}  // namespace
