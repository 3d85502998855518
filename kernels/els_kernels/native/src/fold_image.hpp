// Images of a fold: a thread's working memory, and the image that it works on, moved by a
// displacement. See fold_problem.hpp for units and layout.
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

// A thread's working memory.
struct FoldScratch {
  float* base;            // [C][padded][vectors][2] vectors: an image, its lanes twice
  std::int32_t* base_bias;  // [key_rows][vectors][2] vectors
  float* keys;            // [C][padded][vectors] vectors: the image moved by a displacement
  std::int32_t* bias;     // [key_rows][vectors] vectors
  float* mask;            // [vectors] vectors
  std::int32_t* ring;     // [kMostRows][window][vectors] vectors: products of the last rows
  std::int32_t* columns;  // [kMostRows][vectors + window] vectors: sums of V before each column
  float* logits;          // [vectors] vectors
  float* weights;         // [kMostRows][window + kGroup][vectors] vectors: of the last rows
  float* reach;           // [window + vectors] vectors: weights filtered along columns
  float* sums;            // [patch_rows][vectors] vectors, or the fold: [C][rows][vectors]
  std::int32_t* flushed;  // [patch_rows][vectors] vectors
  double* norms;          // [key_rows + 1][columns]
  float* running;         // [kMostRows][vectors] vectors: sums of the last rows' weights
  float* zeros;           // [vectors] vectors
  bool* live;             // [kMostRows][window + kGroup]: whether a slot of weights holds any
  float* taps;            // [window + kGroup]: of the rows of weights that reach a row
  const float** lines;    // [2][window + kGroup]: where these are
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
    weights = reinterpret_cast<float*>(take(kMostRows * (k + kGroup) * row));
    reach = reinterpret_cast<float*>(take(row + k * vec));
    sums = reinterpret_cast<float*>(take(cell.channels * most * row));
    flushed = reinterpret_cast<std::int32_t*>(take(cell.rows * row));
    norms = reinterpret_cast<double*>(take((cell.key_rows + 1) * row * 2));
    running = reinterpret_cast<float*>(take(kMostRows * row));
    zeros = reinterpret_cast<float*>(take(row));
    live = reinterpret_cast<bool*>(take(kMostRows * (k + kGroup)));
    taps = reinterpret_cast<float*>(take((k + kGroup) * sizeof(float)));
    lines = reinterpret_cast<const float**>(take(2 * (k + kGroup) * sizeof(float*)));
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

// Write an image's crop, and the bias of each of its patches, into base and base_bias.
inline void load_image(const FoldCell& cell, const FoldSource& source, std::int64_t image,
                       FoldScratch& scratch) {
  const int rows = source.crop_rows, cols = source.crop_cols, k = cell.window;
  const std::size_t row = std::size_t(2) * cell.vectors * kLanes;
  const std::size_t plane = (cell.key_rows + 2 * kMostRows) * row;
  std::memset(scratch.base, 0, cell.channels * plane * sizeof(float));
  std::memset(scratch.base_bias, 0, cell.key_rows * row * sizeof(std::int32_t));
  std::memset(scratch.zeros, 0, row / 2 * sizeof(float));
  double* norms = scratch.norms;  // [rows][cols]
  double* line = norms + std::size_t(cell.key_rows) * cell.vectors * kLanes;
  for (int i = 0; i < rows * cols; ++i) norms[i] = 0.0;
  const float* pixels = source.images + image * cell.channels * source.height * source.width;
  for (int c = 0; c < cell.channels; ++c, pixels += source.height * source.width)
    for (int i = 0; i < rows; ++i) {
      if (source.rows[i] < 0) continue;
      const float* from = pixels + source.rows[i] * source.width;
      float* to = scratch.base + c * plane + (i + kMostRows) * row;
      for (int j = 0; j < cols; ++j) {
        if (source.cols[j] < 0) continue;
        const float value = from[source.cols[j]];
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

}  // namespace
