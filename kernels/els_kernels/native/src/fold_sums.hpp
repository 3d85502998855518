// Logits of a fold: box sums of the products of a displacement, as integers.
//
//     g(v) = Σ_c x_c(v)·φ_c(v + δ)     V(v) = Σ g over the last rows, k of them
//     B(v) = Σ V before column v       S(v) = B(v + k) - B(v)
//
// Columns go around a ring, in which vector mK + j is vector j turned by m lanes, and so
// B(mK + j) = Σ_{e<m} turn^e(B(K)) + turn^m(B(j)): no sum waits for one of another column.
#pragma once

#include "fold_image.hpp"

namespace {

constexpr float kFoldHeadroom = 10.0f;  // bits by which a logit may exceed the running maximum

// 2^x to 2e-7 relative for x below 127, of N vectors in step; 0 below -126.
template <int N>
[[gnu::always_inline]] inline void fold_exp2(Vec (&x)[N]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  Vec whole[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    x[i] = larger(x[i], splat(-127.0f));
    whole[i] = (Vec)nearest(x[i]);
    x[i] -= (Vec)_mm256_round_ps((__m256)x[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  Vec p[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) p[i] = x[i] * 1.326472615e-03f + 9.671512991e-03f;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 5.550733581e-02f;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 2.402224243e-01f;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 6.931470037e-01f;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i)
    x[i] = (Vec)((IVec)(p[i] * x[i] + 1.0f) + ((IVec)whole[i] << 23));
#else
  for (int i = 0; i < N; ++i) x[i] = exp2(x[i]);
#endif
}

// total += weights of `N` rows of logits.
template <int N>
[[gnu::noinline]] void add_weights(int K, const float* logits, float* total) {
  const std::size_t row = std::size_t(K) * kLanes;
  for (std::size_t at = 0; at < row; at += kLanes) {
    Vec weight[N], sum = load(total + at);
#pragma GCC unroll 4
    for (int d = 0; d < N; ++d) weight[d] = load(logits + d * row + at);
    fold_exp2<N>(weight);
#pragma GCC unroll 4
    for (int d = 0; d < N; ++d) sum += weight[d];
    store(total + at, sum);
  }
}

// Weights of `N` rows of logits, continued to the left by k - 1 columns: [k - 1 + K] vectors, k + K apart.
template <int N>
[[gnu::noinline]] void write_weights(int K, int k, const float* logits, float* to) {
  const std::size_t row = std::size_t(K) * kLanes, length = row + std::size_t(k) * kLanes;
  float* start = to + (k - 1) * kLanes;
  for (int v = 0; v < K; ++v) {
    Vec weight[N];
#pragma GCC unroll 4
    for (int d = 0; d < N; ++d) weight[d] = load(logits + d * row + v * kLanes);
    fold_exp2<N>(weight);
#pragma GCC unroll 4
    for (int d = 0; d < N; ++d) store(start + d * length + v * kLanes, weight[d]);
    if (v > K - k)
#pragma GCC unroll 4
      for (int d = 0; d < N; ++d) store(start + d * length + (v - K) * kLanes, last_lane(weight[d]));
  }
  for (int d = 0; d < N; ++d, start += length)
    for (int j = K + 1; j < k; ++j)
      store(start - j * kLanes, last_lane(load(start + (K - j) * kLanes)));
}

// Lanes turned `count` times: as often next_lane.
class LaneTurn {
 public:
  explicit LaneTurn(int count) {
    IVec lane = {};
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    from_ = (lane + count) & (kLanes - 1);
  }

  [[gnu::always_inline]] Units operator()(Units v) const {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return (Units)_mm512_permutexvar_epi32((__m512i)from_, (__m512i)v);
#elif defined(__AVX2__)
    return (Units)_mm256_permutevar8x32_epi32((__m256i)v, (__m256i)from_);
#else
    switch (from_[0]) {
      case 1: return __builtin_shufflevector(v, v, 1, 2, 3, 0);
      case 2: return __builtin_shufflevector(v, v, 2, 3, 0, 1);
      case 3: return __builtin_shufflevector(v, v, 3, 0, 1, 2);
      default: return v;
    }
#endif
  }

 private:
  IVec from_;
};

// B += that of products of query row t - products of the row that left, for each displacement.
template <int C, int N>
[[gnu::noinline]] void advance_products(const FoldCell& cell, const FoldKeys& keys, int dy, int t,
                                        int slot, FoldScratch& scratch) {
  const int K = cell.vectors, channels = C > 0 ? C : cell.channels;
  const std::size_t row = keys.row, plane = std::size_t(cell.rows) * row;
  const std::size_t length = (K + cell.window) * kLanes, ring = cell.window * row;
  const float* query = cell.query + t * row;
  const float* near = scratch.keys + (t + dy + kMostRows) * row;
  std::int32_t* old = scratch.ring + slot * row;
  std::int32_t* before = scratch.columns + kLanes;
  Units change[N] = {};
  for (int v = 0; v < K; ++v) {
    const std::size_t at = std::size_t(v) * kLanes;
    Vec g[N] = {};
    for (int c = 0; c < channels; ++c) {
      const Vec x = load(query + c * plane + at);
#pragma GCC unroll 4
      for (int d = 0; d < N; ++d) g[d] += x * load(near + c * keys.plane + d * row + at);
    }
#pragma GCC unroll 4
    for (int d = 0; d < N; ++d) {
      const Units product = nearest(g[d]);
      std::int32_t* place = old + d * ring + at;
      change[d] += product - load_units(place);
      store_units(place, product);
      std::int32_t* sum = before + d * length + at;
      store_units(sum, load_units(sum) + change[d]);
    }
  }
}

inline void start_block(const FoldCell& cell, int count, FoldScratch& scratch) {
  const std::size_t row = std::size_t(cell.vectors) * kLanes;
  std::memset(scratch.ring, 0, count * cell.window * row * sizeof(std::int32_t));
  std::memset(scratch.columns, 0,
              count * (row + std::size_t(cell.window) * kLanes) * sizeof(std::int32_t));
}

// Call out(v, S(v)) for every vector of a row.
template <class Out>
[[gnu::always_inline]] inline void window_sums(const FoldCell& cell, const std::int32_t* before,
                                               Out out) {
  const int K = cell.vectors;
  Units all = {}, turned = load_units(before + K * kLanes);
  int turns = cell.window / K;
  for (int e = 0; e < turns; ++e) all += turned, turned = next_lane(turned);
  for (int v = 0, j = cell.window - turns * K; v < K; j = 0, ++turns) {
    const int end = v + K - j < K ? v + K - j : K;
    const LaneTurn turn(turns);
    const std::int32_t* after = before + std::size_t(j) * kLanes;
    for (; v < end; ++v, after += kLanes)
      out(v, all + turn(load_units(after)) - load_units(before + std::size_t(v) * kLanes));
    all += turned, turned = next_lane(turned);
  }
}

// Logits of a row of patches relative to `peak`, in bits, plus `offset`; returns their maximum in each
// lane.
[[gnu::noinline]] inline Vec row_logits(const FoldCell& cell, const std::int32_t* before,
                                        const std::int32_t* bias, const std::int32_t* peak,
                                        const float* offset, float* logits) {
  const Vec scale = splat(cell.scale);
  Vec top = splat(kNoPatch);
  window_sums(cell, before, [&](int v, Units S) __attribute__((always_inline)) {
    const std::size_t at = std::size_t(v) * kLanes;
    const Units units = S + (load_units(bias + at) - load_units(peak + at));
    const Vec logit = to_float(units) * scale + load(offset + at);
    store(logits + at, logit);
    top = larger(top, logit);
  });
  return top;
}

// The remainders of normalisers, and what is no pair for the displacement of columns, in one.
inline void mask_rest(const FoldCell& cell, const float* rest, FoldScratch& scratch) {
  const std::size_t row = std::size_t(cell.vectors) * kLanes;
  float* to = scratch.rest;
  for (int i = 0; i < cell.patch_rows(); ++i)
    for (std::size_t at = 0; at < row; at += kLanes, rest += kLanes, to += kLanes)
      store(to, load(rest) + load(scratch.mask + at));
}

// Raise the maxima that a row of logits exceeds by more than the headroom, as integers: a maximum
// rounded to a float would be wrong by as much as a logit. Rare.
[[gnu::noinline, gnu::cold]] inline void raise_peaks(const FoldCell& cell, const std::int32_t* before,
                                                     const std::int32_t* bias, std::int32_t* peak,
                                                     float* total, const FoldScratch& scratch) {
  window_sums(cell, before, [&](int v, Units S) {
    const std::size_t at = std::size_t(v) * kLanes;
    const Units units = S + (load_units(bias + at) - load_units(peak + at));
    const Vec logit = to_float(units) * splat(cell.scale) + load(scratch.mask + at);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(logit[lane] > kFoldHeadroom)) continue;
      peak[at + lane] = std::int32_t(std::uint32_t(peak[at + lane]) + units[lane]);
      const float bits = float(std::int32_t(units[lane])) * cell.scale;
      total[at + lane] = bits > 126.0f ? 0.0f : total[at + lane] * float(__builtin_exp2(-bits));
    }
  });
}

}  // namespace
