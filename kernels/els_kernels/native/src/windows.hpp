// The sweeps of a result: every displacement that the padding allows, or only 0 (same place).
#pragma once

#include "sweep.hpp"

namespace {

// Sums of one tile, per lane, into the partial result, in double precision.
inline void flush(const Bank& bank, Scratch& scratch, Partial out) {
  const std::size_t pixels = bank.pixels();
  const int vectors = 1 + bank.channels;
  for (std::size_t u = 0; u < pixels; ++u) {
    // The sums of an empty state are 0 for any scale.
    const float behind = scratch.flushed[u] - scratch.peak[u];
    const double scale = behind == 0.0f ? 1.0 : __builtin_exp2(behind);
    for (int i = 0; i < vectors; ++i) {
      float* lanes = scratch.sums + (u * vectors + i) * kLanes;
      out.sums[i * pixels + u] = out.sums[i * pixels + u] * scale + lane_sum(load(lanes));
      store(lanes, splat(0.0f));
    }
    scratch.flushed[u] = out.peak[u] = scratch.peak[u];
  }
}

inline void clear(const Bank& bank, Scratch& scratch, Partial out) {
  const std::size_t pixels = bank.pixels(), vectors = 1 + bank.channels;
  std::memset(scratch.sums, 0, vectors * pixels * kLanes * sizeof(float));
  std::memset(out.sums, 0, vectors * pixels * sizeof(double));
  for (std::size_t u = 0; u < pixels; ++u) scratch.peak[u] = scratch.flushed[u] = kNoPeak;
}

// 0 for the lanes of a tile whose images are in the range, else -∞.
inline Vec lane_bias(std::int64_t tile, const Query& query) {
  Vec bias = {};
  for (int i = 0; i < kLanes; ++i) {
    const std::int64_t image = tile * kLanes + i;
    if (image < query.lo || image >= query.hi) bias[i] = kForbidden;
  }
  return bias;
}

// Bits relative to the running maximum up to which weights do not count, in a task with so many sources
// of each place: all those left out are together below 2^-kCounted of the sum, which the source of the
// maximum alone makes 1. It depends on the task only.
inline float dead_bits(std::int64_t sources) {
  int bits = kCounted;
  for (; sources > 1; sources = (sources + 1) / 2) ++bits;
  return float(-bits);
}

template <int C, bool kSame>
[[gnu::noinline]] void sweep_block(int streams, const Block& block, const Rows& rows, const Columns& columns,
                 Scratch& scratch) {
  switch (streams) {
    case 1: return sweep<C, 1, kSame>(block, rows, columns, scratch);
    case 2: return sweep<C, 2, kSame>(block, rows, columns, scratch);
    case 3: return sweep<C, 3, kSame>(block, rows, columns, scratch);
    default: return sweep<C, kBlock, kSame>(block, rows, columns, scratch);
  }
}

using SweepBlock = void (*)(int, const Block&, const Rows&, const Columns&, Scratch&);

// The sweeps over a number of channels. What calls them is compiled once for all of them.
template <bool kSame>
SweepBlock sweep_of(int channels) {
  return by_channels(channels, [](auto c) { return SweepBlock(sweep_block<c.value, kSame>); });
}

// Displacement 0 over a whole axis: on the torus, or clipped at its ends.
inline Rows all_rows(const Bank& bank, int radius, bool cyclic) {
  return {0, 0, bank.height, cyclic ? radius : least(radius, bank.height - 1), !cyclic};
}

inline Columns all_columns(const Bank& bank, int radius, bool cyclic) {
  const int reach = cyclic ? radius : least(radius, bank.width - 1);
  const Columns::Run all = {0, 0, bank.width, true};
  return {0, bank.width, cyclic ? 0 : reach, reach, cyclic, {all}, {all}, 1, 1, nullptr, 0};
}

// The sources of a query place are the same place of each image.
inline void same_place(const Bank& bank, const Geometry& geometry, const Query& query,
                std::int64_t first, std::int64_t last, Control& control, Scratch& scratch,
                Partial out) {
  const SweepBlock sweep = sweep_of<true>(bank.channels);
  const bool cyclic = geometry.padding != Padding::kZeros;
  const std::size_t row = std::size_t(bank.width) * kLanes;
  const Rows rows = all_rows(bank, query.window / 2, cyclic);
  Columns columns = all_columns(bank, query.window / 2, cyclic);
  alignas(64) float lanes[kBlock * kLanes];
  columns.bias = lanes;
  Block block = {query.scaled, nullptr,           bank.pixels(), std::size_t(bank.width),
                 bank.height * row, row, tile_floats(bank), query.bias,
                 bank.channels, bank.height, dead_bits((last - first) * kLanes)};
  clear(bank, scratch, out);
  for (std::int64_t tile = first; tile < last && advance(control); tile += kBlock) {
    const int streams = int(last - tile < kBlock ? last - tile : kBlock);
    for (int d = 0; d < streams; ++d) store(lanes + d * kLanes, lane_bias(tile + d, query));
    block.keys = bank.data + tile * tile_floats(bank);
    sweep(streams, block, rows, columns, scratch);
  }
  flush(bank, scratch, out);
}

// Copy a tile with its rows continued cyclically by kPad columns on either side.
inline void copy_tile(const Bank& bank, const float* tile, float* padded) {
  const int width = bank.width;
  for (int i = 0; i < bank.channels * bank.height; ++i) {
    const float* row = tile + std::size_t(i) * width * kLanes;
    for (int j = -kPad; j < width + kPad; ++j, padded += kLanes)
      store(padded, load(row + ((j + kPad * width) % width) * kLanes));
  }
}

inline Wide squares(const Bank& bank, const float* tile, int row, int column) {
  Wide sum = {};
  for (int c = 0; c < bank.channels; ++c) {
    const std::size_t v = c * bank.pixels() + std::size_t(row) * bank.width + column;
    const Wide p = widen(load(tile + v * kLanes));
    sum += p * p;
  }
  return sum;
}

// The term of a logit that depends on its key only: bias·‖p‖², box sums of squares as in a sweep.
// There is one for each key rather than each pair, so double precision is affordable.
inline void key_bias(const Bank& bank, const Geometry& geometry, const Query& query,
                     const float* tile, Vec lanes, Scratch& scratch) {
  const bool cyclic = geometry.padding == Padding::kCircular;
  const int height = bank.height, width = bank.width, r = query.window / 2;
  const int down = cyclic ? r : least(r, height - 1), along = cyclic ? r : least(r, width - 1);
  const std::size_t padded = width + 2 * kPad;
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
    float* bias = scratch.bias + (y * padded + kPad) * kLanes;
    float* edge_bias = scratch.edge_bias + (y * padded + kPad) * kLanes;
    Wide S = {};
    for (int o = -along; o < along; ++o)
      if (seen(o, width)) S += V[wrap(o, width)];
    for (int x = 0; x < width; ++x) {
      if (seen(x + along, width)) S += V[wrap(x + along, width)];
      const Vec all = narrow(S * double(query.bias)) + lanes;
      if (seen(x - along, width)) S -= V[wrap(x - along, width)];
      const bool answers = cyclic || (x >= r && x < width - r);
      store(edge_bias + x * kLanes, all);
      store(bias + x * kLanes, answers ? all : splat(kForbidden));
    }
    for (int x = 1; x <= kPad; ++x) {
      const Vec left = load(bias + wrap(-x, width) * kLanes);
      const Vec right = load(bias + wrap(x - 1, width) * kLanes);
      store(bias - x * kLanes, cyclic ? left : splat(kForbidden));
      store(bias + (width + x - 1) * kLanes, cyclic ? right : splat(kForbidden));
    }
  }
}

// Displacements dx … dx + streams - 1 of the interior of a zero-padded axis.
inline Columns inner_columns(const Bank& bank, int r, int dx, int streams) {
  const int low = most(r, r - (dx + streams - 1)), high = least(bank.width - r, bank.width - r - dx);
  const Columns::Run all = {low - r, low - r + dx, high - low + 2 * r, true};
  const Columns::Run places = {low, low + dx, high - low, true};
  return {low - r, high - low + 2 * r, 0, r, false, {all}, {places}, 1, 1, nullptr, 0};
}

// The same on the torus, where keys wrap once; with valid padding border columns are not sources.
inline Columns torus_columns(const Bank& bank, int r, int dx, int streams, bool valid) {
  const int width = bank.width, turn = width - dx;
  Columns columns = {0, width, 0, r, true, {}, {}, 2, 2, nullptr, 0};
  columns.products[0] = {0, dx, turn, true};
  columns.products[1] = {turn, 0, dx, false};
  if (!valid) {
    columns.places[0] = columns.products[0];
    columns.places[1] = columns.products[1];
    return columns;
  }
  const int low = most(0, r - dx - (streams - 1)), high = most(low, width - r - dx);
  const int again = most(0, width + r - dx - (streams - 1));
  const int end = most(again, least(width, 2 * width - r - dx));
  columns.places[0] = {low, low + dx, least(high, width) - low, true};
  columns.places[1] = {again, again + dx - width, end - again, true};
  return columns;
}

// Call work(streams, columns, clipped) for all columns of a run of rows, a block of displacements at a
// time; the bias of clipped columns is edge_bias.
template <class Work>
void for_each_columns(const Bank& bank, Padding padding, int r, Work work) {
  if (padding != Padding::kZeros) {
    const bool valid = padding == Padding::kValid;
    for (int dx = 0; dx < bank.width; dx += kBlock) {
      const int streams = least(kBlock, bank.width - dx);
      work(streams, torus_columns(bank, r, dx, streams, valid), false);
    }
    return;
  }
  work(1, all_columns(bank, r, false), true);
  const int inner = bank.width - 2 * r;
  auto run_until = [&](int dx, int end) {
    for (; dx < end; dx += kBlock) {
      const int streams = least(kBlock, end - dx);
      work(streams, inner_columns(bank, r, dx, streams), false);
    }
  };
  run_until(1 - inner, 0);
  run_until(1, inner);
}

// Call work(rows) for every vertical displacement.
template <class Work>
void for_each_rows(const Bank& bank, Padding padding, int r, Work work) {
  const int height = bank.height;
  switch (padding) {
    case Padding::kCircular:
      for (int dy = 0; dy < height; ++dy) work(Rows{0, dy, height, r, false});
      break;
    case Padding::kValid:
      for (int dy = 0; dy < height; ++dy)
        work(Rows{wrap(r - dy, height), r, height - 2 * r, r, false});
      break;
    case Padding::kZeros:
      work(all_rows(bank, r, false));
      for (int dy = 1 - (height - 2 * r); dy < height - 2 * r; ++dy)
        if (dy != 0) {
          const int u = most(r, r - dy);
          work(Rows{u, u + dy, height - 2 * r - (dy < 0 ? -dy : dy), r, false});
        }
      break;
  }
}

// The sources of a query place are all places of each image that the padding allows.
inline void every_place(const Bank& bank, const Geometry& geometry, const Query& query,
                 const Share& share, Control& control, Scratch& scratch, Partial out) {
  const SweepBlock sweep = sweep_of<false>(bank.channels);
  const int height = bank.height, r = query.window / 2;
  const std::size_t row = std::size_t(bank.width + 2 * kPad) * kLanes;
  const Block block = {query.scaled,  scratch.tile + kPad * kLanes, bank.pixels(),
                       std::size_t(bank.width), height * row, row, kLanes, 0.0f,
                       bank.channels, height,
                       dead_bits((share.last - share.first) * kLanes * bank.pixels())};
  clear(bank, scratch, out);
  for (std::int64_t tile = share.first; tile < share.last && !is_stopped(control); ++tile) {
    const float* images = bank.data + tile * tile_floats(bank);
    copy_tile(bank, images, scratch.tile);
    key_bias(bank, geometry, query, images, lane_bias(tile, query), scratch);
    int index = 0;
    for_each_rows(bank, geometry.padding, r, [&](const Rows& rows) {
      if (index++ % share.parts != share.part || !advance(control)) return;
      for_each_columns(bank, geometry.padding, r, [&](int streams, Columns columns, bool clipped) {
        if (is_stopped(control)) return;
        columns.bias_row = row;
        columns.bias = (clipped ? scratch.edge_bias : scratch.bias) + kPad * kLanes;
        sweep(streams, block, rows, columns, scratch);
      });
    });
    flush(bank, scratch, out);
  }
}

}  // namespace
