// Merge of partial results over parts of the bank: included by kernel.cpp.
//
//     peak = max_i peak_i        sum = Σ_i 2^(peak_i - peak)·sum_i, in the order of the parts
#pragma once

#include <cstring>

#include "doubles.hpp"
#include "scratch.hpp"

namespace {

constexpr int kTogether = 8;  // pixels
constexpr int kSteps = int(els::kPiece) / kTogether;
constexpr int kAhead = 2;  // parts
constexpr int kMostSums = 4;  // of a pixel at a time: with those of a piece, in the fastest cache
typedef double Doubles __attribute__((vector_size(kTogether * sizeof(double))));
typedef float Floats __attribute__((vector_size(kTogether * sizeof(float))));

// Values of `count` pixels, and of as many more as are missing the last.
template <class V, class T>
[[gnu::always_inline]] inline V load_pixels(const T* from, int count) {
  V out;
  if (count >= kTogether) {
    std::memcpy(&out, from, sizeof out);
    return out;
  }
  for (int k = 0; k < kTogether; ++k) out[k] = from[k < count ? k : count - 1];
  return out;
}

template <class V, class T>
[[gnu::always_inline]] inline void store_pixels(const V& values, int count, T* to) {
  if (count >= kTogether)
    std::memcpy(to, &values, sizeof values);
  else
    for (int k = 0; k < count; ++k) to[k] = values[k];
}

// Have the processor read `count` values meanwhile.
template <class T>
inline void prefetch_pixels(const T* from, int count) {
  constexpr int kLine = 64 / sizeof(T);
  for (int k = 0; k < count; k += kLine) __builtin_prefetch(from + k);
}

// Merge `count` pixels from u on, kPiece at most. Parts are far from each other in memory, and other
// cores wrote them: a piece of one is read before the next, which is on its way by then.
void merge(const Bank& shape, const Partial* parts, int number, std::size_t u, int count,
           Partial out) {
  const std::size_t pixels = shape.pixels();
  // call(step, values left): of vectors of pixels.
  const auto by_steps = [&](auto call) {
    for (int step = 0; step * kTogether < count; ++step) call(step, count - step * kTogether);
  };
  Floats peaks[kSteps];
  for (int i = 0; i < number; ++i) {
    if (i + kAhead < number) prefetch_pixels(parts[i + kAhead].peak + u, count);
    by_steps([&](int step, int left) {
      const Floats peak = load_pixels<Floats>(parts[i].peak + u + step * kTogether, left);
      peaks[step] = i == 0 || peak > peaks[step] ? peak : peaks[step];
    });
  }
  for (int from = 0; from <= shape.channels; from += kMostSums) {
    const int sums = least(kMostSums, shape.channels + 1 - from);
    Doubles totals[kMostSums][kSteps] = {};
    for (int i = 0; i < number; ++i) {
      const double* own = parts[i].sums + from * pixels + u;
      if (i + kAhead < number)
        for (int v = 0; v < sums; ++v)
          prefetch_pixels(parts[i + kAhead].sums + (from + v) * pixels + u, count);
      by_steps([&](int step, int left) {
        const std::size_t at = step * kTogether;
        const Floats behind = load_pixels<Floats>(parts[i].peak + u + at, left) - peaks[step];
        const Doubles scale = exp2_down(__builtin_convertvector(behind, Doubles));
        for (int v = 0; v < sums; ++v)
          totals[v][step] += scale * load_pixels<Doubles>(own + v * pixels + at, left);
      });
    }
    for (int v = 0; v < sums; ++v)
      by_steps([&](int step, int left) {
        store_pixels(totals[v][step], left,
                     out.sums + (from + v) * pixels + u + step * kTogether);
      });
  }
  by_steps([&](int step, int left) {
    store_pixels(peaks[step], left, out.peak + u + step * kTogether);
  });
}

}  // namespace
