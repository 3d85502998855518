// What the planner (library.cpp, compiled once) and the kernels (kernel.cpp, once for every
// instruction set) agree on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace els {

enum class Sources : std::int32_t { kSame = 0, kEvery = 1 };
enum class Padding : std::int32_t { kZeros = 0, kCircular = 1, kValid = 2 };

// A bank of images side by side: [tiles][channels][height][width][lanes], centred, zero past the
// last image. An operation on one vector works on the same pixel of `lanes` images.
struct Bank {
  const float* data;
  std::int64_t images;
  int channels, height, width;

  std::size_t pixels() const { return std::size_t(height) * width; }
};

struct Geometry {
  Sources sources;
  Padding padding;
  bool whole;
};

// One image with its noise level folded in: a logit in base 2 is  <scaled, p> + bias·‖p‖²  for a
// centred patch p, plus a constant of the query that only the evidence needs.
struct Query {
  const float* scaled;  // [channels][height][width]
  float bias;
  int window;
  std::int64_t lo, hi;  // images of the bank that may answer
};

// A task's share of the sources: tiles [first, last) of the bank and, of the vertical displacements
// between query and key, every `parts`-th.
struct Share {
  std::int64_t first, last;
  int part, parts;
};

// Softmax over a part of the sources: Σ 2^(logit - peak)·(1, value), value-major.
struct Partial {
  float* peak;   // [pixels]
  double* sums;  // [1 + channels][pixels]: weights, then responses
};

// What a call shares with the thread that watches it; read and written without a lock.
struct Control {
  std::int32_t stop;   // not 0: the call returns at the next block of work, without an answer
  std::int32_t apart[15];  // `stop` is read often: it is not on the cache line that is written
  std::int64_t progress;   // grows while the call computes
};

struct Kernel {
  const char* name;
  int lanes;
  void (*pack)(const Bank& shape, const float* images, const double* centre, float* packed);
  std::size_t (*scratch_floats)(const Bank&);
  // The answer of a share of the bank to one query; nothing where the control says stop.
  void (*attend)(const Bank&, const Geometry&, const Query&, const Share&, Control&,
                 float* scratch, Partial out);
};

}  // namespace els
