// Windows that are the whole image: one logit for an image (ideal) or for an image and shift
// (equivariant), the same for every pixel. These are matrix products,
// blocked so that a loaded vector is used several times.
#pragma once

#include "windows.hpp"

namespace {

// The softmax sums of a whole-image window: one weight for all pixels, kept until the end.
struct Shared {
  float peak = kNoPeak;
  double weight = 0.0;

  // Absorb a new maximum; returns what the old sums must be scaled by.
  double raise(float top) {
    if (top <= peak) return 1.0;
    const double scale = __builtin_exp2(double(peak) - double(top));
    peak = top;
    weight *= scale;
    return scale;
  }

  void spread(std::size_t pixels, Partial out) const {
    for (std::size_t u = 0; u < pixels; ++u) {
      out.peak[u] = peak;
      out.sums[u] = weight;
    }
  }
};

inline bool is_zero(Vec v) { return !any_above(v, 0.0f); }  // of weights, which are never negative

// Σ φ·(q + bias·φ) over all values of `count` tiles: their logits. Rows are summed apart, so that
// errors grow with the square root of a row and not of the image.
template <int D>
void whole_logits(const Bank& bank, const Query& query, const float* tile, float* logits) {
  const std::size_t rows = std::size_t(bank.channels) * bank.height, stream = tile_floats(bank);
  Vec total[D] = {};
  for (std::size_t row = 0; row < rows; ++row) {
    Vec sum[D] = {};
    for (int j = 0; j < bank.width; ++j) {
      const std::size_t v = row * bank.width + j;
      for (int d = 0; d < D; ++d) {
        const Vec p = load(tile + d * stream + v * kLanes);
        sum[d] += p * (p * query.bias + query.scaled[v]);
      }
    }
    for (int d = 0; d < D; ++d) total[d] += sum[d];
  }
  for (int d = 0; d < D; ++d) store(logits + d * kLanes, total[d]);
}

constexpr int kWholeGroup = 64;  // tiles whose logits are held at once

// The ideal machine: the response of every image is itself.
inline void whole_same(const Bank& bank, const Query& query, std::int64_t first,
                       std::int64_t last, Control& control, Partial out) {
  const std::size_t pixels = bank.pixels(), values = bank.channels * pixels;
  Shared shared;
  std::memset(out.sums, 0, (pixels + values) * sizeof(double));
  alignas(64) float logits[kWholeGroup * kLanes];
  for (std::int64_t begin = first; begin < last && advance(control); begin += kWholeGroup) {
    const int count = int(last - begin < kWholeGroup ? last - begin : kWholeGroup);
    const float* tiles = bank.data + begin * tile_floats(bank);
    int t = 0;
    for (; t + 4 <= count; t += 4)
      whole_logits<4>(bank, query, tiles + t * tile_floats(bank), logits + t * kLanes);
    for (; t < count; ++t)
      whole_logits<1>(bank, query, tiles + t * tile_floats(bank), logits + t * kLanes);
    Vec top = splat(kForbidden);
    for (t = 0; t < count; ++t) {
      const Vec logit = load(logits + t * kLanes) + lane_bias(begin + t, query);
      store(logits + t * kLanes, logit);
      top = larger(top, logit);
    }
    const double scale = shared.raise(lane_max(top));
    for (t = 0; t < count; ++t) {
      const Vec weight = exp2(load(logits + t * kLanes) - splat(shared.peak));
      store(logits + t * kLanes, weight);
      shared.weight += lane_sum(weight);
    }
    // Eight values at a time, so that their sums stay in registers from tile to tile.
    for (std::size_t v = 0; v < values; v += 8) {
      const int width = int(values - v < 8 ? values - v : 8);
      Vec sum[8] = {};
      for (t = 0; t < count; ++t) {
        const Vec weight = load(logits + t * kLanes);
        if (is_zero(weight)) continue;
        const float* key = tiles + t * tile_floats(bank) + v * kLanes;
        if (width == 8) {
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) sum[i] += weight * load(key + i * kLanes);
        } else {
          for (int i = 0; i < width; ++i) sum[i] += weight * load(key + i * kLanes);
        }
      }
      double* sums = out.sums + pixels + v;
      for (int i = 0; i < width; ++i) sums[i] = sums[i] * scale + lane_sum(sum[i]);
    }
  }
  shared.spread(pixels, out);
}

constexpr int kShifts = 8;  // neighbouring shifts, or pixels, that share what they load

// logits[py][px] = Σ_u q[u]·φ[u+p] for kShifts (or fewer) shifts of one tile; the query's rows are
// doubled so that a shift never wraps:  doubled[c][i][j] = q[c][i][j mod W].
template <int D>
void shift_logits(const Bank& bank, const float* doubled, const float* tile, int py, int px,
                  float* logits) {
  const int height = bank.height, width = bank.width;
  Vec total[D] = {};
  for (int c = 0; c < bank.channels; ++c)
    for (int i = 0; i < height; ++i) {
      const float* key = tile + (std::size_t(c) * height + i) * width * kLanes;
      const float* query =
          doubled + (std::size_t(c) * height + wrap(i - py, height)) * 2 * width + width - px;
      Vec sum[D] = {};
      for (int j = 0; j < width; ++j) {
        const Vec p = load(key + j * kLanes);
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) sum[d] += p * query[j - d];
      }
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) total[d] += sum[d];
    }
  for (int d = 0; d < D; ++d) store(logits + (py * width + px + d) * kLanes, total[d]);
}

// sums[u] += Σ_p weight[p]·φ[u+p] for D neighbouring pixels u of one row and channel.
template <int D>
void shift_responses(const Bank& bank, const float* padded, const float* weights, int c, int i,
                     int j, double scale, double* sums) {
  const int height = bank.height, width = bank.width;
  Vec total[D] = {};
  for (int py = 0; py < height; ++py) {
    const float* row =
        padded + ((std::size_t(c) * height + wrap(i + py, height)) * 2 * width + j) * kLanes;
    for (int px = 0; px < width; ++px) {
      const Vec weight = load(weights + (py * width + px) * kLanes);
      if (is_zero(weight)) continue;
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) total[d] += weight * load(row + (px + d) * kLanes);
    }
  }
  for (int d = 0; d < D; ++d) sums[d] = sums[d] * scale + lane_sum(total[d]);
}

// Scratch of whole_every: doubled query, doubled tile, weights.
inline std::size_t whole_scratch_floats(const Bank& bank) {
  const std::size_t pixels = bank.pixels();
  return 2 * bank.channels * pixels * (1 + kLanes) + pixels * kLanes + 64;
}

// The equivariant machine: every cyclic shift of every image is a source.
inline void whole_every(const Bank& bank, const Query& query, std::int64_t first,
                        std::int64_t last, Control& control, float* scratch, Partial out) {
  const std::size_t pixels = bank.pixels(), values = bank.channels * pixels;
  const int height = bank.height, width = bank.width;
  float* weights = scratch;
  float* padded = weights + pixels * kLanes;
  float* doubled = padded + 2 * values * kLanes;
  Shared shared;
  std::memset(out.sums, 0, (pixels + values) * sizeof(double));
  for (std::size_t v = 0; v < values; ++v) {
    const std::size_t at = v / width * 2 * width + v % width;
    doubled[at] = doubled[at + width] = query.scaled[v];
  }
  for (std::int64_t tile = first; tile < last && !is_stopped(control); ++tile) {
    const float* keys = bank.data + tile * tile_floats(bank);
    Vec norm = {};
    for (std::size_t row = 0; row < values; row += width) {
      Vec sum = {};
      for (int j = 0; j < width; ++j) {
        const Vec p = load(keys + (row + j) * kLanes);
        sum += p * p;
        store(padded + (2 * row + j) * kLanes, p);
        store(padded + (2 * row + width + j) * kLanes, p);
      }
      norm += sum;
    }
    const Vec bias = norm * query.bias + lane_bias(tile, query);
    for (int py = 0; py < height && advance(control); ++py) {
      int px = 0;
      for (; px + kShifts <= width; px += kShifts)
        shift_logits<kShifts>(bank, doubled, keys, py, px, weights);
      for (; px < width; ++px) shift_logits<1>(bank, doubled, keys, py, px, weights);
    }
    Vec top = splat(kForbidden);
    for (std::size_t p = 0; p < pixels; ++p) top = larger(top, load(weights + p * kLanes) + bias);
    const double scale = shared.raise(lane_max(top));
    Vec sum = {};
    for (std::size_t p = 0; p < pixels; ++p) {
      const Vec logit = load(weights + p * kLanes) + bias;
      const Vec weight = exp2(logit - splat(shared.peak));
      store(weights + p * kLanes, weight);
      sum += weight;
    }
    shared.weight += lane_sum(sum);
    for (int c = 0; c < bank.channels; ++c)
      for (int i = 0; i < height && advance(control); ++i) {
        double* sums = out.sums + (std::size_t(1 + c) * height + i) * width;
        int j = 0;
        for (; j + kShifts <= width; j += kShifts)
          shift_responses<kShifts>(bank, padded, weights, c, i, j, scale, sums + j);
        for (; j < width; ++j)
          shift_responses<1>(bank, padded, weights, c, i, j, scale, sums + j);
      }
  }
  shared.spread(pixels, out);
}

}  // namespace
