// What causal attention on the CPU is made of: products of blocks, exponentials, scratch memory,
// and the heads that threads share out.
//
// Scores are computed transposed, keys down and queries across: a query is a lane, so its softmax
// is arithmetic between registers and never within one.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace megallama::MEGALLAMA_VARIANT {

// Queries, and keys, of a block. Half as many keys where some are later than some queries.
constexpr int64_t BLOCK = 64;
constexpr int64_t HALF = 32;
// What heads' widths, and the rows of a block, are padded to with zeros.
constexpr int64_t UNIT = 16;

HD int64_t padded(int64_t size) { return (size + UNIT - 1) / UNIT * UNIT; }
HD int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

// A product's operands are words: DEPTH neighbours along its sum each.
template <class T>
struct Operand {
  using Word = Scalar<T>;
  static constexpr int DEPTH = 1;
};
#if defined(__AVX512BF16__)
template <>
struct Operand<Bf16> {
  using Word = uint32_t;
  static constexpr int DEPTH = 2;
};
#endif
template <class T>
using Word = typename Operand<T>::Word;
template <class T>
constexpr int DEPTH = Operand<T>::DEPTH;

HD Floats register_of(float) { return Floats{}; }
HD Doubles register_of(double) { return Doubles{}; }
HD Words register_of(uint32_t) { return Words{}; }
template <class W>
using Register = decltype(register_of(W{}));

template <class V, class P>
HD V read(const P* from) {
  V x;
  memcpy(&x, from, sizeof x);
  return x;
}
template <class V, class P>
HD void write(P* to, V x) {
  memcpy(to, &x, sizeof x);
}

HD Floats add_product(Floats sum, Floats a, Floats b) { return sum + a * b; }
HD Doubles add_product(Doubles sum, Doubles a, Doubles b) { return sum + a * b; }
#if defined(__AVX512BF16__)
HD Floats add_product(Floats sum, Words a, Words b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// The left operand: word (row, step) is at data[row · row_stride + step · step_stride].
template <class W>
struct Left {
  const W* data;
  int64_t row_stride, step_stride;
};
// The right operand and the result: `stride` from a step, or a row, to the next.
template <class P>
struct Matrix {
  P* data;
  int64_t stride;
};

// M rows by N registers of sums. They begin at zero, and what was there before is added once: so
// rounding errors grow with the number of blocks and not of tokens.
template <int M, int N, class W, class S, class Finish>
HD void tile(int64_t steps, Left<W> a, Matrix<const W> b, Matrix<S> c, Finish finish) {
  constexpr int64_t L = BYTES / sizeof(S);
  Register<S> sums[M][N] = {};
  for (int64_t step = 0; step < steps; step++) {
    Register<W> right[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) right[j] = read<Register<W>>(b.data + step * b.stride + j * L);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      Register<W> left = Register<W>{} + a.data[i * a.row_stride + step * a.step_stride];
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) sums[i][j] = add_product(sums[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
      S* to = c.data + i * c.stride + j * L;
      write(to, finish(sums[i][j], to, j * L));
    }
}

// c = finish(a · b, address, column). `rows` and `columns` are multiples of UNIT.
template <class W, class S, class Finish>
void multiply(int64_t rows, int64_t columns, int64_t steps, Left<W> a, Matrix<const W> b,
              Matrix<S> c, Finish finish) {
#if defined(__AVX512F__)
  constexpr int WIDEST = 4, SUMS = 16;  // of 32 registers: 221 GFLOP/s in bf16 on a core of Zen 4
#else
  constexpr int WIDEST = 2, SUMS = 8;  // of 16
#endif
  constexpr int64_t L = BYTES / sizeof(S);
  int64_t column = 0;
  auto strips = [&](auto registers) {
    constexpr int N = decltype(registers)::value, M = SUMS / N < 8 ? SUMS / N : 8;
    for (; column + N * L <= columns; column += N * L)
      for (int64_t i = 0; i < rows; i += M)
        tile<M, N>(steps, Left<W>{a.data + i * a.row_stride, a.row_stride, a.step_stride},
                   Matrix<const W>{b.data + column, b.stride},
                   Matrix<S>{c.data + i * c.stride + column, c.stride},
                   [&](Register<S> sum, const S* old, int64_t lane) {
                     return finish(sum, old, column + lane);
                   });
  };
  strips(std::integral_constant<int, WIDEST>{});
  strips(std::integral_constant<int, 2>{});
  strips(std::integral_constant<int, 1>{});
}

// Ways to finish: the sum replaces what is there, or is added to it.
struct Replaced {
  template <class V, class S>
  HD V operator()(V sum, const S*, int64_t) const { return sum; }
};
struct Added {
  template <class V, class S>
  HD V operator()(V sum, const S* old, int64_t) const { return read<V>(old) + sum; }
};

// Registers that are computed side by side, so that none waits for its last result: the softmax of
// a block takes 0.94 µs instead of 1.16.
constexpr int ABREAST = 4;
template <class Step>
HD void abreast(Step step) {
#pragma GCC unroll 4
  for (int n = 0; n < ABREAST; n++) step(n);
}

// x = 2^(x·factor), for x·factor from LEAST_POWER to 127; a NaN stays one. The polynomial of the
// least relative error over [-1/2, 1/2], 9e-8, that is 1 at 0.
constexpr float LEAST_POWER = -125;
HD void powers(Floats (&x)[ABREAST], float factor) {
  const float shift = 0x1.8p23f;  // x + shift has no fraction
  Floats shifted[ABREAST], r[ABREAST], y[ABREAST];
  abreast([&](int n) { shifted[n] = x[n] * factor + shift; });
  abreast([&](int n) { y[n] = shifted[n] - shift; });
  abreast([&](int n) { r[n] = x[n] * factor - y[n]; });
  abreast([&](int n) { y[n] = r[n] * 0x1.5bba14p-10f + 0x1.3cea88p-7f; });
  abreast([&](int n) { y[n] = y[n] * r[n] + 0x1.c6b752p-5f; });
  abreast([&](int n) { y[n] = y[n] * r[n] + 0x1.ebf9bcp-3f; });
  abreast([&](int n) { y[n] = y[n] * r[n] + 0x1.62e42ap-1f; });
  abreast([&](int n) { y[n] = y[n] * r[n] + 1.0f; });
  abreast([&](int n) { x[n] = (Floats)((Words)y[n] + ((Words)shifted[n] << 23)); });
}
HD void powers(Doubles (&x)[ABREAST], double factor) {
  for (Doubles& each : x) each = exponential(each * (factor * 0.6931471805599453));
}
template <class V, class S>
HD V power(V x, S factor) {
  V all[ABREAST] = {x, x, x, x};
  powers(all, factor);
  return all[0];
}

// a, or b where that is larger; a NaN in a stays.
template <class V>
HD V at_least(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Floats>) return (V)_mm512_max_ps((__m512)b, (__m512)a);
#endif
  return b > a ? b : a;
}

// first, first + 1, …: lanes that are compared with indices.
template <class T>
HD Vector<T> lane_numbers(int64_t first) {
  Vector<T> numbers;
  for (int i = 0; i < LANES<T>; i++) numbers[i] = Scalar<T>(first + i);
  return numbers;
}

// A thread's memory, kept from call to call: fresh pages cost more than what is done in them.
class Scratch {
 public:
  // Calls takes(), which takes all there is to take, twice: the first time for the sum alone.
  template <class Takes>
  void lay_out(Takes takes) {
    used_ = 0;
    takes();
    if (used_ > size_) {
      memory_.reset();
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, used_)));
      size_ = used_;
    }
    used_ = 0;
    takes();
  }
  // `count` numbers that begin a cache line.
  template <class P>
  P* take(int64_t count) {
    P* found = used_ < size_ ? reinterpret_cast<P*>(memory_.get() + used_) : nullptr;
    used_ += (count * sizeof(P) + 63) / 64 * 64;
    return found;
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0, used_ = 0;
};

// What a thread does at a time: a key head of a segment, or of its blocks every `parts`-th.
struct Item {
  int64_t token, length, key_head, part, parts;
};

// The parts that key heads are divided into, where they go round badly among the threads. `cost`:
// how many times as much work there is then.
HD int64_t parts_for(int64_t key_heads, int64_t threads, double cost) {
  const int64_t turns = (key_heads + threads - 1) / threads;
  return cost * key_heads < threads * turns ? (4 * threads + key_heads - 1) / key_heads : 1;
}

// work(item) for all key heads of all segments, long segments first. No result depends on the
// parts, or on which thread does what: the number of threads changes no bit.
template <class Work>
void each_item(const Launch& launch, const Attention& attention, double cost, Work work) {
  const int64_t* offsets = attention.offsets;
  auto length = [&](int64_t s) { return offsets[s + 1] - offsets[s]; };
  std::vector<int64_t> order(attention.segments);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return length(a) > length(b); });
  const int64_t heads = attention.key_heads, threads = launch.where;
  const int64_t parts = parts_for(attention.segments * heads, threads, cost);
  const int64_t items = attention.segments * heads * parts;
  const int64_t team = items > 1 ? least_of(threads, items) : 1;
#pragma omp parallel for num_threads(team) schedule(dynamic, 1) if (team > 1)
  for (int64_t i = 0; i < items; i++) {
    const int64_t segment = order[i / parts / heads];
    work(Item{offsets[segment], length(segment), i / parts % heads, i % parts, parts});
  }
}

}  // namespace megallama::MEGALLAMA_VARIANT
