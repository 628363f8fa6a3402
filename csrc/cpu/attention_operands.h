// How rows of queries, keys and values become operands of products, and sums become rows.
#pragma once

#include "attention.h"

namespace megallama::MEGALLAMA_VARIANT {

// Rows of a head, `stride` elements apart.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;

  HeadRows from(int64_t row) const { return {data + row * stride, stride}; }
};

template <class T>
HD HeadRows<T> head_rows(const Heads& x, int64_t token, int64_t head) {
  return {static_cast<T*>(x.data) + token * x.token_stride + head * x.head_stride, x.token_stride};
}

// What rows of T are packed as: T itself where a word has two, else what it is computed in.
template <class T>
using Element = std::conditional_t<DEPTH<T> == 2, T, Word<T>>;

// Rows as words along the head's width: (padded rows, padded width / DEPTH).
template <class T>
void pack_rows(HeadRows<T> from, int64_t rows, int64_t width, Word<T>* to) {
  using E = Element<T>;
  E* row = reinterpret_cast<E*>(to);
  for (int64_t r = 0; r < rows; r++, row += padded(width)) {
    const T* x = from.data + r * from.stride;
    if constexpr (std::is_same_v<E, T>) {
      memcpy(row, x, width * sizeof(T));
    } else {
      along<T>(width, [&](int64_t e, auto part) { store(row + e, load(x + e, part), part); });
    }
    if (padded(width) != width) memset(row + width, 0, (padded(width) - width) * sizeof(E));
  }
  memset(row, 0, (padded(rows) - rows) * padded(width) * sizeof(E));
}

// Words along the rows, one of `first` and one of `second`.
HD Words paired(Halfwords first, Halfwords second) {
  return extended(first) | extended(second) << 16;
}

// Packed rows as words along the rows: (rows / 2, width), both padded.
inline void pair_rows(const uint32_t* from, int64_t rows, int64_t width, uint32_t* to) {
  const uint16_t* row = reinterpret_cast<const uint16_t*>(from);
  for (int64_t r = 0; r < rows; r += 2, row += 2 * width, to += width)
    for (int64_t e = 0; e < width; e += LANES<Bf16>)
      write(to + e, paired(read<Halfwords>(row + e), read<Halfwords>(row + width + e)));
}

// Rows as words along the rows: (padded rows / DEPTH, padded width). `by_rows`: room for what
// pack_rows makes of them, which is used where words have two elements.
template <class T>
void pack_pairs(HeadRows<T> from, int64_t rows, int64_t width, Word<T>* by_rows, Word<T>* to) {
  if constexpr (DEPTH<T> == 2) {
    pack_rows<T>(from, rows, width, by_rows);
    pair_rows(by_rows, padded(rows), padded(width), to);
  } else {
    pack_rows<T>(from, rows, width, to);
  }
}

// Swaps lane j of register i with lane i of register j, for as many registers as lanes.
template <class V>
HD void transpose_lanes(V (&x)[sizeof(V) / sizeof(V{}[0])]) {
  constexpr int L = sizeof(V) / sizeof(V{}[0]);
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    const __m512i lane = (__m512i)Words{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
    for (int half = 1; half < L; half *= 2) {
      const __mmask16 high = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(half));
      // Lanes of the first register, and from 16 on of the second.
      const __m512i step = _mm512_set1_epi32(half), across = _mm512_set1_epi32(L - half);
      const __m512i low_from = _mm512_mask_add_epi32(lane, high, lane, across);
      const __m512i high_from = _mm512_add_epi32(low_from, step);
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) {
        if (i & half) continue;
        const __m512i a = (__m512i)x[i], b = (__m512i)x[i + half];
        x[i] = (V)_mm512_permutex2var_epi32(a, low_from, b);
        x[i + half] = (V)_mm512_permutex2var_epi32(a, high_from, b);
      }
    }
    return;
  }
#endif
  for (int i = 0; i < L; i++)
    for (int j = 0; j < i; j++) {
      const auto kept = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = kept;
    }
}

// Transposes (rows, columns), multiples of UNIT and of 8, into (columns, BLOCK). May read up to 8
// words beyond the last.
template <class W>
void transpose(const W* from, int64_t rows, int64_t columns, W* to) {
  constexpr int L = BYTES / sizeof(W);
  Register<W> x[L];
  for (int64_t r = 0; r < rows; r += L)
    for (int64_t c = 0; c < columns; c += L) {
      for (int i = 0; i < L; i++) x[i] = read<Register<W>>(from + (r + i) * columns + c);
      transpose_lanes(x);
      for (int i = 0; i < least_of(L, columns - c); i++) write(to + (c + i) * BLOCK + r, x[i]);
    }
}

// Writes sums that lie transposed, (padded width, BLOCK), times a factor for each row.
template <class T, class S>
void write_transposed(const S* sums, const S* factors, int64_t rows, int64_t width,
                      HeadRows<T> to) {
  constexpr int64_t L = LANES<T>;
  Vector<T> x[L];
  for (int64_t r = 0; r < rows; r += L)
    along<T>(width, [&](int64_t e, auto part) {
      for (int i = 0; i < L; i++)
        x[i] = read<Vector<T>>(sums + (e + i) * BLOCK + r) * read<Vector<T>>(factors + r);
      transpose_lanes(x);
      for (int i = 0; i < least_of(L, rows - r); i++) store(to.from(r + i).data + e, x[i], part);
    });
}

// Writes sums (rows, padded width) times `factor`.
template <class T, class S>
void write_rows(const S* sums, S factor, int64_t rows, int64_t width, HeadRows<T> to) {
  for (int64_t r = 0; r < rows; r++)
    along<T>(width, [&](int64_t e, auto part) {
      store(to.from(r).data + e, read<Vector<T>>(sums + r * padded(width) + e) * factor, part);
    });
}

// Stores what two rows of a block have in a register each, as rows of elements.
template <class T>
HD void store_rows(Vector<T> first, Vector<T> second, Element<T>* to) {
  store(to, first, Whole{});
  store(to + BLOCK, second, Whole{});
}

// The same as words along the rows.
template <class T>
HD void store_pair(Vector<T> first, Vector<T> second, Word<T>* to) {
  if constexpr (DEPTH<T> == 1) store_rows<T>(first, second, to);
#if defined(__AVX512BF16__)
  if constexpr (DEPTH<T> == 2) {
    // Halfwords i of the two halves of a register go side by side.
    const Words i = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i order = (__m512i)(i | (i + 16u) << 16);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    write(to, (Words)_mm512_permutexvar_epi16(order, both));
  }
#endif
}

}  // namespace megallama::MEGALLAMA_VARIANT
