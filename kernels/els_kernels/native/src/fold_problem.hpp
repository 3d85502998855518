// Interface of the planner of a fold (fold_library.hpp) and its kernels (fold.hpp).
//
// Columns of a row are striped over its vectors: column x is lane x / vectors of vector x % vectors.
// A move by one column is the next vector, and only at the end of a row do lanes rotate.
#pragma once

#include <cstddef>
#include <cstdint>

#include "problem.hpp"

namespace els {

// Images of one size; a crop of each is what patches are taken from.
struct FoldSource {
  const void* images;   // [N][C][height][width]: float, or with FoldCell::values bytes
  std::int64_t lo, hi;  // those that are attended to
  std::int32_t height, width;
  std::int32_t crop_rows, crop_cols;
  const std::int32_t* rows;  // [crop_rows]: row of the image, or -1 for zeros
  const std::int32_t* cols;  // [crop_cols]
};

// A query crop and its level. Logits are base 2, in units of 1 / scale, modulo 2^32: sums of
// integers are exact, and only differences of logits of one patch, below 2^31, are read.
struct FoldCell {
  int channels, rows, cols, window;  // of the query crop
  bool same_rows, same_cols;         // attend to the same row, or column, only
  int vectors;                       // of a row; the ring has vectors · lanes columns
  int key_rows;                      // most rows of a source
  const float* query;                // [C][rows][vectors] vectors, scaled
  double bias;                       // of half a key's squared norm
  float scale;                       // logit in bits of one unit
  float dead;                        // bits below the maximum at which weights do not count
  const float* row_taps;             // [rows][window]
  const float* col_taps;             // [window], or with table_taps [window][vectors] vectors
  const float* col_scale;            // [vectors] vectors
  bool table_taps, uniform_taps;
  const float* centre;  // [C]: of the bank, which is stored as it is
  const float* values;  // [C][256]: pixel of each byte, less the centre; null for floats

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
