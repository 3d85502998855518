// The ideal machine: one logit for an image, the same for every pixel. Logits and responses are matrix
// products, blocked so that a loaded vector is used several times.
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
inline void attend_images(const Bank& bank, const Query& query, std::int64_t first,
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

}  // namespace
