// The kernel for one instruction set: compiled once for each, with ELS_KERNEL as its symbol.
#include "fold_moments.hpp"
#include "merge.hpp"
#include "moments.hpp"
#include "translations.hpp"
#include "whole.hpp"

namespace {

void pack(const Bank& shape, const float* images, const double* centre, float* packed) {
  const std::size_t pixels = shape.pixels();
  const std::int64_t tiles = (shape.images + kLanes - 1) / kLanes;
  for (std::int64_t tile = 0; tile < tiles; ++tile)
    for (int c = 0; c < shape.channels; ++c)
      for (std::size_t v = 0; v < pixels; ++v)
        for (int i = 0; i < kLanes; ++i) {
          const std::int64_t n = tile * kLanes + i;
          *packed++ = n < shape.images
                          ? images[(n * shape.channels + c) * pixels + v] - float(centre[c])
                          : 0.0f;
        }
}

std::size_t scratch_floats(const Bank& bank, const Geometry& geometry) {
  if (!geometry.whole) return Scratch(bank, nullptr).floats;
  return geometry.sources == Sources::kSame ? 0 : TranslationScratch(bank, nullptr).floats;
}

void attend_windows(const Bank& bank, const Geometry& geometry, const Query& query,
                    const Share& share, Control& control, Scratch& scratch, Partial out) {
  if (geometry.sources == Sources::kSame)
    same_place(bank, geometry, query, share.first, share.last, control, scratch, out);
  else
    every_place(bank, geometry, query, share, control, scratch, out);
}

int queries(const Bank& bank, const Geometry& geometry) {
  if (!geometry.whole || geometry.sources == Sources::kSame) return 1;
  return translated_together(bank);
}

void attend(const Bank& bank, const Geometry& geometry, const Query* queries, int count,
            const Share& share, Control& control, float* memory, const Partial* out) {
  const FlushToZero flush_to_zero;
  if (geometry.whole && geometry.sources == Sources::kEvery)
    return attend_translations(bank, queries, count, share.first, share.last, control, memory, out);
  for (int i = 0; i < count; ++i) {
    if (geometry.whole) {
      attend_images(bank, queries[i], share.first, share.last, control, out[i]);
      continue;
    }
    Scratch scratch(bank, memory);
    attend_windows(bank, geometry, queries[i], share, control, scratch, out[i]);
  }
}

}  // namespace

extern "C" const els::Kernel ELS_KERNEL;
const els::Kernel ELS_KERNEL = {
    ELS_KERNEL_NAME, kLanes,  pack,
    scratch_floats,  queries, attend,  merge,
    moment_scratch_floats, moments, fold_scratch_bytes, fold_normalise,
    fold_accumulate, fold_moment_scratch_bytes, fold_moments};
