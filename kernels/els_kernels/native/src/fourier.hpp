// Discrete Fourier transforms of images side by side, in double precision.
//
// A complex vector holds one place of `kLanes` real images: those of the lower half of the lanes in its
// real part, the others in its imaginary part. The transform F is linear, so that with a real filter q
//
//     F⁻¹(conj(F q)·F(a + i b)) = corr(q, a) + i corr(q, b)
//
// and of weights u, v of the images the correlations with them, added, are a real part:
//
//     Re F⁻¹(conj(F(u + i v))·F(a + i b)) = corr(u, a) + corr(v, b)
//
// Lengths are factored into 4, 2 and odd primes (Stockham's algorithm: the result is in order).
#pragma once

#include "doubles.hpp"
#include "simd.hpp"

namespace {

typedef double Half __attribute__((vector_size(4 * kLanes)));
typedef float HalfFloats __attribute__((vector_size(2 * kLanes)));

struct Complex {
  Half re, im;
};

struct Root {
  double re, im;
};

[[gnu::always_inline]] inline Complex operator+(const Complex& a, const Complex& b) {
  return {a.re + b.re, a.im + b.im};
}
[[gnu::always_inline]] inline Complex operator-(const Complex& a, const Complex& b) {
  return {a.re - b.re, a.im - b.im};
}
[[gnu::always_inline]] inline Complex operator*(const Complex& a, const Root& w) {
  return {a.re * w.re - a.im * w.im, a.re * w.im + a.im * w.re};
}
[[gnu::always_inline]] inline Complex times_minus_i(const Complex& a) { return {a.im, -a.re}; }
// conj(w)·a
[[gnu::always_inline]] inline Complex conjugate_times(const Root& w, const Complex& a) {
  return {a.re * w.re + a.im * w.im, a.im * w.re - a.re * w.im};
}
[[gnu::always_inline]] inline Complex conjugate_times(const Complex& w, const Complex& a) {
  return {w.re * a.re + w.im * a.im, w.re * a.im - w.im * a.re};
}
[[gnu::always_inline]] inline Half larger(Half a, Half b) { return a > b ? a : b; }

// The lanes of a vector of floats as a complex vector.
[[gnu::always_inline]] inline Complex load_complex(const float* p) {
  HalfFloats low, high;
  std::memcpy(&low, p, sizeof low);
  std::memcpy(&high, p + kLanes / 2, sizeof high);
  return {__builtin_convertvector(low, Half), __builtin_convertvector(high, Half)};
}

// Sum and maximum over the lanes, always in the same order.
inline double lane_sum(Half v) {
  double sum = v[0];
  for (int i = 1; i < kLanes / 2; ++i) sum += v[i];
  return sum;
}
inline double lane_max(Half v) {
  double top = v[0];
  for (int i = 1; i < kLanes / 2; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// Roots of unity e^(-2πi k/length), k < length.
inline void fill_roots(int length, Root* roots) {
  for (int k = 0; k < length; ++k) {
    const double angle = 6.283185307179586 * k / length;
    roots[k] = {__builtin_cos(angle), -__builtin_sin(angle)};
  }
}

// One pass of radix P over x [n][stride] into y, n = P·m; roots of the whole length, every `step`-th of
// which is a root of n.
inline void pass_of_two(int n, int stride, int step, const Root* roots, const Complex* x, Complex* y) {
  const int m = n / 2;
  for (int q = 0; q < m; ++q) {
    const Root w = roots[q * step];
    for (int k = 0; k < stride; ++k) {
      const Complex a = x[q * stride + k], b = x[(q + m) * stride + k];
      y[2 * q * stride + k] = a + b;
      y[(2 * q + 1) * stride + k] = (a - b) * w;
    }
  }
}

inline void pass_of_four(int n, int stride, int step, const Root* roots, const Complex* x,
                         Complex* y) {
  const int m = n / 4;
  for (int q = 0; q < m; ++q) {
    const Root w1 = roots[q * step], w2 = roots[2 * q * step], w3 = roots[3 * q * step];
    for (int k = 0; k < stride; ++k) {
      const Complex a = x[q * stride + k], b = x[(q + m) * stride + k];
      const Complex c = x[(q + 2 * m) * stride + k], d = x[(q + 3 * m) * stride + k];
      const Complex even = a + c, odd = b + d, gap = a - c, turned = times_minus_i(b - d);
      Complex* out = y + 4 * q * stride + k;
      out[0] = even + odd;
      out[stride] = (gap + turned) * w1;
      out[2 * stride] = (even - odd) * w2;
      out[3 * stride] = (gap - turned) * w3;
    }
  }
}

// An odd radix; `terms` has room for radix - 1 vectors.
inline void pass_of_odd(int radix, int n, int stride, int length, const Root* roots, Complex* terms,
                        const Complex* x, Complex* y) {
  const int m = n / radix, half = radix / 2, step = length / n, turn = length / radix;
  Complex* sums = terms;
  Complex* gaps = terms + half;
  for (int q = 0; q < m; ++q)
    for (int k = 0; k < stride; ++k) {
      const Complex first = x[q * stride + k];
      Complex total = first;
      for (int j = 1; j <= half; ++j) {
        const Complex a = x[(q + j * m) * stride + k], b = x[(q + (radix - j) * m) * stride + k];
        sums[j - 1] = a + b;
        gaps[j - 1] = times_minus_i(a - b);
        total = total + sums[j - 1];
      }
      Complex* out = y + radix * q * stride + k;
      out[0] = total;
      for (int r = 1; r <= half; ++r) {
        Complex even = first, odd = {};
        for (int j = 1, at = r; j <= half; ++j) {
          const Root w = roots[at * turn];
          even.re += sums[j - 1].re * w.re, even.im += sums[j - 1].im * w.re;
          odd.re -= gaps[j - 1].re * w.im, odd.im -= gaps[j - 1].im * w.im;
          at += r;
          if (at >= radix) at -= radix;
        }
        out[r * stride] = (even + odd) * roots[q * r * step];
        out[(radix - r) * stride] = (even - odd) * roots[q * (radix - r) * step];
      }
    }
}

// Transform x [length][stride] along its first axis; y is another such array. Returns that of the two
// which has the result.
inline Complex* transform_axis(int length, int stride, const Root* roots, Complex* terms, Complex* x,
                               Complex* y) {
  for (int n = length; n > 1;) {
    const int step = length / n;
    int radix = 3;
    if (n % 4 == 0) {
      radix = 4;
      pass_of_four(n, stride, step, roots, x, y);
    } else if (n % 2 == 0) {
      radix = 2;
      pass_of_two(n, stride, step, roots, x, y);
    } else {
      while (n % radix != 0) radix += 2;
      pass_of_odd(radix, n, stride, length, roots, terms, x, y);
    }
    n /= radix;
    stride *= radix;
    Complex* other = x;
    x = y;
    y = other;
  }
  return x;
}

// Transforms of images of one size.
class Fourier {
 public:
  // Floats of memory that it works in, in whole vectors.
  static std::size_t floats(int height, int width) {
    const std::size_t longest = height > width ? height : width;
    const std::size_t vectors = longest + std::size_t(height) * width;
    return vectors * 2 * kLanes + (height + width) * sizeof(Root) / sizeof(float);
  }

  // Cut from memory that is aligned to vectors.
  Fourier(int height, int width, float* memory) : height_(height), width_(width) {
    const std::size_t pixels = std::size_t(height) * width;
    other_ = reinterpret_cast<Complex*>(memory);
    terms_ = other_ + pixels;
    rows_ = reinterpret_cast<Root*>(terms_ + (height > width ? height : width));
    columns_ = rows_ + height;
    fill_roots(height, rows_);
    fill_roots(width, columns_);
  }

  // Replace an image [height][width] by its transform.
  void transform(Complex* image) {
    for (int i = 0; i < height_; ++i) {
      Complex* row = image + std::size_t(i) * width_;
      settle(transform_axis(width_, 1, columns_, terms_, row, other_), row, width_);
    }
    settle(transform_axis(height_, width_, rows_, terms_, image, other_), image,
           std::size_t(height_) * width_);
  }

 private:
  static void settle(const Complex* found, Complex* wanted, std::size_t count) {
    if (found != wanted) std::memcpy(static_cast<void*>(wanted), found, count * sizeof(Complex));
  }

  int height_, width_;
  Complex *other_, *terms_;
  Root *rows_, *columns_;
};

}  // namespace
