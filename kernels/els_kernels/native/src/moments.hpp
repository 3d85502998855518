// Moments of the posterior: the sweeps of patch attention, with integer logits and other sums.
//
//     V += g(new row) - g(old row)     S += V(right) - V(left)     integers, see units.hpp
//
// A block of pairs whose weights are all below 2^-64 of the running maximum costs its logits alone.
// The overlap-add of patches, Σ_p c(p)·φ[p + o], is the transposed box sum of the scalars c of a sweep
// times the keys, so that its cost does not depend on the window either.
#pragma once

#include "moments_problem.hpp"
#include "units.hpp"
#include "windows.hpp"

namespace {

using els::MomentPass;
using els::MomentQuery;
using els::MomentSums;
using els::Ranking;

constexpr int moment_vectors(MomentPass pass, int channels) {
  switch (pass) {
    case MomentPass::kStatistics: return 2 + 2 * channels;
    case MomentPass::kTangent: return channels;
    case MomentPass::kCotangent: return 1 + channels;
    default: return 0;
  }
}

struct MomentScratch {
  float* tile;               // [C][H][kPad + W + kPad] vectors, as in Scratch
  std::int32_t* bias;        // [H][kPad + W + kPad] vectors
  std::int32_t* edge_bias;   // the same where every column is a source
  std::int32_t* columns;     // [3 W][kBlock] vectors: V
  std::int32_t* ring;        // [window][W][kBlock] vectors: the products of the window's rows
  float* along;              // [3 W][kBlock] vectors: V of the direction, or of the scalars
  float* along_ring;         // [window][W][kBlock] vectors: tangent
  float* scalars;            // [H][W][kBlock] vectors: cotangent, in the memory of along_ring
  float* sums;               // [HW][2 + 2C] vectors
  float* shares;             // [kBlock] vectors
  std::int32_t* peak;        // [HW]
  std::int32_t* flushed;     // [HW]
  bool* live;                // [H]: whether a row of scalars is not zero
  std::size_t floats = 0;

  MomentScratch(const Bank& bank, int window, float* base) {
    const std::size_t padded = std::size_t(bank.height) * (bank.width + 2 * kPad) * kLanes;
    const std::size_t pixels = bank.pixels(), line = std::size_t(bank.width) * kBlock * kLanes;
    const std::size_t rows = 2 * least(window / 2, bank.height - 1) + 1;
    auto take = [&](std::size_t count) {
      float* at = base == nullptr ? nullptr : base + floats;
      floats += (count + 15) / 16 * 16 + 16;  // whole cache lines, in different sets of the cache
      return at;
    };
    auto integers = [&](std::size_t count) { return reinterpret_cast<std::int32_t*>(take(count)); };
    tile = take(bank.channels * padded);
    bias = integers(padded);
    edge_bias = integers(padded);
    columns = integers(3 * line);
    ring = integers(rows * line);
    along = take(3 * line);
    along_ring = scalars = take((rows > std::size_t(bank.height) ? rows : bank.height) * line);
    sums = take((2 + 2 * bank.channels) * pixels * kLanes);
    shares = take(kBlock * kLanes);
    peak = integers(pixels);
    flushed = integers(pixels);
    live = reinterpret_cast<bool*>(take(bank.height));
  }
};

// What the sweeps of one tile, or of a block of tiles, share.
struct MomentTask {
  const MomentQuery& query;
  MomentScratch& scratch;
  std::int64_t tile;
  std::int32_t slot;  // see Ranking
};

// V += products of a row - products of the row that leaves, which the ring has.
template <int C, int D, bool kSame>
void push_products(const Block& block, RowPair row, const Columns& columns, std::int32_t* ring,
                   std::int32_t* V) {
  for (int i = 0; i < columns.products_count; ++i) {
    const Columns::Run& run = columns.products[i];
    std::int32_t* old = ring + (run.u - columns.first) * D * kLanes;
    std::int32_t* slot = V + (columns.margin + run.u - columns.first) * D * kLanes;
    const float* query = row.query + run.u;
    const float* key = row.keys + run.y * kLanes;
    for (int j = 0; j < run.count; ++j) {
      Vec g[D] = {};
      for (int c = 0; c < channels_of<C>(block); ++c)
        multiply<D, kSame, false>(g, block, query[j + c * block.query_plane],
                                  key + j * kLanes + c * block.key_plane);
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) {
        const Units product = nearest(g[d]), left = load_units(old + d * kLanes);
        store_units(slot + d * kLanes, load_units(slot + d * kLanes) + product - left);
        store_units(old + d * kLanes, product);
      }
      slot += D * kLanes;
      old += D * kLanes;
    }
  }
}

// V and the ring = the products of the window around row 0, summed in registers.
template <int C, int D, bool kSame>
void start_products(const Block& block, const Rows& rows, const Columns& columns, std::int32_t* ring,
                    std::int32_t* V) {
  const std::size_t line = std::size_t(columns.count) * D * kLanes;
  const int first = rows.clipped ? 0 : -rows.radius;
  const int last = rows.clipped ? least(rows.radius, block.height - 1) : rows.radius;
  std::memset(ring, 0, (first + rows.radius) * line * sizeof(std::int32_t));
  for (int i = 0; i < columns.products_count; ++i) {
    const Columns::Run& run = columns.products[i];
    const std::size_t column = std::size_t(run.u - columns.first) * D * kLanes;
    std::int32_t* slot = V + columns.margin * D * kLanes + column;
    for (int j = 0; j < run.count; ++j, slot += D * kLanes) {
      std::int32_t* kept = ring + (first + rows.radius) * line + column + j * D * kLanes;
      Units v[D] = {};
      for (int o = first; o <= last; ++o, kept += line) {
        const RowPair row = row_pair(block, rows, o);
        Vec g[D] = {};
        for (int c = 0; c < channels_of<C>(block); ++c)
          multiply<D, kSame, false>(g, block, row.query[run.u + j + c * block.query_plane],
                                    row.keys + (run.y + j) * kLanes + c * block.key_plane);
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) {
          const Units product = nearest(g[d]);
          v[d] += product;
          store_units(kept + d * kLanes, product);
        }
      }
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) store_units(slot + d * kLanes, v[d]);
    }
  }
}

// The same for the inner products with a direction, which need no integers: they enter linearly.
template <int C, int D, bool kSame, bool kFresh>
void push_direction(const Block& block, const float* direction, RowPair row, const Columns& columns,
                    float* ring, float* V) {
  for (int i = 0; i < columns.products_count; ++i) {
    const Columns::Run& run = columns.products[i];
    float* old = ring + (run.u - columns.first) * D * kLanes;
    float* slot = V + (columns.margin + run.u - columns.first) * D * kLanes;
    const float* query = direction + (row.query - block.query) + run.u;
    const float* key = row.keys + run.y * kLanes;
    for (int j = 0; j < run.count; ++j) {
      Vec g[D] = {};
      for (int c = 0; c < channels_of<C>(block); ++c) {
        const float q = query[j + c * block.query_plane];
        const float* p = key + j * kLanes + c * block.key_plane;
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) g[d] += q * load(p + d * (kSame ? block.stream : kLanes));
      }
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) {
        const Vec sum = load(slot + d * kLanes) + g[d];
        store(slot + d * kLanes, kFresh ? sum : sum - load(old + d * kLanes));
        store(old + d * kLanes, g[d]);
      }
      slot += D * kLanes;
      old += D * kLanes;
    }
  }
}

// A row outside the image takes the place of the row that leaves. As Units for integers, which wrap.
template <class Number>
void push_nothing(std::size_t count, std::size_t margin, bool fresh, Number* ring, Number* V) {
  V += margin;
  if (!fresh)
    for (std::size_t i = 0; i < count; ++i) V[i] -= ring[i];
  std::memset(ring, 0, count * sizeof(Number));
}

// Make `top`'s largest lane the new maximum of a place; returns by how much it grew. Rare.
[[gnu::noinline, gnu::cold]] inline std::int32_t raise_units(IVec top, float scale,
                                                             std::int32_t* peak, float* sums,
                                                             int vectors) {
  std::int32_t higher = top[0];
  for (int i = 1; i < kLanes; ++i) higher = top[i] > higher ? top[i] : higher;
  const double bits = double(higher) * scale;
  const float factor = bits > 126.0 ? 0.0f : float(__builtin_exp2(-bits));
  store(sums + kLanes, load(sums + kLanes) - float(higher) * load(sums));
  for (int i = 0; i < vectors; ++i) store(sums + i * kLanes, load(sums + i * kLanes) * factor);
  *peak += higher;
  return higher;
}

// Offer the sources of a block that exceed a limit, in the order of displacement and lane. Rare.
template <int D, bool kSame>
[[gnu::noinline, gnu::cold]] void rank(const MomentTask& task, const IVec (&logits)[D],
                                       std::int32_t limit, std::int32_t peak, int pixel, int y,
                                       int column, int width) {
  Ranking& ranking = *task.query.ranking;
  for (int d = 0; d < D; ++d) {
    const int step = kSame ? d : 0;
    const int place = y * width + (kSame ? column : wrap(column + d, width));
    for (int i = 0; i < kLanes; ++i)
      if (logits[d][i] > limit)
        ranking.insert(ranking, pixel, logits[d][i] + peak, task.slot + step,
                       (task.tile + step) * kLanes + i, place);
  }
}

// S = the sum of `count` slots from `from` on, wrapping around a ring.
template <int D, class Sum, class Number, class Load>
[[gnu::always_inline]] inline void start_sums(const Columns& columns, const Number* V, int from,
                                              int count, Sum (&S)[D], Load load_one) {
  for (int d = 0; d < D; ++d) S[d] = Sum{};
  for (int i = 0; i < count; ++i) {
    const int slot = columns.cyclic && from + i >= columns.count ? from + i - columns.count : from + i;
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) S[d] += load_one(V + (slot * D + d) * kLanes);
  }
}

// A run of places whose windows neither end of a ring interrupts.
struct Stretch {
  const std::int32_t *left, *right;    // slots of the first window's first and last column
  const float *along_left, *along_right;  // the same of the direction
  const std::int32_t* bias;
  const float* values;
  float* scalars;  // cotangent: result
  int pixel, y, column, count;
};

// Add a stretch to its sums. S comes in as the sum of the first window without its last column and
// leaves as that of the window after the stretch. Returns whether any weight counted.
template <MomentPass P, int C, int D, bool kSame>
[[gnu::always_inline]] inline bool add_stretch(const Block& block, const MomentTask& task,
                                               const Stretch& at, int width, Units (&S)[D],
                                               Vec (&T)[D]) {
  const MomentQuery& query = task.query;
  MomentScratch& scratch = task.scratch;
  const int channels = channels_of<C>(block), vectors = moment_vectors(P, channels);
  const std::size_t next = kSame ? block.stream : kLanes;  // from value to value of a block
  Units s[D];
  Vec t[D];
#pragma GCC unroll 8
  for (int d = 0; d < D; ++d) s[d] = S[d], t[d] = T[d];
  constexpr bool kFirst = P == MomentPass::kStatistics;
  std::int32_t* peaks = scratch.peak + at.pixel;
  const std::int32_t* final_peaks = query.peak + at.pixel;
  Ranking* ranking = kFirst ? query.ranking : nullptr;
  bool live = false;
  const std::int32_t *left = at.left, *right = at.right, *bias = at.bias;
  const float *along_left = at.along_left, *along_right = at.along_right, *values = at.values;
  for (int j = 0; j < at.count; ++j) {
    const std::int32_t peak = kFirst ? peaks[j] : final_peaks[j];
    const Units below = splat_units(peak);
    IVec logit[D];
    Vec inner[D];
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) {
      const Units sum = s[d] + load_units(right + d * kLanes);
      s[d] = sum - load_units(left + d * kLanes);
      logit[d] = (IVec)(sum + (load_units(bias + d * kLanes) - below));
      if (P == MomentPass::kTangent) {
        inner[d] = t[d] + load(along_right + d * kLanes);
        t[d] = inner[d] - load(along_left + d * kLanes);
      }
    }
    const float* value = values;
    left += D * kLanes;
    right += D * kLanes;
    values += kLanes;
    if (!kSame) bias += kLanes;
    if (P == MomentPass::kTangent) along_left += D * kLanes, along_right += D * kLanes;
    IVec top = logit[0];
#pragma GCC unroll 8
    for (int d = 1; d < D; ++d) top = larger(top, logit[d]);
    if (kFirst && ranking != nullptr) {
      const std::int64_t least = __atomic_load_n(ranking->least + at.pixel + j, __ATOMIC_RELAXED);
      const std::int32_t limit =
          std::int32_t(least >> 32) - (task.slot < std::int32_t(least)) - peak;
      if (__builtin_expect(any_above(top, limit), 0))
        rank<D, kSame>(task, logit, limit, peak, at.pixel + j, at.y, at.column + j, width);
    }
    if (!any_above(top, query.dead)) {
      if (P == MomentPass::kCotangent)
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) store(at.scalars + (j * D + d) * kLanes, Vec{});
      continue;
    }
    live = true;
    float* sums = scratch.sums + std::size_t(at.pixel + j) * vectors * kLanes;
    if (kFirst && __builtin_expect(any_above(top, query.headroom), 0)) {
      const Units higher = splat_units(raise_units(top, query.scale, peaks + j, sums, vectors));
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) logit[d] = (IVec)((Units)logit[d] - higher);
    }
    Vec bits[D], weight[D];
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) {
      bits[d] = to_float((Units)larger(logit[d], (IVec)splat_units(query.least)));
      weight[d] = exp2_units(bits[d], query.scale);
    }
    if (P == MomentPass::kShares) {
      const float rate = query.rate[at.pixel + j];
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) {
        float* share = scratch.shares + d * kLanes;
        store(share, load(share) + weight[d] * rate);
      }
    } else if (kFirst) {
      Vec total = load(sums), surprise = load(sums + kLanes);
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) {
        total += weight[d];
        surprise += weight[d] * bits[d];
      }
      store(sums, total);
      store(sums + kLanes, surprise);
      for (int c = 0; c < channels; ++c) {
        const Vec origin = splat(query.reference[at.pixel + j + c * block.query_plane]);
        float* pair = sums + (2 + 2 * c) * kLanes;
        Vec first = load(pair), second = load(pair + kLanes);
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) {
          const Vec e = load(value + c * block.key_plane + d * next) - origin;
          const Vec weighted = weight[d] * e;
          first += weighted;
          second += weighted * e;
        }
        store(pair, first);
        store(pair + kLanes, second);
      }
    } else {
      // Tangent: the factor of every channel. Cotangent: the sum over the channels.
      Vec factor[D] = {};
      if (P == MomentPass::kTangent) {
        const Vec offset = splat(query.offset[at.pixel + j]);
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) factor[d] = weight[d] * (inner[d] - offset);
      }
      for (int c = 0; c < channels; ++c) {
        const std::size_t pixel = at.pixel + j + c * block.query_plane;
        const Vec origin = splat(query.reference[pixel]), mean = splat(query.mean[pixel]);
        if (P == MomentPass::kTangent) {
          Vec sum = load(sums + c * kLanes);
#pragma GCC unroll 8
          for (int d = 0; d < D; ++d)
            sum += factor[d] * (load(value + c * block.key_plane + d * next) - origin - mean);
          store(sums + c * kLanes, sum);
        } else {
          const Vec g = splat(query.cotangent[pixel]);
#pragma GCC unroll 8
          for (int d = 0; d < D; ++d)
            factor[d] += g * (load(value + c * block.key_plane + d * next) - origin - mean);
        }
      }
      if (P == MomentPass::kCotangent)
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d)
          store(at.scalars + (j * D + d) * kLanes, weight[d] * factor[d]);
    }
  }
#pragma GCC unroll 8
  for (int d = 0; d < D; ++d) S[d] = s[d], T[d] = t[d];
  return live;
}

// Call work(j, left, right, count) for the stretches of a run: of windows around its columns.
template <class Work>
[[gnu::always_inline]] inline void for_each_stretch(const Columns& columns, const Columns::Run& run,
                                                    int margin, Work work) {
  for (int j = 0; j < run.count;) {
    int left = margin + run.u + j - columns.radius - columns.first;
    if (left < 0) left += columns.count;
    int right = left + 2 * columns.radius;
    int count = run.count - j;
    if (columns.cyclic) {
      if (right >= columns.count) right -= columns.count;
      count = least(count, columns.count - most(left, right));
    }
    work(j, left, right, count);
    j += count;
  }
}

// Columns of the first run of places that the second has, too: with valid padding at the end of a row
// whose last keys are on both sides of the border. Each of a block's displacements counts in one run.
inline int shared_places(const Columns& columns) {
  const Columns::Run *one = columns.places, *two = one + 1;
  if (columns.places_count < 2 || one->count <= 0 || two->count <= 0) return 0;
  return most(0, least(two->count, one->u + one->count - two->u));
}

// One row of places. Returns whether any weight counted.
template <MomentPass P, int C, int D, bool kSame>
bool add_row(const Block& block, const Columns& columns, int u, int y, float* scalars,
             const MomentTask& task) {
  const std::int32_t* V = task.scratch.columns;
  const float* along = task.scratch.along;
  const float* keys = block.keys + y * block.key_row;
  const int diameter = 2 * columns.radius, width = int(block.query_row);
  Units S[D] = {};
  Vec T[D] = {};
  bool live = false;
  const int shared = P == MomentPass::kCotangent ? shared_places(columns) : 0;
  float* twice = scalars + (columns.places[1].u - columns.first) * D * kLanes;
  Vec kept[kPad * D];
  for (int i = 0; i < columns.places_count; ++i) {
    const Columns::Run& run = columns.places[i];
    if (i == 1)
      for (int n = 0; n < shared * D; ++n) kept[n] = load(twice + n * kLanes);
    for_each_stretch(columns, run, columns.margin, [&](int j, int left, int right, int count) {
      if (j == 0 && run.fresh) {
        start_sums<D>(columns, V, left, diameter, S, load_units);
        if (P == MomentPass::kTangent) start_sums<D>(columns, along, left, diameter, T, load);
      }
      const std::size_t key = (run.y + j) * kLanes;
      const float* bias = kSame ? columns.bias : columns.bias + y * columns.bias_row + key;
      const Stretch at = {V + left * D * kLanes,
                          V + right * D * kLanes,
                          along + left * D * kLanes,
                          along + right * D * kLanes,
                          reinterpret_cast<const std::int32_t*>(bias),
                          keys + key,
                          scalars + (run.u + j - columns.first) * D * kLanes,
                          int(u * block.query_row) + run.u + j,
                          y,
                          run.y + j,
                          count};
      live |= add_stretch<P, C, D, kSame>(block, task, at, width, S, T);
    });
  }
  for (int n = 0; n < shared * D; ++n)
    store(twice + n * kLanes, load(twice + n * kLanes) + kept[n]);
  return live;
}

// Scalars of a row of places, added to or taken from the vertical sums.
template <int D, bool kDrop>
void slide_scalars(const Columns& columns, int margin, const float* scalars, float* V) {
  for (int i = 0; i < columns.places_count; ++i) {
    const Columns::Run& run = columns.places[i];
    const int skip = i == 1 ? shared_places(columns) : 0;
    const std::size_t slot = run.u + skip - columns.first;
    const float* from = scalars + slot * D * kLanes;
    float* to = V + (margin + slot) * D * kLanes;
    for (int j = 0; j < (run.count - skip) * D; ++j, from += kLanes, to += kLanes)
      store(to, kDrop ? load(to) - load(from) : load(to) + load(from));
  }
}

// Keys of one row, weighted by the box sums of scalars, into the sums of the pixels that they face.
template <int C, int D, bool kSame>
void spread_row(const Block& block, const Columns& columns, int margin, int u, int y, const float* V,
                float* sums) {
  const int channels = channels_of<C>(block), vectors = 1 + channels;
  const std::size_t next = kSame ? block.stream : kLanes;
  Vec S[D] = {};
  for (int i = 0; i < columns.products_count; ++i) {
    const Columns::Run& run = columns.products[i];
    for_each_stretch(columns, run, margin, [&](int j, int left, int right, int count) {
      if (j == 0 && run.fresh) start_sums<D>(columns, V, left, 2 * columns.radius, S, load);
      const float *first = V + left * D * kLanes, *last = V + right * D * kLanes;
      const float* key = block.keys + y * block.key_row + (run.y + j) * kLanes;
      float* out = sums + (u * block.query_row + run.u + j) * vectors * kLanes;
      for (int n = 0; n < count; ++n) {
        Vec scalar[D], total = load(out);
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) {
          scalar[d] = S[d] + load(last + d * kLanes);
          S[d] = scalar[d] - load(first + d * kLanes);
          total += scalar[d];
        }
        store(out, total);
        for (int c = 0; c < channels; ++c) {
          Vec sum = load(out + (1 + c) * kLanes);
#pragma GCC unroll 8
          for (int d = 0; d < D; ++d) sum += scalar[d] * load(key + c * block.key_plane + d * next);
          store(out + (1 + c) * kLanes, sum);
        }
        first += D * kLanes;
        last += D * kLanes;
        key += kLanes;
        out += vectors * kLanes;
      }
    });
  }
}

// The overlap-add of a sweep's scalars.
template <int C, int D, bool kSame>
void spread(const Block& block, const Rows& rows, const Columns& columns, MomentScratch& scratch) {
  const bool cyclic = !rows.clipped && rows.count == block.height, inside = cyclic || rows.clipped;
  const int r = rows.radius, margin = columns.cyclic ? 0 : columns.radius;
  const std::size_t line = std::size_t(columns.count) * D * kLanes;
  const std::size_t length = line + std::size_t(2) * margin * D * kLanes;
  float* V = scratch.along;
  int live = 0;  // rows of the window that are not zero
  bool clean = false;
  auto row = [&](int t) -> const float* {
    if (cyclic) t = wrap(t, rows.count);
    return t >= 0 && t < rows.count && scratch.live[t] ? scratch.scalars + t * line : nullptr;
  };
  auto enter = [&](int t) {
    if (const float* scalars = row(t)) ++live, slide_scalars<D, false>(columns, margin, scalars, V);
  };
  for (int o = inside ? 0 : -r, first = o, end = rows.count + (inside ? 0 : r); o < end; ++o) {
    if ((o - first) % kRowRestart == 0) {
      std::memset(V, 0, length * sizeof(float));
      live = 0;
      for (int t = o - r; t <= o + r; ++t) enter(t);
    } else {
      if (const float* scalars = row(o - r - 1))
        --live, slide_scalars<D, true>(columns, margin, scalars, V);
      // What rounding left would go on without end.
      if (live == 0 && !clean) std::memset(V, 0, length * sizeof(float));
      enter(o + r);
    }
    clean = live == 0;
    if (live > 0)
      spread_row<C, D, kSame>(block, columns, margin, wrap(rows.u + o, block.height),
                              wrap(rows.y + o, block.height), V, scratch.sums);
  }
}

template <MomentPass P, int C, int D, bool kSame>
[[gnu::noinline]] void moment_sweep(const Block& block, const Rows& rows, const Columns& columns,
                                    const MomentTask& task) {
  MomentScratch& scratch = task.scratch;
  constexpr bool kAlong = P == MomentPass::kTangent;
  const int k = 2 * rows.radius + 1;
  const std::size_t line = std::size_t(columns.count) * D * kLanes;
  const std::size_t margin = std::size_t(columns.margin) * D * kLanes;
  std::memset(scratch.columns, 0, (line + 2 * margin) * sizeof(std::int32_t));
  if (kAlong) std::memset(scratch.along, 0, (line + 2 * margin) * sizeof(float));
  for (int i = kAlong ? 0 : k - 1, slot = i; i < rows.count + 2 * rows.radius;
       ++i, slot = slot + 1 < k ? slot + 1 : 0) {
    const bool inside = is_inside(block, rows, i - rows.radius);
    const RowPair row = row_pair(block, rows, inside ? i - rows.radius : 0);
    if (i == k - 1)
      start_products<C, D, kSame>(block, rows, columns, scratch.ring, scratch.columns);
    else if (i >= k && inside)
      push_products<C, D, kSame>(block, row, columns, scratch.ring + slot * line, scratch.columns);
    else if (i >= k)
      push_nothing(line, margin, false, reinterpret_cast<std::uint32_t*>(scratch.ring) + slot * line,
                   reinterpret_cast<std::uint32_t*>(scratch.columns));
    if (kAlong) {
      const float* direction = task.query.direction;
      float* ring = scratch.along_ring + slot * line;
      if (!inside)
        push_nothing(line, margin, i < k, ring, scratch.along);
      else if (i < k)
        push_direction<C, D, kSame, true>(block, direction, row, columns, ring, scratch.along);
      else
        push_direction<C, D, kSame, false>(block, direction, row, columns, ring, scratch.along);
    }
    const int t = i - 2 * rows.radius;
    if (t < 0) continue;
    const bool live = add_row<P, C, D, kSame>(block, columns, wrap(rows.u + t, block.height),
                                              wrap(rows.y + t, block.height),
                                              scratch.scalars + t * line, task);
    if (P == MomentPass::kCotangent) scratch.live[t] = live;
  }
  if (P == MomentPass::kCotangent) spread<C, D, kSame>(block, rows, columns, scratch);
}

// The lanes of a tile whose images are in the range, as a mask.
inline IVec lanes_in_range(std::int64_t tile, const MomentQuery& query) {
  IVec mask = {};
  for (int i = 0; i < kLanes; ++i) {
    const std::int64_t image = tile * kLanes + i;
    if (image >= query.lo && image < query.hi) mask[i] = -1;
  }
  return mask;
}

// The term of a logit that depends on its key only, or what forbids it; see key_bias.
inline void key_units(const Bank& bank, const Geometry& geometry, const MomentQuery& query,
                      const float* tile, IVec lanes, MomentScratch& scratch) {
  const bool cyclic = geometry.padding == Padding::kCircular;
  const int height = bank.height, width = bank.width, r = query.window / 2;
  const int down = cyclic ? r : least(r, height - 1), along = cyclic ? r : least(r, width - 1);
  const std::size_t padded = width + 2 * kPad;
  const Units forbidden = splat_units(query.forbidden);
  Wide* V = reinterpret_cast<Wide*>(scratch.columns);
  auto seen = [&](int i, int length) { return cyclic || (i >= 0 && i < length); };
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      if (y == 0) {
        V[x] = Wide{};
        for (int o = -down; o <= down; ++o)
          if (seen(o, height)) V[x] += squares(bank, tile, wrap(o, height), x);
      } else {
        const int in = y + down, out = y - down - 1;
        if (seen(in, height)) V[x] += squares(bank, tile, wrap(in, height), x);
        if (seen(out, height)) V[x] -= squares(bank, tile, wrap(out, height), x);
      }
    }
    std::int32_t* bias = scratch.bias + (y * padded + kPad) * kLanes;
    std::int32_t* edge_bias = scratch.edge_bias + (y * padded + kPad) * kLanes;
    Wide S = {};
    for (int o = -along; o < along; ++o)
      if (seen(o, width)) S += V[wrap(o, width)];
    for (int x = 0; x < width; ++x) {
      if (seen(x + along, width)) S += V[wrap(x + along, width)];
      // Not negative: the origin exceeds every norm.
      const Wide units = S * query.norm + (double(query.origin) + 0.5);
      const Units all = (Units)((__builtin_convertvector(units, IVec) & lanes) |
                                ((IVec)forbidden & ~lanes));
      if (seen(x - along, width)) S -= V[wrap(x - along, width)];
      const bool answers = cyclic || (x >= r && x < width - r);
      store_units(edge_bias + x * kLanes, all);
      store_units(bias + x * kLanes, answers ? all : forbidden);
    }
    for (int x = 1; x <= kPad; ++x) {
      const Units left = load_units(bias + wrap(-x, width) * kLanes);
      const Units right = load_units(bias + wrap(x - 1, width) * kLanes);
      store_units(bias - x * kLanes, cyclic ? left : forbidden);
      store_units(bias + (width + x - 1) * kLanes, cyclic ? right : forbidden);
    }
  }
}

inline void clear_moments(const Bank& bank, MomentPass pass, MomentScratch& scratch, MomentSums out) {
  const std::size_t pixels = bank.pixels(), vectors = moment_vectors(pass, bank.channels);
  std::memset(scratch.sums, 0, vectors * pixels * kLanes * sizeof(float));
  std::memset(out.sums, 0, vectors * pixels * sizeof(double));
  if (pass != MomentPass::kStatistics) return;
  std::memset(scratch.peak, 0, pixels * sizeof(std::int32_t));
  std::memset(scratch.flushed, 0, pixels * sizeof(std::int32_t));
}

// Sums of one tile, per lane, into the result, in double precision.
inline void flush_moments(const Bank& bank, MomentPass pass, const MomentQuery& query,
                          MomentScratch& scratch, MomentSums out) {
  const std::size_t pixels = bank.pixels();
  const int vectors = moment_vectors(pass, bank.channels);
  for (std::size_t u = 0; u < pixels; ++u) {
    double scale = 1.0;
    if (pass == MomentPass::kStatistics) {
      const double raised = double(scratch.peak[u]) - scratch.flushed[u];
      if (raised > 0.0) {
        scale = __builtin_exp2(-raised * query.scale);
        out.sums[pixels + u] -= raised * out.sums[u];
      }
      scratch.flushed[u] = out.peak[u] = scratch.peak[u];
    }
    for (int i = 0; i < vectors; ++i) {
      float* lanes = scratch.sums + (u * vectors + i) * kLanes;
      out.sums[i * pixels + u] = out.sums[i * pixels + u] * scale + lane_sum(load(lanes));
      store(lanes, splat(0.0f));
    }
  }
}

// Add the shares of a tile that one row of displacements found.
inline void flush_shares(const MomentScratch& scratch, int streams, bool same, double* shares) {
  for (int d = 0; d < streams; ++d)
    for (int i = 0; i < kLanes; ++i)
      shares[(same ? d * kLanes : 0) + i] += scratch.shares[d * kLanes + i];
  std::memset(scratch.shares, 0, kBlock * kLanes * sizeof(float));
}

// The sweeps of a pass over a number of channels. What calls them is compiled once for all of them.
using MomentSweep = void (*)(const Block&, const Rows&, const Columns&, const MomentTask&);

struct MomentSweeps {
  MomentSweep every[kBlock];        // of 1, 2, 3 … displacements
  MomentSweep same_one, same_block;  // of one tile, and of kBlock
};

template <MomentPass P, int C>
constexpr MomentSweeps kMomentSweeps = {
    {moment_sweep<P, C, 1, false>, moment_sweep<P, C, 2, false>, moment_sweep<P, C, 3, false>,
     moment_sweep<P, C, kBlock, false>},
    moment_sweep<P, C, 1, true>,
    moment_sweep<P, C, kBlock, true>};

template <MomentPass P>
const MomentSweeps& sweeps_by_channels(int channels) {
  return *by_channels(channels, [](auto c) { return &kMomentSweeps<P, c.value>; });
}

inline const MomentSweeps& sweeps_of(MomentPass pass, int channels) {
  switch (pass) {
    case MomentPass::kTangent: return sweeps_by_channels<MomentPass::kTangent>(channels);
    case MomentPass::kShares: return sweeps_by_channels<MomentPass::kShares>(channels);
    case MomentPass::kCotangent: return sweeps_by_channels<MomentPass::kCotangent>(channels);
    case MomentPass::kStatistics: break;
  }
  return sweeps_by_channels<MomentPass::kStatistics>(channels);
}

void moments_same(const Bank& bank, const Geometry& geometry, MomentPass pass, const MomentQuery& query,
                  const Share& share, Control& control, MomentScratch& scratch, MomentSums out) {
  const MomentSweeps& sweeps = sweeps_of(pass, bank.channels);
  const bool cyclic = geometry.padding != Padding::kZeros;
  const std::size_t row = std::size_t(bank.width) * kLanes;
  const Rows rows = all_rows(bank, query.window / 2, cyclic);
  Columns columns = all_columns(bank, query.window / 2, cyclic);
  alignas(64) std::int32_t lanes[kBlock * kLanes];
  columns.bias = reinterpret_cast<const float*>(lanes);
  Block block = {query.units, nullptr, bank.pixels(), std::size_t(bank.width), bank.height * row, row,
                 tile_floats(bank), float(query.norm), bank.channels, bank.height};
  for (std::int64_t tile = share.first; tile < share.last && advance(control);) {
    const int streams = share.last - tile < kBlock ? 1 : kBlock;
    for (int d = 0; d < streams; ++d) {
      const IVec mask = lanes_in_range(tile + d, query);
      store_units(lanes + d * kLanes,
                  (Units)(((IVec)splat_units(query.origin) & mask) |
                          ((IVec)splat_units(query.forbidden) & ~mask)));
    }
    block.keys = bank.data + tile * tile_floats(bank);
    const MomentTask task = {query, scratch, tile, std::int32_t(tile)};
    (streams == 1 ? sweeps.same_one : sweeps.same_block)(block, rows, columns, task);
    if (pass == MomentPass::kShares)
      flush_shares(scratch, streams, true, out.sums + (tile - share.first) * kLanes);
    tile += streams;
  }
  if (pass != MomentPass::kShares) flush_moments(bank, pass, query, scratch, out);
}

void moments_every(const Bank& bank, const Geometry& geometry, MomentPass pass, const MomentQuery& query,
                   const Share& share, Control& control, MomentScratch& scratch, MomentSums out) {
  const MomentSweeps& sweeps = sweeps_of(pass, bank.channels);
  const int height = bank.height, r = query.window / 2;
  const std::size_t row = std::size_t(bank.width + 2 * kPad) * kLanes;
  const Block block = {query.units, scratch.tile + kPad * kLanes, bank.pixels(),
                       std::size_t(bank.width), height * row, row, kLanes, 0.0f,
                       bank.channels, height};
  for (std::int64_t tile = share.first; tile < share.last && !is_stopped(control); ++tile) {
    const float* images = bank.data + tile * tile_floats(bank);
    copy_tile(bank, images, scratch.tile);
    key_units(bank, geometry, query, images, lanes_in_range(tile, query), scratch);
    const MomentTask task = {query, scratch, tile, std::int32_t(tile * share.parts + share.part)};
    int index = 0;
    for_each_rows(bank, geometry.padding, r, [&](const Rows& rows) {
      if (index++ % share.parts != share.part || !advance(control)) return;
      for_each_columns(bank, geometry.padding, r, [&](int streams, Columns columns, bool clipped) {
        if (is_stopped(control)) return;
        const std::int32_t* bias = (clipped ? scratch.edge_bias : scratch.bias) + kPad * kLanes;
        columns.bias_row = row;
        columns.bias = reinterpret_cast<const float*>(bias);
        sweeps.every[streams - 1](block, rows, columns, task);
      });
      if (pass == MomentPass::kShares)
        flush_shares(scratch, kBlock, false, out.sums + (tile - share.first) * kLanes);
    });
    if (pass != MomentPass::kShares) flush_moments(bank, pass, query, scratch, out);
  }
}

std::size_t moment_scratch_floats(const Bank& bank, int window) {
  return MomentScratch(bank, window, nullptr).floats;
}

void moments(const Bank& bank, const Geometry& geometry, MomentPass pass, const MomentQuery& query,
             const Share& share, Control& control, float* memory, MomentSums out) {
  const FlushToZero flush_to_zero;
  MomentScratch scratch(bank, query.window, memory);
  if (pass == MomentPass::kShares) {
    std::memset(out.sums, 0, (share.last - share.first) * kLanes * sizeof(double));
    std::memset(scratch.shares, 0, kBlock * kLanes * sizeof(float));
  } else {
    clear_moments(bank, pass, scratch, out);
  }
  const auto of = geometry.sources == Sources::kSame ? moments_same : moments_every;
  of(bank, geometry, pass, query, share, control, scratch, out);
}

}  // namespace
