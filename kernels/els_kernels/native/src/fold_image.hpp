// An image of a fold's bank in the layout of the kernel, moved by displacements; see fold_problem.hpp.
#pragma once

#include "fold_problem.hpp"
#include "scratch.hpp"
#include "units.hpp"

namespace {

using els::FoldCell;
using els::FoldSource;
using els::FoldUnit;

constexpr int kMostRows = 4;        // displacements that a pass works on together, at most
constexpr int kGroup = 4;           // rows of pixels that weights are filtered for together
constexpr float kNoPatch = -1e30f;  // added to the logit of what is no patch

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

// A thread's working memory. Rows of keys, before they are moved, have `lanes` numbers in the place of
// a vector: as many columns as there are keys.
struct FoldScratch {
  float* base;              // [C][padded][vectors][lanes]: an image
  std::int32_t* base_bias;  // [key_rows][vectors][lanes]
  float* keys;              // [C][padded][vectors] vectors: the image moved by a displacement
  std::int32_t* bias;       // [key_rows][vectors] vectors
  float* mask;              // [vectors] vectors
  std::int32_t* ring;       // [kMostRows][window][vectors] vectors: products of the last rows
  std::int32_t* columns;    // [kMostRows][vectors + window] vectors: sums of V before each column
  float* logits;            // [kMostRows][vectors] vectors
  float* weights;           // [kMostRows][window + kGroup][vectors] vectors: of the last rows
  float* reach;             // [kMostRows][window + vectors] vectors: weights, continued to the left
  float* rest;              // [patch_rows][vectors] vectors: see mask_rest
  float* sums;              // [patch_rows][vectors] vectors, or planes of them: [planes][rows][vectors]
  std::int32_t* flushed;    // [patch_rows][vectors] vectors
  double* norms;            // [key_rows + 2][key_cols]
  float* running;           // [kMostRows][vectors] vectors: sums of the last rows of weights
  float* zeros;             // [vectors] vectors
  bool* live;               // [kMostRows][window + kGroup]: whether a slot of weights holds any
  float* taps;              // [window + kGroup]: of the rows of weights that reach a row
  const float** lines;      // [2][window + kGroup]: where these are
  std::size_t bytes = 0;

  FoldScratch(const FoldCell& cell, int planes, char* memory) {
    const std::size_t row = std::size_t(cell.vectors) * kLanes * sizeof(float);
    const std::size_t vec = kLanes * sizeof(float), k = cell.window;
    const std::size_t padded = cell.key_rows + 2 * kMostRows;
    const std::size_t most = cell.rows > cell.key_rows ? cell.rows : cell.key_rows;
    const std::size_t line = cell.key_cols * sizeof(float);
    base = take<float>(memory, cell.channels * padded * line);
    base_bias = take<std::int32_t>(memory, cell.key_rows * line);
    keys = take<float>(memory, cell.channels * padded * row);
    bias = take<std::int32_t>(memory, cell.key_rows * row);
    mask = take<float>(memory, row);
    ring = take<std::int32_t>(memory, kMostRows * k * row);
    columns = take<std::int32_t>(memory, kMostRows * (row + k * vec));
    logits = take<float>(memory, kMostRows * row);
    weights = take<float>(memory, kMostRows * (k + 2 * kGroup) * row);
    reach = take<float>(memory, kMostRows * (row + k * vec));
    rest = take<float>(memory, cell.rows * row);
    sums = take<float>(memory, planes * most * row);
    flushed = take<std::int32_t>(memory, cell.rows * row);
    norms = take<double>(memory, (cell.key_rows + 2) * line * 2);
    running = take<float>(memory, kMostRows * row);
    zeros = take<float>(memory, row);
    live = take<bool>(memory, 2 * kMostRows * (k + 2 * kGroup));
    taps = take<float>(memory, (k + kGroup) * sizeof(float));
    lines = take<const float*>(memory, 3 * (k + 2 * kGroup) * sizeof(float*));
  }

 protected:
  // Cut from `memory`; from null only to learn how many bytes it takes. A cache line more each time, so
  // that their rows do not share the sets of the cache.
  template <class T>
  T* take(char* memory, std::size_t size) {
    char* at = memory == nullptr ? nullptr : memory + bytes;
    bytes += (size + 63) / 64 * 64 + 64;
    return reinterpret_cast<T*>(at);
  }
};

// The image that a thread works on, moved by one displacement.
struct FoldKeys {
  int patch_rows, first_row, last_row;
  const std::int32_t* classes;  // of rows
  std::size_t plane, row;       // floats
};

// Write columns first … last of a line to their lanes.
template <class From, class To>
inline void stripe(const FoldCell& cell, const From* line, int first, int last, To* to) {
  const int K = cell.vectors, lanes = cell.key_cols / K;
  for (int lane = first / K, x = first; x < last; ++lane)
    for (int v = x - lane * K; v < K && x < last; ++v, ++x)
      to[std::size_t(v) * lanes + lane] = To(line[x]);
}

// One number of the images of a source, less the centre of its channel.
inline float centred(const FoldCell& cell, const FoldSource& source, int channel, std::int64_t at) {
  if (cell.values != nullptr)
    return cell.values[256 * channel + static_cast<const std::uint8_t*>(source.images)[at]];
  return static_cast<const float*>(source.images)[at] - cell.centre[channel];
}

// Write an image's lines, and the bias of each of its patches, into base and base_bias: the columns that
// the displacements of a unit reach.
inline void load_image(const FoldCell& cell, const FoldUnit& unit, FoldScratch& scratch) {
  const FoldSource& source = *unit.source;
  const int rows = source.crop_rows, k = cell.window, first_col = unit.first;
  const int cols = least(source.crop_cols, unit.last - 1 + cell.vectors * kLanes);
  const std::size_t row = cell.key_cols, plane = (cell.key_rows + 2 * kMostRows) * row;
  std::memset(scratch.base, 0, cell.channels * plane * sizeof(float));
  std::memset(scratch.base_bias, 0, cell.key_rows * row * sizeof(std::int32_t));
  std::memset(scratch.zeros, 0, std::size_t(cell.vectors) * kLanes * sizeof(float));
  double* norms = scratch.norms;  // [rows][cols]
  double* line = norms + cell.key_rows * row;
  float* pixels = reinterpret_cast<float*>(line);
  std::memset(norms, 0, rows * row * sizeof(double));
  const std::int64_t numbers = std::int64_t(source.height) * source.width;
  std::int64_t first = unit.image * cell.channels * numbers;  // of the channel
  for (int c = 0; c < cell.channels; ++c, first += numbers)
    for (int i = 0; i < rows; ++i) {
      if (source.rows[i] < 0) continue;
      const std::int64_t from = first + std::int64_t(source.rows[i]) * source.width;
      for (int j = first_col; j < cols; ++j)
        pixels[j] = source.cols[j] < 0 ? 0.0f : centred(cell, source, c, from + source.cols[j]);
      for (int j = first_col; j < cols; ++j) norms[i * row + j] += double(pixels[j]) * pixels[j];
      stripe(cell, pixels, first_col, cols, scratch.base + c * plane + (i + kMostRows) * row);
    }
  double* bias = line + row;
  for (int j = first_col; j < cols; ++j) line[j] = 0.0;
  for (int i = 0; i < rows; ++i) {
    // Sums of float squares in double precision: what running sums lose is far below one unit.
    for (int j = first_col; j < cols; ++j) {
      line[j] += norms[i * row + j];
      if (i >= k) line[j] -= norms[(i - k) * row + j];
    }
    if (i < k - 1) continue;
    double sum = 0.0;
    for (int j = first_col; j < cols; ++j) {
      sum += line[j];
      if (j >= first_col + k) sum -= line[j - k];
      const double units = sum * cell.bias;
      if (j >= first_col + k - 1)
        bias[j - k + 1] =
            std::int32_t(std::uint32_t(std::int64_t(units < 0 ? units - 0.5 : units + 0.5)));
    }
    stripe(cell, bias, first_col, cols - k + 1, scratch.base_bias + (i - k + 1) * row);
  }
}

// Move base by dx columns into keys and bias, and mask what is no pair of patches.
inline FoldKeys move_image(const FoldCell& cell, const FoldSource& source, int dx,
                           FoldScratch& scratch) {
  const int K = cell.vectors, lanes = cell.key_cols / K, shift = dx % K;
  const std::size_t row = std::size_t(K) * kLanes, line = cell.key_cols;
  const int padded = cell.key_rows + 2 * kMostRows, last = source.crop_rows + 2 * kMostRows;
  const int patch_rows = source.crop_rows - cell.window + 1;
  const int patch_cols = source.crop_cols - cell.window + 1;
  for (int v = 0; v < K; ++v) {
    const bool wraps = v + shift >= K;
    const int from = wraps ? v + shift - K : v + shift;
    const std::size_t at = std::size_t(from) * lanes + dx / K + wraps, to = std::size_t(v) * kLanes;
    for (int c = 0; c < cell.channels; ++c)
      for (int i = 0; i < last; ++i) {
        const std::size_t n = std::size_t(c) * padded + i;
        std::memcpy(scratch.keys + n * row + to, scratch.base + n * line + at,
                    kLanes * sizeof(float));
      }
    for (int i = 0; i < patch_rows; ++i)
      std::memcpy(scratch.bias + i * row + to, scratch.base_bias + i * line + at,
                  kLanes * sizeof(float));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int q = lane * K + v, u = q + dx;
      const bool pair = u < patch_cols && cell.col_classes[q] == source.col_classes[u];
      scratch.mask[to + lane] = pair ? 0.0f : kNoPatch;
    }
  }
  return {patch_rows, source.first_row, source.last_row, source.row_classes, padded * row, row};
}

// A block of `N` vertical displacements from dy on: which query patches each has keys for.
template <int N>
struct FoldBlock {
  const std::int32_t *query, *keys;
  int first, last;
  int from[N], to[N];

  FoldBlock(const FoldCell& cell, const FoldKeys& image, int dy)
      : query(cell.row_classes), keys(image.classes + dy) {
    first = cell.patch_rows(), last = 0;
    for (int d = 0; d < N; ++d) {
      from[d] = most(0, -dy - d);
      to[d] = dy + d < image.last_row ? least(cell.patch_rows(), image.patch_rows - dy - d) : 0;
      while (from[d] < to[d] && !pairs(d, from[d])) ++from[d];
      while (from[d] < to[d] && !pairs(d, to[d] - 1)) --to[d];
      if (from[d] < to[d]) first = least(first, from[d]), last = most(last, to[d]);
    }
  }
  bool pairs(int d, int i) const { return query[i] == keys[i + d]; }
  bool has(int d, int i) const { return i >= from[d] && i < to[d] && pairs(d, i); }
};

// Call work(dy) for each block of `count` vertical displacements, until the control is stopped.
template <class Work>
void for_each_block(const FoldKeys& keys, int count, Control& control, Work work) {
  for (int dy = keys.first_row; dy < keys.last_row && advance(control); dy += count) work(dy);
}

// Call work(keys, dx) for every displacement of a unit.
template <class Work>
void for_each_shift(const FoldCell& cell, const FoldUnit& unit, Control& control,
                    FoldScratch& scratch, Work work) {
  const FlushToZero flush_to_zero;
  load_image(cell, unit, scratch);
  for (int dx = unit.first; dx < unit.last && !is_stopped(control); ++dx)
    work(move_image(cell, *unit.source, dx, scratch), dx);
}

}  // namespace
