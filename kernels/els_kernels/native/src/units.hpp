// Logits as integers in units of 2^-bits of a bit, modulo 2^32: running sums of them are exact, and
// only differences of logits of one patch, below 2^31, are read.
#pragma once

#include "simd.hpp"

namespace {

// Unsigned, because sums wrap around.
typedef std::uint32_t Units __attribute__((vector_size(4 * kLanes)));

[[gnu::always_inline]] inline Units load_units(const std::int32_t* p) {
  return *reinterpret_cast<const Units*>(p);
}
[[gnu::always_inline]] inline void store_units(std::int32_t* p, Units v) {
  *reinterpret_cast<Units*>(p) = v;
}
[[gnu::always_inline]] inline Vec to_float(Units v) {
  return __builtin_convertvector((IVec)v, Vec);
}

[[gnu::always_inline]] inline Units nearest(Vec v) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return (Units)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (Units)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (Units)_mm_cvtps_epi32((__m128)v);
#else
  const Vec half = v < splat(0.0f) ? splat(-0.5f) : splat(0.5f);
  return (Units)__builtin_convertvector(v + half, IVec);
#endif
}

[[gnu::always_inline]] inline Units splat_units(std::int32_t v) {
  return Units{} + std::uint32_t(v);
}
[[gnu::always_inline]] inline IVec larger(IVec a, IVec b) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return (IVec)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (IVec)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

[[gnu::always_inline]] inline bool any_above(IVec v, std::int32_t limit) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_cmpgt_epi32_mask((__m512i)v, _mm512_set1_epi32(limit)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(_mm256_cmpgt_epi32((__m256i)v, _mm256_set1_epi32(limit))) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8(_mm_cmpgt_epi32((__m128i)v, _mm_set1_epi32(limit))) != 0;
#else
  const IVec above = v > (IVec)splat_units(limit);
  return (above[0] | above[1] | above[2] | above[3]) != 0;
#endif
}

// 2^(units·scale) to 2e-7 relative, for exponents from -127 to 126; no normal number below -126, and
// exactly 0 at -127.
[[gnu::always_inline]] inline Vec exp2_units(Vec units, float scale) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return exp2(units * scale);
#else
  return exp2_fused(units, scale);
#endif
}

}  // namespace
