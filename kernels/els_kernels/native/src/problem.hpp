// Interface of the planner (library.cpp, compiled once) and the kernels (kernel.cpp, compiled for
// each instruction set).
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
  std::int64_t lo, hi;  // range of bank images
  const double* exact;  // `scaled` and `bias` in double precision
  double exact_bias;
};

// A task's share of the sources: tiles [first, last) of the bank and, of the vertical displacements
// between query and key, every `parts`-th.
struct Share {
  std::int64_t first, last;
  int part, parts;

  bool operator==(const Share& other) const {
    return first == other.first && last == other.last && part == other.part &&
           parts == other.parts;
  }
};

// Softmax over a part of the sources: Σ 2^(logit - peak)·(1, value), value-major.
struct Partial {
  float* peak;   // [pixels]
  double* sums;  // [1 + channels][pixels]: weights, then responses
};

// State shared by a call and the thread that monitors it; read and written without a lock.
struct Control {
  std::int32_t stop;   // not 0: the call returns at the next block of work, without a result
  std::int32_t apart[15];  // `stop` is read often: keeps it off the cache line that is written
  std::int64_t progress;   // grows while the call computes
};

enum class MomentPass : std::int32_t;
struct MomentQuery;
struct MomentSums;
struct FoldCell;
struct FoldUnit;
struct FoldSums;
struct FoldNormaliser;
struct FoldMoments;
struct FoldMomentSums;
enum class FoldPass : std::int32_t;

constexpr int kMostQueries = 4;
constexpr std::size_t kPiece = 64;  // pixels that are merged together

struct Kernel {
  const char* name;
  int lanes;
  void (*pack)(const Bank& shape, const float* images, const double* centre, float* packed);
  std::size_t (*scratch_floats)(const Bank&, const Geometry&);
  // Most queries that `attend` takes, where work on the bank serves all: 1 to kMostQueries.
  int (*queries)(const Bank&, const Geometry&);
  // Partial results of `count` queries for a share of the bank; incomplete if the control is stopped.
  void (*attend)(const Bank&, const Geometry&, const Query* queries, int count, const Share&,
                 Control&, float* scratch, const Partial* out);
  // Merge `count` pixels from u on, kPiece at most, of partial results in their order.
  void (*merge)(const Bank& shape, const Partial* parts, int number, std::size_t u, int count,
                Partial out);
  // A pass for moments: see moments_problem.hpp.
  std::size_t (*moment_scratch_floats)(const Bank&, int window);
  void (*moments)(const Bank&, const Geometry&, MomentPass, const MomentQuery&, const Share&,
                  Control&, float* scratch, MomentSums out);
  // A fold: see fold_problem.hpp. Both add the sources of a unit to what is there.
  std::size_t (*fold_scratch_bytes)(const FoldCell&);
  void (*fold_normalise)(const FoldCell&, const FoldUnit&, Control&, char* scratch, FoldSums);
  void (*fold_accumulate)(const FoldCell&, const FoldUnit&, Control&, char* scratch,
                          const FoldNormaliser&, double* fold);
  std::size_t (*fold_moment_scratch_bytes)(const FoldCell&, FoldPass);
  void (*fold_moments)(const FoldCell&, FoldPass, const FoldUnit&, Control&, char* scratch,
                       const FoldMoments&, FoldMomentSums);
};

}  // namespace els
