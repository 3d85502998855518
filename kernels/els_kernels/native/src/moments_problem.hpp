// Interface of the planner of moments (moments_library.hpp) and its kernels (moments.hpp).
//
// Logits are integers, see units.hpp: the smallest possible one is 0, and differences are below 2^31.
#pragma once

#include "problem.hpp"

namespace els {

// The first finds the posterior; the others need its normaliser and its mean.
enum class MomentPass : std::int32_t { kStatistics = 0, kShares = 1, kTangent = 2, kCotangent = 3 };

// The sources of largest logit of every pixel. Equal logits are in the order of `slot`, which is the
// order of the tiles, and within a slot in the order of arrival: one task has all of it.
struct Ranking {
  // [pixels]: a source is inserted if its (logit, -slot) exceeds  logit << 32 | slot  of this; -1 << 32
  // while a list has room. Read without a lock: it only grows, and insert() looks again.
  std::int64_t* least;
  void (*insert)(Ranking&, int pixel, std::int32_t logit, std::int32_t slot, std::int64_t image,
                 int place);
};

struct MomentQuery {
  const float* units;  // [C][H][W]: centred query; times a centred key: units of a logit
  double norm;         // units of a key's squared norm, negative
  float scale;         // bits of one unit
  std::int32_t origin;     // added to every logit
  std::int32_t forbidden;  // added instead to what is no source
  std::int32_t headroom;   // units by which a logit may exceed the running maximum
  std::int32_t dead;       // units relative to the maximum up to which weights do not count
  std::int32_t least;      // units that weights are not computed below
  int window;
  std::int64_t lo, hi;
  const float* reference;  // [C][H][W]: values are measured from here; close to the mean
  Ranking* ranking;        // statistics; may be null
  const std::int32_t* peak;  // [H][W]: what weights are relative to; not statistics, nor the next
  const float* rate;         // shares: [H][W], weight that counts as one
  const float* mean;         // tangent, cotangent: [C][H][W], measured from the reference
  const float* direction;    // tangent: [C][H][W]
  const float* offset;       // tangent: [H][W], inner product of direction and reference
  const float* cotangent;    // cotangent: [C][H][W], divided by the sum of weights
};

// Result of a pass over a share of the sources. With w = 2^(logit - peak), e = value - reference:
//
//     statistics  [2 + 2C][H][W]  Σ w, Σ w·(logit - peak), then for each channel Σ w·e, Σ w·e²
//     shares      [tiles][lanes]  Σ w·rate over the pixels
//     tangent     [C][H][W]       Σ w·(⟨key patch, direction⟩ - offset)·(e - mean)
//     cotangent   [1 + C][H][W]   Σ c, Σ c·key over the window's places, c = w·⟨cotangent, e - mean⟩
//
// For a source that has all the weight e = mean, but for one rounding: its products are nearly 0.
struct MomentSums {
  std::int32_t* peak;  // [H][W]; statistics
  double* sums;
};

}  // namespace els
