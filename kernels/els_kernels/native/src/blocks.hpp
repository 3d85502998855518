// Blocks of the bank, and the tasks of a query: included by library.cpp.
//
// A bank is cut into blocks of `size` images in its order, a multiple of the lanes of every kernel. A
// process has all blocks, or every `stride`-th from `first` on, one behind another. What a block
// answers depends on its images and on the range of the query in the whole bank, not on the other
// blocks of the process: sums of blocks merged in one order, see blocks.py, have the same bits
// however many processes share it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "problem.hpp"

extern "C" {

// Arguments from binding.py: the same fields in the same order.
struct ElsBlocks {
  std::int64_t size, first, stride;
  std::int64_t images;  // of the whole bank
};
}

namespace {

using namespace els;

constexpr int kGroups = 8;  // of a bank: see blocks.py
constexpr int kMostChunks = 64;
constexpr int kLeastChunks = 24;  // so that a small bank keeps every core busy to the end
constexpr int kLeastSame = 16;  // tiles of a chunk where each costs little: same place, ideal
constexpr int kLeastWhole = 8;  // of translations, as a chunk takes as many transforms as a tile

// The part of a block that a query attends to: images of this process, of which its tiles.
struct Run {
  std::int64_t lo, hi;
  int group;
  std::int64_t first, last;
};

// How the tiles of a run are cut into tasks; depends on sizes only.
struct Tasks {
  std::int64_t chunk = 1;  // tiles
  int parts = 1;

  int count(const Run& run) const {
    return int((run.last - run.first + chunk - 1) / chunk) * parts;
  }
  Share share(const Run& run, int index) const {
    const std::int64_t begin = run.first + index / parts * chunk;
    return {begin, std::min(run.last, begin + chunk), index % parts, parts};
  }
};

// The runs of range [lo, hi) of the whole bank that this process has, in its order.
std::vector<Run> runs_of(const ElsBlocks& blocks, std::int64_t lo, std::int64_t hi, int lanes) {
  std::vector<Run> out;
  const std::int64_t skipped = lo / blocks.size - blocks.first;
  for (std::int64_t j = std::max<std::int64_t>(0, skipped / blocks.stride);; ++j) {
    const std::int64_t start = (blocks.first + j * blocks.stride) * blocks.size;
    if (start >= hi) return out;
    const std::int64_t from = std::max(lo, start), to = std::min(hi, start + blocks.size);
    if (from >= to) continue;
    const std::int64_t moved = start - j * blocks.size;
    const int group = int((blocks.first + j * blocks.stride) % kGroups);
    out.push_back({from - moved, to - moved, group, (from - moved) / lanes,
                   (to - moved + lanes - 1) / lanes});
  }
}

// The tasks of every run of a range of the whole bank.
Tasks plan_tasks(const Bank& bank, const Geometry& geometry, int window, const ElsBlocks& blocks,
                 std::int64_t lo, std::int64_t hi, int lanes) {
  const std::int64_t tiles = (hi + lanes - 1) / lanes - lo / lanes;
  const std::int64_t block = std::min(tiles, blocks.size / lanes);
  const std::int64_t count = (hi + blocks.size - 1) / blocks.size - lo / blocks.size;
  Tasks out;
  out.chunk = (tiles + kMostChunks - 1) / kMostChunks;
  if (geometry.sources == Sources::kSame) out.chunk = std::max<std::int64_t>(kLeastSame, out.chunk);
  else if (geometry.whole) out.chunk = std::max<std::int64_t>(kLeastWhole, out.chunk);
  // Of several blocks, whose own sums are merged too: larger ones where each costs little.
  const std::int64_t least = geometry.sources == Sources::kSame ? 2 * out.chunk : out.chunk;
  const std::int64_t cuts = std::max<std::int64_t>(1, block / least);
  if (count > 1) out.chunk = (block + cuts - 1) / cuts;
  const int chunks = int((tiles + out.chunk - 1) / out.chunk);
  if (geometry.sources == Sources::kEvery && !geometry.whole && chunks < kLeastChunks) {
    const bool clipped = geometry.padding == Padding::kZeros;
    const int displacements = clipped ? bank.height - 2 * (window / 2) : bank.height;
    const int parts = (kLeastChunks + chunks - 1) / chunks;
    out.parts = std::max(1, std::min(parts, displacements));
  }
  return out;
}

}  // namespace
