// Interface of the planner of a fold (fold_library.hpp) and its kernels (fold.hpp).
//
// Columns of a row are striped over its vectors: column x is lane x / vectors of vector x % vectors.
// A move by one column is the next vector, and only at the end of a row do lanes rotate.
#pragma once

#include <cstddef>
#include <cstdint>

#include "problem.hpp"

namespace els {

// Images of one size, and the lines of their rows and columns that patches are taken from. Query patch i
// and key patch i + displacement are a pair if they are of one class.
struct FoldSource {
  const void* images;   // [N][C][height][width]: float, or with FoldCell::values bytes
  std::int64_t lo, hi;  // those that are attended to
  std::int64_t first;   // the number of image 0 in the bank
  std::int32_t height, width;
  std::int32_t crop_rows, crop_cols;
  const std::int32_t* rows;  // [crop_rows]: row of the image, or -1 for zeros
  const std::int32_t* cols;  // [crop_cols]: the ring, and as many again as there are displacements
  const std::int32_t* row_classes;  // [crop_rows - window + 1], not -1
  const std::int32_t* col_classes;  // [crop_cols - window + 1], not -1
  std::int32_t first_row, last_row;  // displacements of rows
  std::int32_t shifts;               // displacements of columns, from 0
};

// Taps of a separable filter. Entry o of a place is the weight of the patch that starts o before it,
// or, of filters of patches, of the pixel o behind its start.
struct FoldTaps {
  const float* rows;    // [rows][window]
  const float* cols;    // [window], or with table [window][vectors] vectors
  bool table, uniform;  // uniform: those of columns are all 1
};

// A query crop and its level. Logits are base 2, in units of 1 / scale, modulo 2^32: sums of
// integers are exact, and only differences of logits of one patch, below 2^31, are read.
struct FoldCell {
  int channels, rows, cols, window;  // of the query crop
  int vectors;                       // of a row; the ring has vectors · lanes columns
  int key_rows, key_cols;            // most rows and columns of a source; whole vectors of columns
  const std::int32_t* row_classes;   // [patch_rows]; -1 for patches that attend to none
  const std::int32_t* col_classes;   // [vectors · lanes]
  const float* query;                // [C][rows][vectors] vectors, scaled
  const float* centre;               // [C], subtracted from images
  const float* values;               // [C][256]: pixel of each byte, less the centre; null for floats
  double bias;                       // of half a key's squared norm
  float scale;                       // logit in bits of one unit
  float dead;                        // bits below the maximum at which weights do not count
  FoldTaps taps;                     // of the fold
  // What answers are multiplied by: without a table taps are those of any place, [window] and the same
  // from either end, and are normalised here.
  const float* row_scale;  // [rows]
  const float* col_scale;  // [vectors] vectors

  int patch_rows() const { return rows - window + 1; }
  int patch_cols() const { return cols - window + 1; }
};

// Horizontal displacements [first, last) of one image.
struct FoldUnit {
  const FoldSource* source;
  std::int64_t image;
  int first, last;
};

// Normaliser of every query patch over some units, [patch_rows][vectors] vectors.
struct FoldSums {
  std::int32_t* peak;  // starts below every logit
  double* total;       // Σ 2^(logit - peak), starts at 0
};

struct FoldNormaliser {
  const std::int32_t* whole;  // log₂ of the normaliser, rounded down
  const float* rest;          // what is left of it, in bits, negated; -1e30 where there is no patch
};

// Passes over the sources. The first finds the normalisers that the others need, the last the mean.
enum class FoldPass : std::int32_t {
  kNormalise = 0,
  kStatistics = 1,
  kTotals = 2,
  kProduct = 3,
  kMean = 4
};

// The sources of largest weight of every pixel, of one thread: a thread meets sources in the order of
// their codes, so that of equal weights the one of smaller code is listed first.
struct FoldRanking {
  int top;
  float* least;         // [rows][vectors] vectors: the last of a list; infinite where there is no pixel
  float* weights;       // [rows][vectors · lanes][top], falling, from 0
  std::int64_t* codes;  // the same: image << 32 | displacement of columns << 16 | of rows, from the first
};

// What the other passes need. Only rows [first_row, last_row) of the crop are answered.
struct FoldMoments {
  FoldNormaliser z;
  int first_row, last_row;
  const float* reference;  // [C][rows][vectors] vectors: values are measured from here
  const float* reach;      // statistics: [patch_rows][vectors] vectors, what a patch counts in a share
  const float* direction;  // [C][rows][vectors] vectors; totals, product, as are the next
  const float* offset;     // [rows][vectors] vectors: inner product of direction and reference
  FoldTaps inner;          // of a patch's scalar
  FoldTaps outer;          // product
  // [patch_rows][vectors] vectors, subtracted from a patch's scalars one after the other: their mean, as
  // the sum of two numbers, as a product may be 1e8 times what is left of them.
  const float *mean, *mean_rest;
};

// Results, added to what is there. With e = value - reference, π = weights w filtered by the fold, and a
// patch's scalar c = (inner products of direction and e, filtered by the inner taps):
//
//     statistics  [rows][vectors][2 + 2C] vectors  Σ π, Σ π·log₂ π, then for each channel Σ π·e, Σ π·e²
//     totals      [rows][vectors][1 + C] vectors   Σ π, Σ π·e; and of each patch Σ w, Σ w·(c - mean)
//     product     [rows][vectors][C] vectors       Σ z·e, z = w·(c - mean) filtered by the outer taps
//
// Rows are those that are answered.
struct FoldMomentSums {
  double* planes;
  double* scalars;       // [patch_rows][vectors][2] vectors
  double* share;         // statistics: Σ w·reach
  FoldRanking* ranking;  // statistics; may be null
};

constexpr int fold_planes(FoldPass pass, int channels) {
  return pass == FoldPass::kStatistics ? 2 + 2 * channels
         : pass == FoldPass::kTotals   ? 1 + channels
                                       : channels;
}

}  // namespace els
