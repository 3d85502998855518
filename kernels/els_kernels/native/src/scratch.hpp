// A thread's working memory, allocated once: tasks do not allocate.
#pragma once

#include "problem.hpp"
#include "simd.hpp"

namespace {

using els::Bank;
using els::Control;
using els::Geometry;
using els::Padding;
using els::Partial;
using els::Query;
using els::Share;
using els::Sources;

constexpr int kBlock = 4;         // displacements, or tiles of the bank, worked on together
constexpr int kPad = kBlock - 1;  // columns on either side that a block may touch past an image

// A fresh running maximum: any logit exceeds it and takes its place; it is never added to one that
// counts.
constexpr float kNoPeak = -1.7e38f;
// How far, in bits, a logit may exceed the running maximum before the sums are rescaled.
constexpr float kHeadroom = 40.0f;
// Bits of a sum that count: what is left out of it, in total, is a sixteenth of the rounding of a float.
constexpr int kCounted = 28;
// Running sums are recomputed after so many rows (V) and columns (S), so that rounding errors do not
// accumulate. S is the larger number, where most of the error is made, and the cheaper to restart.
constexpr int kRowRestart = 32, kColumnRestart = 16;

inline bool is_stopped(const Control& control) {
  return __atomic_load_n(&control.stop, __ATOMIC_RELAXED) != 0;
}

// Count a unit of work; returns whether the call may continue.
inline bool advance(Control& control) {
  __atomic_fetch_add(&control.progress, 1, __ATOMIC_RELAXED);
  return !is_stopped(control);
}

inline int least(int a, int b) { return a < b ? a : b; }
inline int most(int a, int b) { return a > b ? a : b; }
// i modulo n. Rarely more than one period away, and a row of an image costs less than its divisions.
inline int wrap(int i, int n) {
  while (i < 0) i += n;
  while (i >= n) i -= n;
  return i;
}

inline std::size_t tile_floats(const Bank& bank) { return bank.channels * bank.pixels() * kLanes; }

// A row of the query and a row of keys, both at column 0 of channel 0.
struct RowPair {
  const float* query;
  const float* keys;
};

struct Scratch {
  float* tile;       // [C][H][kPad + W + kPad] vectors: a tile, its rows continued cyclically
  float* bias;       // [H][kPad + W + kPad] vectors: -∞ where a column is not a source
  float* edge_bias;  // the same for displacement 0 under zero padding, where every column is a source
  float* columns;    // [3 W][kBlock] vectors: vertical sums of products
  float* sums;       // [HW][1 + C] vectors: each lane's weights and responses
  float* peak;       // [HW]: the running maxima of the logits
  float* flushed;    // [HW]: the maxima that the partial result is relative to
  RowPair* window;   // [H]: the rows of a window
  std::size_t floats = 0;

  // Cut from `base`; from null only to learn how many floats it takes.
  Scratch(const Bank& bank, float* base) {
    const std::size_t padded = std::size_t(bank.height) * (bank.width + 2 * kPad) * kLanes;
    const std::size_t pixels = bank.pixels();
    auto take = [&](std::size_t count) {
      float* at = base == nullptr ? nullptr : base + floats;
      floats += (count + 15) / 16 * 16;  // whole cache lines
      return at;
    };
    tile = take(bank.channels * padded);
    bias = take(padded);
    edge_bias = take(padded);
    columns = take(std::size_t(3) * bank.width * kBlock * kLanes);
    sums = take((1 + bank.channels) * pixels * kLanes);
    peak = take(pixels);
    flushed = take(pixels);
    window = reinterpret_cast<RowPair*>(take(bank.height * sizeof(RowPair) / sizeof(float)));
  }
};

}  // namespace
