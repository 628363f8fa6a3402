// One vector register of fp32 or fp64 numbers, and how elements of any type get in and out.
//
// Vectors are the compiler's own (GCC and Clang): arithmetic, comparisons and `?:` work lane by
// lane, with scalars too. Each instruction set compiles this file into a namespace of its own.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "elements.h"

namespace megallama::MEGALLAMA_VARIANT {

// What an element type is computed in: the register, and its scalar.
template <class T>
struct Wide {
  using Vector = Floats;
  using Scalar = float;
};
template <>
struct Wide<double> {
  using Vector = Doubles;
  using Scalar = double;
};
template <class T>
using Vector = typename Wide<T>::Vector;
template <class T>
using Scalar = typename Wide<T>::Scalar;
template <class T>
constexpr int LANES = BYTES / sizeof(Scalar<T>);

// How much of a register a step of a row fills.
struct Whole {};
struct Tail {
  int64_t count;
};

template <class T>
using Stored = decltype(narrow(Vector<T>{}, static_cast<const T*>(nullptr)));

template <class T>
HD Vector<T> load(const T* from, Whole) {
  Stored<T> x;
  memcpy(&x, from, sizeof x);
  return widen(x, from);
}

// Lanes beyond the row are zero.
template <class T>
HD Vector<T> load(const T* from, Tail tail) {
  T x[LANES<T>] = {};
  for (int64_t i = 0; i < tail.count; i++) x[i] = from[i];
  return load(x, Whole{});
}

template <class T>
HD void store(T* to, Vector<T> x, Whole) {
  Stored<T> narrowed = narrow(x, to);
  memcpy(to, &narrowed, sizeof narrowed);
}

template <class T>
HD void store(T* to, Vector<T> x, Tail tail) {
  T narrowed[LANES<T>];
  store(narrowed, x, Whole{});
  for (int64_t i = 0; i < tail.count; i++) to[i] = narrowed[i];
}

// step(i, part) for each register of a row of `columns` elements.
template <class T, class Step>
HD void along(int64_t columns, Step step) {
  int64_t i = 0;
  for (; i + LANES<T> <= columns; i += LANES<T>) step(i, Whole{});
  if (i < columns) step(i, Tail{columns - i});
}

// The same into four accumulators in turn, so that additions need not wait for one another:
// step(i, part, accumulator). After every few steps they are added to `into` and begin anew, so that
// rounding errors grow with the number of these stretches and not with the row's length. Which
// accumulator a column goes to depends on the row's length alone.
template <class T, class Accumulator, class Step>
HD void along(int64_t columns, Accumulator (&into)[4], Step step) {
  constexpr int64_t L = LANES<T>, STRETCH = 16 * 4 * L;
  for (int64_t i = 0; i < columns;) {
    const int64_t end = columns - i < STRETCH ? columns : i + STRETCH;
    Accumulator a[4] = {};
    for (; i + 4 * L <= end; i += 4 * L) {
      step(i, Whole{}, a[0]);
      step(i + L, Whole{}, a[1]);
      step(i + 2 * L, Whole{}, a[2]);
      step(i + 3 * L, Whole{}, a[3]);
    }
    for (; i + L <= end; i += L) step(i, Whole{}, a[0]);
    if (i < end) step(i, Tail{end - i}, a[1]);
    i = end;
    for (int k = 0; k < 4; k++) into[k] += a[k];
  }
}

// The sum of four registers' lanes.
template <class T>
HD Scalar<T> total(Vector<T> a, Vector<T> b, Vector<T> c, Vector<T> d) {
  Vector<T> lanes = (a + b) + (c + d);
#pragma GCC unroll 4
  for (int half = LANES<T> / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

HD float square_root(float x) { return __builtin_sqrtf(x); }
HD double square_root(double x) { return __builtin_sqrt(x); }
template <class V>
HD V square_roots(V x) {
  for (unsigned i = 0; i < BYTES / sizeof x[0]; i++) x[i] = square_root(x[i]);
  return x;
}
HD Floats square_root(Floats x) { return square_roots(x); }
HD Doubles square_root(Doubles x) { return square_roots(x); }

HD float logarithm(float x) { return __builtin_logf(x); }
HD double logarithm(double x) { return __builtin_log(x); }
HD float exponential(float x) { return __builtin_expf(x); }
HD double exponential(double x) { return __builtin_exp(x); }
HD float largest_finite(float) { return __FLT_MAX__; }
HD double largest_finite(double) { return __DBL_MAX__; }

HD Doubles exponential(Doubles x) {
  Doubles y;
  for (unsigned i = 0; i < BYTES / sizeof(double); i++) y[i] = __builtin_exp(x[i]);
  return y;
}

// e^x = 2^n · e^r with |r| ≤ ln 2 / 2 and e^r by its Taylor series: the first term left out,
// r⁷/7!, is below 2^-22 of an fp32 unit in the first place. Zero below 2^-126.
HD Floats exponential(Floats x) {
  x = x > 89.0f ? (Floats{} + 89.0f) : x;  // comparisons with a NaN are false: it stays
  x = x < -88.0f ? (Floats{} - 88.0f) : x;
  const float shift = 0x1.8p23f;  // x + shift has no fraction
  Floats shifted = x * 0x1.715476p0f + shift;
  Floats n = shifted - shift;
  Floats r = x - n * 0x1.62e4p-1f;  // ln 2 in two parts, so that the first product is exact
  r = r - n * 0x1.7f7d1cp-20f;
  Floats y = 1.0f / 5040 * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  Words power = ((Words)shifted - 0x4b400000u + 127u) << 23;
  return y * (Floats)power;
}

}  // namespace megallama::MEGALLAMA_VARIANT
