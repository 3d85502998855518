// Merge of sums over parts of the bank, some pixels in step: included by library.cpp.
//
//     peak = max_i peak_i        sum = Σ_i 2^(peak_i - peak)·sum_i, in the order of the parts
#pragma once

#include <cstring>

#include "blocks.hpp"

namespace {

using namespace els;

constexpr int kTogether = 8;  // pixels
constexpr int kMostSums = 16;  // of a pixel, in registers or close by
typedef double Doubles __attribute__((vector_size(kTogether * sizeof(double))));
typedef float Floats __attribute__((vector_size(kTogether * sizeof(float))));
typedef std::int64_t Longs __attribute__((vector_size(kTogether * sizeof(std::int64_t))));

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

// 2^x for x up to 0, to 3e-16 relative; 0 below -1000. In step, which std::exp2 is not.
[[gnu::always_inline]] inline Doubles exp2_down(Doubles x) {
  constexpr double kWhole = 6755399441055744.0;  // 1.5·2^52: the last bits of a sum are its integer
  // (ln 2)^n / n!
  constexpr double c[] = {1.0,
                          0.6931471805599453,
                          0.2402265069591007,
                          0.055504108664821576,
                          0.009618129107628477,
                          0.0013333558146428441,
                          0.00015403530393381606,
                          1.5252733804059838e-05,
                          1.3215486790144305e-06,
                          1.0178086009239696e-07,
                          7.054911620801121e-09,
                          4.44553827187081e-10,
                          2.5678435993488196e-11,
                          1.3691488853904124e-12};
  const Longs small = x < -1000.0;
  x = (Doubles)((Longs)x & ~small);
  const Doubles shifted = x + kWhole;
  const Doubles rest = x - (shifted - kWhole);
  Doubles power = rest * c[13] + c[12];
#pragma GCC unroll 12
  for (int n = 11; n >= 0; --n) power = power * rest + c[n];
  return (Doubles)(((Longs)power + ((Longs)shifted << 52)) & ~small);
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
