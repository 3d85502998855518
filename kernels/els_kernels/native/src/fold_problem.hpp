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
  const float* images;  // [N][C][height][width]
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
  double bias;                       // of half a key's squared norm
  float scale;                       // logit in bits of one unit
  float dead;                        // bits below the maximum at which weights do not count
  FoldTaps taps;                     // of the fold
  const float* col_scale;            // [vectors] vectors

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

}  // namespace els
