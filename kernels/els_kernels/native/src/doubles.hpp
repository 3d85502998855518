// 2^x of vectors of doubles. In step, which std::exp2 is not.
#pragma once

#include <cstdint>

namespace {

// 2^x for x up to 0, to 3e-16 relative; 0 below -1000.
template <class V>
[[gnu::always_inline]] inline V exp2_down(V x) {
  using Longs = decltype(x < x);
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
  x = (V)((Longs)x & ~small);
  const V shifted = x + kWhole;
  const V rest = x - (shifted - kWhole);
  V power = rest * c[13] + c[12];
#pragma GCC unroll 12
  for (int n = 11; n >= 0; --n) power = power * rest + c[n];
  return (V)(((Longs)power + ((Longs)shifted << 52)) & ~small);
}

}  // namespace
