// Merge of sums over parts of the bank, some pixels in step: included by library.cpp.
//
//     peak = max_i peak_i        sum = Σ_i 2^(peak_i - peak)·sum_i, in the order of the parts
#pragma once

#include <cstring>

#include "blocks.hpp"
#include "doubles.hpp"

namespace {

using namespace els;

constexpr int kTogether = 8;  // pixels
constexpr int kMostSums = 16;  // of a pixel, in registers or close by
typedef double Doubles __attribute__((vector_size(kTogether * sizeof(double))));
typedef float Floats __attribute__((vector_size(kTogether * sizeof(float))));

// Values of `count` pixels, and of as many more as are missing the last.
template <class V, class T>
[[gnu::always_inline]] inline V load_pixels(const T* from, int count) {
  V out;
  if (count == kTogether) {
    std::memcpy(&out, from, sizeof out);
    return out;
  }
  for (int k = 0; k < kTogether; ++k) out[k] = from[k < count ? k : count - 1];
  return out;
}

template <class V, class T>
[[gnu::always_inline]] inline void store_pixels(const V& values, int count, T* to) {
  if (count == kTogether)
    std::memcpy(to, &values, sizeof values);
  else
    for (int k = 0; k < count; ++k) to[k] = values[k];
}

// Merge `count` pixels from u on: call out(v, sums) for values [from, from + sums) of 1 + channels.
// Returns the peaks.
template <class Out>
[[gnu::always_inline]] inline Floats merge_pixels(const Partial* parts, int number, std::size_t u,
                                                  int count, std::size_t pixels, int from, int sums,
                                                  Out out) {
  Floats peak = load_pixels<Floats>(parts[0].peak + u, count);
  for (int i = 1; i < number; ++i) {
    const Floats other = load_pixels<Floats>(parts[i].peak + u, count);
    peak = other > peak ? other : peak;
  }
  Doubles totals[kMostSums] = {};
  for (int i = 0; i < number; ++i) {
    const Floats behind = load_pixels<Floats>(parts[i].peak + u, count) - peak;
    const Doubles scale = exp2_down(__builtin_convertvector(behind, Doubles));
    for (int v = 0; v < sums; ++v)
      totals[v] += scale * load_pixels<Doubles>(parts[i].sums + (from + v) * pixels + u, count);
  }
  for (int v = 0; v < sums; ++v) out(from + v, totals[v]);
  return peak;
}

// Merge `count` pixels' partial results of a block in the order of the chunks.
void merge_block(const Bank& bank, const Partial* parts, int number, std::size_t u, int count,
                 Partial row) {
  const std::size_t pixels = bank.pixels();
  for (int from = 0; from <= bank.channels; from += kMostSums) {
    const int sums = std::min(kMostSums, bank.channels + 1 - from);
    const Floats peak = merge_pixels(
        parts, number, u, count, pixels, from, sums,
        [&](int v, const Doubles& sum) { store_pixels(sum, count, row.sums + v * pixels + u); });
    store_pixels(peak, count, row.peak + u);
  }
}

}  // namespace
