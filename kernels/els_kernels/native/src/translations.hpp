// The equivariant machine: every translation of every image on the torus is a source, and one softmax
// over all of them answers for every pixel. Its logits are correlations of the query with the images,
// its responses those of the weights with the images: see fourier.hpp.
#pragma once

#include "fourier.hpp"
#include "windows.hpp"

namespace {

using els::kMostQueries;

// Bytes of the sums of all queries that share the spectra of a tile.
constexpr std::size_t kTranslatedBytes = std::size_t(4) << 20;

// Most queries that share the spectra of a tile.
inline int translated_together(const Bank& bank) {
  const std::size_t bytes = bank.channels * bank.pixels() * sizeof(Complex);
  for (int count = kMostQueries; count > 1; --count)
    if (count * bytes <= kTranslatedBytes) return count;
  return 1;
}

// One query and its softmax sums.
struct Translated {
  Complex* sums;   // [C][HW]: spectra of the responses
  Root* spectrum;  // [C][HW]: of the query
  double peak = -__builtin_inf(), weight = 0.0;
};

// Scratch of a group of tasks, in whole vectors.
struct TranslationScratch {
  Complex* images;  // [C][HW]: spectra of a tile
  Complex* plane;   // [HW]: logits, weights
  Translated queries[kMostQueries];
  float* fourier;
  std::size_t floats = 0;

  // Cut from `base`; from null only to learn how many floats it takes.
  TranslationScratch(const Bank& bank, float* base) {
    const std::size_t pixels = bank.pixels(), values = bank.channels * pixels;
    auto take = [&](std::size_t count) {
      float* at = base == nullptr ? nullptr : base + floats;
      floats += (count + 15) / 16 * 16;
      return at;
    };
    images = reinterpret_cast<Complex*>(take(values * 2 * kLanes));
    plane = reinterpret_cast<Complex*>(take(pixels * 2 * kLanes));
    for (int i = 0; i < translated_together(bank); ++i) {
      queries[i].sums = reinterpret_cast<Complex*>(take(values * 2 * kLanes));
      queries[i].spectrum =
          reinterpret_cast<Root*>(take(values * sizeof(Root) / sizeof(float)));
    }
    fourier = take(Fourier::floats(bank.height, bank.width));
  }
};

// Spectra of a tile's images; returns their squared norms.
inline Complex transform_tile(const Bank& bank, const float* tile, Fourier& fourier,
                              Complex* spectra) {
  const std::size_t pixels = bank.pixels();
  Complex norm = {};
  for (int c = 0; c < bank.channels; ++c, spectra += pixels, tile += pixels * kLanes) {
    for (std::size_t u = 0; u < pixels; ++u) {
      const Complex v = spectra[u] = load_complex(tile + u * kLanes);
      norm = norm + Complex{v.re * v.re, v.im * v.im};
    }
    fourier.transform(spectra);
  }
  return norm;
}

// The spectrum of the query, divided by the pixels for the transform back.
inline void transform_query(const Bank& bank, const Query& query, Fourier& fourier, Complex* plane,
                            Root* spectra) {
  const std::size_t pixels = bank.pixels();
  for (int c = 0; c < bank.channels; ++c) {
    for (std::size_t u = 0; u < pixels; ++u)
      plane[u] = {query.exact[c * pixels + u] / double(pixels) - Half{}, Half{}};
    fourier.transform(plane);
    for (std::size_t k = 0; k < pixels; ++k)
      spectra[c * pixels + k] = {plane[k].re[0], plane[k].im[0]};
  }
}

// Add a tile, whose spectra and squared norms are given, to the sums of a query. A transform back is
// one forward of real and imaginary part exchanged, and exchanged again.
inline void add_translations(const Bank& bank, const Query& query, std::int64_t tile,
                             const Complex* images, const Complex& norm, Fourier& fourier,
                             Complex* plane, Translated& own) {
  const std::size_t pixels = bank.pixels(), values = bank.channels * pixels;
  for (std::size_t k = 0; k < pixels; ++k) {
    Complex product = {};
    for (std::size_t v = k; v < values; v += pixels)
      product = product + conjugate_times(own.spectrum[v], images[v]);
    plane[k] = {product.im, product.re};
  }
  fourier.transform(plane);
  float lanes[kLanes];
  store(lanes, lane_bias(tile, query));
  const Complex range = load_complex(lanes);
  const Complex bias = {norm.re * query.exact_bias + range.re,
                        norm.im * query.exact_bias + range.im};
  Half top = own.peak - Half{};
  for (std::size_t d = 0; d < pixels; ++d) {
    plane[d] = Complex{plane[d].im, plane[d].re} + bias;
    top = larger(top, larger(plane[d].re, plane[d].im));
  }
  const double highest = lane_max(top);
  if (highest > own.peak) {
    const double scale = __builtin_exp2(own.peak - highest);
    for (std::size_t v = 0; v < values; ++v)
      own.sums[v] = {own.sums[v].re * scale, own.sums[v].im * scale};
    own.weight *= scale;
    own.peak = highest;
  }
  Half total = {};
  for (std::size_t d = 0; d < pixels; ++d) {
    plane[d] = {exp2_down(plane[d].re - own.peak), exp2_down(plane[d].im - own.peak)};
    total += plane[d].re + plane[d].im;
  }
  own.weight += lane_sum(total);
  fourier.transform(plane);
  for (std::size_t c = 0; c < values; c += pixels)
    for (std::size_t k = 0; k < pixels; ++k) {
      Complex& sum = own.sums[c + k];
      sum = sum + conjugate_times(plane[k], images[c + k]);
    }
}

// The partial result of a query, relative to a maximum in float. What rounds it by more than this many
// bits is far from a logit that floats tell apart.
inline void finish_translations(const Bank& bank, Fourier& fourier, Translated& own, Partial out) {
  const std::size_t pixels = bank.pixels();
  const float rounded = float(own.peak);
  const double gap = own.peak - double(rounded);
  const double scale = __builtin_exp2(gap > 900.0 ? 900.0 : gap < -900.0 ? -900.0 : gap);
  for (std::size_t u = 0; u < pixels; ++u) {
    out.peak[u] = rounded;
    out.sums[u] = own.weight * scale;
  }
  for (int c = 0; c < bank.channels; ++c) {
    Complex* sums = own.sums + c * pixels;
    for (std::size_t k = 0; k < pixels; ++k) sums[k] = {sums[k].im, sums[k].re};
    fourier.transform(sums);
    for (std::size_t u = 0; u < pixels; ++u)
      out.sums[(1 + c) * pixels + u] = lane_sum(sums[u].im) * scale / double(pixels);
  }
}

// Each query needs two of the C + 2 transforms of a tile itself; C are shared.
inline void attend_translations(const Bank& bank, const Query* queries, int count,
                                std::int64_t first, std::int64_t last, Control& control,
                                float* memory, const Partial* out) {
  const std::size_t values = bank.channels * bank.pixels();
  TranslationScratch scratch(bank, memory);
  Fourier fourier(bank.height, bank.width, scratch.fourier);
  for (int i = 0; i < count; ++i) {
    Translated& own = scratch.queries[i];
    transform_query(bank, queries[i], fourier, scratch.plane, own.spectrum);
    std::memset(static_cast<void*>(own.sums), 0, values * sizeof(Complex));
  }
  for (std::int64_t tile = first; tile < last; ++tile) {
    const float* keys = bank.data + tile * tile_floats(bank);
    const Complex norm = transform_tile(bank, keys, fourier, scratch.images);
    for (int i = 0; i < count; ++i) {
      if (!advance(control)) return;
      add_translations(bank, queries[i], tile, scratch.images, norm, fourier, scratch.plane,
                       scratch.queries[i]);
    }
  }
  for (int i = 0; i < count; ++i)
    finish_translations(bank, fourier, scratch.queries[i], out[i]);
}

}  // namespace
