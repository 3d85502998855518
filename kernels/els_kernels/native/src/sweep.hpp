// One sweep: a block of D displacements (or D tiles of the bank) over a run of rows.
//
// For a fixed displacement δ the inner product of two patches is a box sum of pointwise products,
//
//     ⟨x[u+Ω], φ[u+δ+Ω]⟩ = Σ_{o∈Ω} g(u+o),    g(v) = Σ_c x_c[v]·φ_c[v+δ],
//
// computed by two running sums, for any window:
//
//     V[v] += g(new row) - g(old row)            one for every column, from row to row
//     S    += V[u+r] - V[u-r-1]                  one, along the row
#pragma once

#include "scratch.hpp"

namespace {

// Query and keys of a block. Stream d of the block reads keys + d·stream.
struct Block {
  const float* query;  // [C][H][W]
  const float* keys;   // [C][H][…] vectors
  std::size_t query_plane, query_row;
  std::size_t key_plane, key_row, stream;
  float norm_bias;  // same place only: its norms are summed along with the products
  int channels, height;
  float dead = 0.0f;  // bits relative to the running maximum up to which weights do not count
};

// Rows u and y = u + dy of a sweep; both advance cyclically. Clipped: the query is zero outside.
struct Rows {
  int u, y, count, radius;
  bool clipped;
};

// Columns of a sweep. V has a slot for every column of any window:
//
//     slots   [ margin | first, first + 1, … first + count - 1 | margin ]
//
// Margins are 0, for windows that are clipped at the border; on the torus there are none, and the
// slots form a ring.
struct Columns {
  struct Run {
    int u, y, count;  // keys of stream 0; y may reach kPad columns past an image
    bool fresh;       // does not continue the run before it
  };
  int first, count, margin, radius;
  bool cyclic;
  Run products[2];  // all columns: where their keys are
  Run places[2];    // the sources
  int products_count, places_count;
  const float* bias;  // [H][…] vectors; same place: [D] vectors for the lanes
  std::size_t bias_row;
};

template <int C>
constexpr int channels_of(const Block& block) {
  return C > 0 ? C : block.channels;
}

// The product of one query value with D streams of keys, added to (or taken from) V.
template <int D, bool kSame, bool kDrop>
[[gnu::always_inline]] inline void multiply(Vec (&v)[D], const Block& block, float q,
                                            const float* key) {
#pragma GCC unroll 8
  for (int d = 0; d < D; ++d) {
    const Vec p = load(key + d * (kSame ? block.stream : kLanes));
    const Vec left = kSame ? p * block.norm_bias + q : splat(q);
    v[d] = kDrop ? v[d] - left * p : v[d] + left * p;
  }
}

inline RowPair row_pair(const Block& block, const Rows& rows, int t) {
  const int u = wrap(rows.u + t, block.height), y = wrap(rows.y + t, block.height);
  return {block.query + u * block.query_row, block.keys + y * block.key_row};
}

inline bool is_inside(const Block& block, const Rows& rows, int t) {
  return !rows.clipped || (rows.u + t >= 0 && rows.u + t < block.height);
}

// V[v] = Σ g over the rows of the window around row t.
template <int C, int D, bool kSame>
void start_columns(const Block& block, const Rows& rows, int t, const Columns& columns,
                   RowPair* window, float* V) {
  int height = 0;
  for (int o = t - rows.radius; o <= t + rows.radius; ++o)
    if (is_inside(block, rows, o)) window[height++] = row_pair(block, rows, o);
  for (int i = 0; i < columns.products_count; ++i) {
    const Columns::Run& run = columns.products[i];
    float* slot = V + (columns.margin + run.u - columns.first) * D * kLanes;
    for (int j = 0; j < run.count; ++j, slot += D * kLanes) {
      Vec v[D] = {};
      for (int o = 0; o < height; ++o) {
        const float* query = window[o].query + run.u + j;
        const float* key = window[o].keys + (run.y + j) * kLanes;
        for (int c = 0; c < channels_of<C>(block); ++c)
          multiply<D, kSame, false>(v, block, query[c * block.query_plane],
                                    key + c * block.key_plane);
      }
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) store(slot + d * kLanes, v[d]);
    }
  }
  if (columns.margin > 0) {
    const std::size_t margin = std::size_t(columns.margin) * D * kLanes;
    std::memset(V, 0, margin * sizeof(float));
    std::memset(V + margin + columns.count * D * kLanes, 0, margin * sizeof(float));
  }
}

// V[v] += g(row entering the window) - g(row leaving it); either may be outside the image.
template <int C, int D, bool kSame, bool kEnters, bool kLeaves>
void slide_columns(const Block& block, RowPair enters, RowPair leaves, const Columns& columns,
                   float* V) {
  for (int i = 0; i < columns.products_count; ++i) {
    const Columns::Run& run = columns.products[i];
    float* slot = V + (columns.margin + run.u - columns.first) * D * kLanes;
    const float* new_query = enters.query + run.u;
    const float* old_query = leaves.query + run.u;
    const float* new_key = enters.keys + run.y * kLanes;
    const float* old_key = leaves.keys + run.y * kLanes;
    for (int j = 0; j < run.count; ++j) {
      Vec v[D];
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) v[d] = load(slot + d * kLanes);
      for (int c = 0; c < channels_of<C>(block); ++c) {
        const std::size_t q = j + c * block.query_plane, k = j * kLanes + c * block.key_plane;
        if (kEnters) multiply<D, kSame, false>(v, block, new_query[q], new_key + k);
        if (kLeaves) multiply<D, kSame, true>(v, block, old_query[q], old_key + k);
      }
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) store(slot + d * kLanes, v[d]);
      slot += D * kLanes;
    }
  }
}

template <int C, int D, bool kSame>
void advance_columns(const Block& block, const Rows& rows, int t, const Columns& columns,
                     float* V) {
  const int in = t + rows.radius, out = t - rows.radius - 1;
  const bool enters = is_inside(block, rows, in), leaves = is_inside(block, rows, out);
  const RowPair new_row = row_pair(block, rows, enters ? in : t);
  const RowPair old_row = row_pair(block, rows, leaves ? out : t);
  if (enters && leaves)
    slide_columns<C, D, kSame, true, true>(block, new_row, old_row, columns, V);
  else if (enters)
    slide_columns<C, D, kSame, true, false>(block, new_row, old_row, columns, V);
  else if (leaves)
    slide_columns<C, D, kSame, false, true>(block, new_row, old_row, columns, V);
}

// S = the sum of `count` slots from `from` on, wrapping around a ring.
template <int D>
void start_row(const Columns& columns, const float* V, int from, int count, Vec (&S)[D]) {
  const int ahead = columns.cyclic ? least(count, columns.count - from) : count;
  Vec even[D] = {}, odd[D] = {};  // two chains of additions take half the time of one
  auto add = [&](const float* slot, int slots) {
    int i = 0;
    for (; i + 2 <= slots; i += 2, slot += 2 * D * kLanes)
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) {
        even[d] += load(slot + d * kLanes);
        odd[d] += load(slot + (D + d) * kLanes);
      }
    if (i < slots)
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) even[d] += load(slot + d * kLanes);
  };
  add(V + from * D * kLanes, ahead);
  add(V, count - ahead);
#pragma GCC unroll 8
  for (int d = 0; d < D; ++d) S[d] = even[d] + odd[d];
}

// Make `top`'s largest lane the new maximum of a place and rescale its sums. Rare.
[[gnu::noinline, gnu::cold]] inline void raise_peak(Vec top, float* peak, float* sums, int count) {
  const float higher = lane_max(top);
  const Vec scale = exp2(splat(*peak - higher));
  for (int i = 0; i < count; ++i) store(sums + i * kLanes, load(sums + i * kLanes) * scale);
  *peak = higher;
}

// Add the weights of a block to the sums of a place; `above` are its logits relative to the maximum.
template <int C, int D, bool kSame>
[[gnu::always_inline]] inline void add_weights(const Block& block, const Vec (&above)[D],
                                               const float* values, float* sums) {
  Vec weight[D];
  Vec total = load(sums);
#pragma GCC unroll 8
  for (int d = 0; d < D; ++d) {
    weight[d] = exp2(above[d]);
    total += weight[d];
  }
  store(sums, total);
  for (int c = 0; c < channels_of<C>(block); ++c) {
    Vec response = load(sums + (1 + c) * kLanes);
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d)
      response += weight[d] *
                  load(values + c * block.key_plane + d * (kSame ? block.stream : kLanes));
    store(sums + (1 + c) * kLanes, response);
  }
}

// Add a run of places to their softmax sums. `left` and `right` are the slots of the first window's
// first and last column. S comes in as the sum of the window before, `gone` as its first column, and
// both leave so: the small difference of two columns is rounded, then added to the large sum once.
// Where no weight of a block counts, it costs its logits alone.
template <int C, int D, bool kSame>
void respond(const Block& block, Vec (&S)[D], Vec (&gone)[D], const float* left, const float* right,
             const float* bias, const float* values, float* sums, float* peak, int count) {
  const int channels = channels_of<C>(block);
  Vec s[D], g[D];
#pragma GCC unroll 8
  for (int d = 0; d < D; ++d) s[d] = S[d], g[d] = gone[d];
  for (int j = 0; j < count; ++j) {
    const Vec reference = splat(*peak);
    Vec above[D];
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) {
      s[d] += load(right + d * kLanes) - g[d];
      above[d] = s[d] + load(bias + d * kLanes) - reference;
      g[d] = load(left + d * kLanes);
    }
    Vec top = above[0];
#pragma GCC unroll 8
    for (int d = 1; d < D; ++d) top = larger(top, above[d]);
    if (any_above(top, block.dead)) {
      if (__builtin_expect(any_above(top, kHeadroom), 0)) {
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) above[d] = s[d] + load(bias + d * kLanes);
        top = above[0];
#pragma GCC unroll 8
        for (int d = 1; d < D; ++d) top = larger(top, above[d]);
        raise_peak(top, peak, sums, 1 + channels);
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) above[d] -= *peak;
      }
      add_weights<C, D, kSame>(block, above, values, sums);
    }
    left += D * kLanes;
    right += D * kLanes;
    values += kLanes;
    if (!kSame) bias += kLanes;
    sums += (1 + channels) * kLanes;
    ++peak;
  }
#pragma GCC unroll 8
  for (int d = 0; d < D; ++d) S[d] = s[d], gone[d] = g[d];
}

// One row of places, in stretches that neither end of the window leaves the ring in.
template <int C, int D, bool kSame>
void respond_row(const Block& block, const Columns& columns, int u, int y, const float* V,
                 Scratch& scratch) {
  const int diameter = 2 * columns.radius, vectors = 1 + channels_of<C>(block);
  const float* keys = block.keys + y * block.key_row;
  Vec S[D], gone[D];
  int age = 0;  // places since S was recomputed
  for (int i = 0; i < columns.places_count; ++i) {
    const Columns::Run& run = columns.places[i];
    for (int j = 0; j < run.count;) {
      int left = columns.margin + run.u + j - columns.radius - columns.first;
      if (left < 0) left += columns.count;
      int right = left + diameter;
      int stretch = run.count - j;
      if (columns.cyclic) {
        if (right >= columns.count) right -= columns.count;
        stretch = least(stretch, columns.count - most(left, right));
      }
      if ((j == 0 && run.fresh) || age == kColumnRestart) {
        start_row<D>(columns, V, left, diameter, S);
        for (int d = 0; d < D; ++d) gone[d] = Vec{};
        age = 0;
      }
      stretch = least(stretch, kColumnRestart - age);
      const std::size_t place = u * block.query_row + run.u + j, key = (run.y + j) * kLanes;
      const float* bias = kSame ? columns.bias : columns.bias + y * columns.bias_row + key;
      respond<C, D, kSame>(block, S, gone, V + left * D * kLanes, V + right * D * kLanes, bias,
                           keys + key, scratch.sums + place * vectors * kLanes,
                           scratch.peak + place, stretch);
      j += stretch;
      age += stretch;
    }
  }
}

template <int C, int D, bool kSame>
void sweep(const Block& block, const Rows& rows, const Columns& columns, Scratch& scratch) {
  for (int t = 0; t < rows.count; ++t) {
    if (t % kRowRestart == 0)
      start_columns<C, D, kSame>(block, rows, t, columns, scratch.window, scratch.columns);
    else
      advance_columns<C, D, kSame>(block, rows, t, columns, scratch.columns);
    respond_row<C, D, kSame>(block, columns, wrap(rows.u + t, block.height),
                             wrap(rows.y + t, block.height), scratch.columns, scratch);
  }
}

}  // namespace
