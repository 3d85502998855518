// One vector of floats and the five operations of the kernel, for the instruction set that
// this translation unit is compiled for. Everything lives in an unnamed namespace: the same source
// is compiled several times with different flags, and the linker must not merge the copies.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef double Wide __attribute__((vector_size(8 * kLanes)));  // where precision is cheap

constexpr float kForbidden = -__builtin_inff();  // the bias of a forbidden source

[[gnu::always_inline]] inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
[[gnu::always_inline]] inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
[[gnu::always_inline]] inline Vec splat(float v) { return v - Vec{}; }
[[gnu::always_inline]] inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

[[gnu::always_inline]] inline bool any_above(Vec v, float limit) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpgt_ps((__m128)v, _mm_set1_ps(limit))) != 0;
#else
  const IVec above = v > splat(limit);
  return (above[0] | above[1] | above[2] | above[3]) != 0;
#endif
}

// 2^(x·scale) for products from -127 to 126, to 2e-7 relative. Rounding by a large constant leaves the
// integer in the low bits of the sum; the product is a part of the additions. The polynomial is within
// 1.1e-7 on [-½, ½], evaluated in floats within 1.7e-7. At -127 the remainder is 0, p is exactly 1, and
// its exponent field becomes exactly 0.
[[gnu::always_inline]] inline Vec exp2_fused(Vec x, float scale) {
  const Vec kRound = splat(12582912.0f);
  const Vec t = x * scale + kRound;
  const Vec f = x * scale - (t - kRound);
  Vec p = f * 1.326472615e-03f + 9.671512991e-03f;
  p = p * f + 5.550733581e-02f;
  p = p * f + 2.402224243e-01f;
  p = p * f + 6.931470037e-01f;
  p = p * f + 1.0f;
  return (Vec)((IVec)p + ((IVec)t << 23));
}

// 2^x for x below 127, to 2e-7 relative; exactly 0 for the bias of a forbidden source.
[[gnu::always_inline]] inline Vec exp2(Vec x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  // 2^x = 2^floor(x) · p(x - floor(x)): minimax polynomial on [0, 1), two instructions around it.
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = f * 1.877576695e-03f + 8.989339694e-03f;
  p = p * f + 5.582631752e-02f;
  p = p * f + 2.401536107e-01f;
  p = p * f + 6.931530833e-01f;
  p = p * f + 9.999999404e-01f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return exp2_fused(larger(x, splat(-127.0f)), 1.0f);
#endif
}

// log₂ x of a normal x > 0 to 2e-7 relative, near 1 too; finite for any other number.
[[gnu::always_inline]] inline Vec log2(Vec x) {
  // x = 2^n·(1 + f), √½ ≤ 1 + f < √2.
  const IVec half = IVec{} + 0x3f3504f3;
  const IVec n = ((IVec)x - half) >> 23;
  const Vec f = (Vec)((IVec)x - (n << 23)) - 1.0f;
  Vec p = f * -1.458115131e-01f + 2.340423018e-01f;
  p = p * f - 2.488768846e-01f;
  p = p * f + 2.870987058e-01f;
  p = p * f - 3.602396250e-01f;
  p = p * f + 4.809232354e-01f;
  p = p * f - 7.213528156e-01f;
  p = p * f + 1.442694902e+00f;
  return __builtin_convertvector(n, Vec) + f * p;
}

inline Wide widen(Vec v) { return __builtin_convertvector(v, Wide); }
inline Vec narrow(Wide v) { return __builtin_convertvector(v, Vec); }

// Sum and maximum over the lanes, always in the same order.
inline float lane_sum(Vec v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof lane);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

inline float lane_max(Vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// Denormal numbers are flushed to zero while a task runs: they are negligible in a sum
// that holds a weight of one, and some processors take a hundred cycles for each.
class FlushToZero {
 public:
#if defined(__SSE2__)
  FlushToZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushToZero() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushToZero() {}
  ~FlushToZero() {}
#endif
};

// Return work(C) with the number of channels as a constant where it is 1 or 3, else with 0. A
// kernel that few processors run has the latter only: a third of the code to compile.
template <class Work>
inline auto by_channels([[maybe_unused]] int channels, const Work& work) {
#ifndef ELS_ANY_CHANNELS
  if (channels == 1) return work(std::integral_constant<int, 1>());
  if (channels == 3) return work(std::integral_constant<int, 3>());
#endif
  return work(std::integral_constant<int, 0>());
}

}  // namespace
