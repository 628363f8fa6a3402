// dw += dyᵀ·x on the CPU, of 16-bit operands and added up in fp32: a blocked GEMM in the manner of
// BLIS (Van Zee and van de Geijn, ACM TOMS 41, 2015).
//
// Each thread has a part of dw. It packs a block of x and one of dy into panels, where the words
// that a tile of dw needs next lie side by side. A tile's sums stay in registers for a block of
// tokens, then are added to dw. So an element's order of additions follows from the number of
// tokens alone, and neither threads nor the part of dw that a call covers change its bits.
#include "parallel.h"

namespace megallama::MEGALLAMA_VARIANT {

namespace {

typedef uint32_t Word;
constexpr int LANE = BYTES / sizeof(Word);

// A tile is ROWS × 2 registers of sums. With two of x and one of dy they nearly fill the register
// file; a step of ROWS + 2 loads then feeds 2 · ROWS multiplications, which are what bounds it.
#if defined(__AVX512F__)
constexpr int ROWS = 12;
#else
constexpr int ROWS = 6;
#endif
constexpr int COLUMNS = 2 * LANE;

// Steps in a panel. With 128, dw is read and written so often that the kernel is up to a tenth
// slower; 512 are no faster and take twice the scratch.
constexpr int64_t STEPS = 256;
// Rows of dw for which dy is packed at most: 288 KiB, from a second cache of 512 KiB or more.
constexpr int64_t BLOCK_ROWS = 288;

// What a step holds for a column: two tokens' bf16 where one instruction multiplies and adds pairs,
// one token's fp32 elsewhere. That instruction takes subnormal numbers for zero, sums too.
template <class T>
HD Floats multiply_add(Words a, Words b, Floats sum, const T*) {
  return (Floats)a * (Floats)b + sum;
}
#if defined(__AVX512BF16__)
HD Floats multiply_add(Words a, Words b, Floats sum, const Bf16*) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
template <class T>
constexpr bool PAIRS = std::is_same_v<T, Bf16>;
#else
template <class T>
constexpr bool PAIRS = false;
#endif

template <class T>
constexpr int64_t TOKENS = PAIRS<T> ? 2 : 1;

// Words of a panel: those of its steps, and a register's more, as a step is written in whole
// registers. It also keeps the panels from starting in the same set of a cache.
template <int WIDTH>
constexpr int64_t PANEL = STEPS * WIDTH + LANE;

HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HD int64_t rounded_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The matrix that begins at a row and column of another.
template <class T>
Rows part_of(const Rows& whole, int64_t first_row, int64_t first_column) {
  return {row<T>(whole, first_row) + first_column, whole.stride};
}

// One register's words of a step. `odd`: whether there is a second token.
template <class T, class Part>
HD Words words(const T* even, int64_t stride, bool odd, Part part) {
  const Words first = (Words)load(even, part);
  if constexpr (!PAIRS<T>) return first;
  return first >> 16 | (odd ? (Words)load(even + stride, part) : Words{});
}

// Packs `tokens` rows into panels of WIDTH columns, zeros beyond the last.
template <class T, int WIDTH>
void pack(const Rows& from, int64_t tokens, int64_t columns, Word* panels) {
  for (int64_t t = 0; t < tokens; t += TOKENS<T>) {
    const bool odd = t + 1 < tokens;
    Word* step = panels + t / TOKENS<T> * WIDTH;
    for (int64_t first = 0; first < columns; first += WIDTH, step += PANEL<WIDTH>)
      for (int64_t i = 0; i < WIDTH; i += LANE) {
        const int64_t left = columns - first - i;
        const T* even = row<T>(from, t) + (left > 0 ? first + i : 0);
        const Words packed = left >= LANE ? words(even, from.stride, odd, Whole{})
                                          : words(even, from.stride, odd, Tail{left});
        memcpy(step + i, &packed, sizeof packed);
      }
  }
}

// Adds a tile's sums to its rows × columns of dw.
void add_tile(const Floats (&sums)[ROWS][2], const Rows& dw, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < 2; j++)
      along<float>(least(columns - j * LANE, LANE), [&](int64_t, auto part) {
        float* to = row<float>(dw, i) + j * LANE;
        store(to, load(to, part) + sums[i][j], part);
      });
}

template <class T>
void tile(const Word* dy, const Word* x, int64_t steps, const Rows& dw, int64_t rows,
          int64_t columns) {
  // dw is wanted when the last step is done; waiting for it then takes up to a tenth of the time.
  for (int64_t i = 0; i < rows; i++) {
    __builtin_prefetch(row<float>(dw, i), 1);
    __builtin_prefetch(row<float>(dw, i) + columns - 1, 1);
  }
  Floats sums[ROWS][2] = {};
  for (int64_t s = 0; s < steps; s++, dy += ROWS, x += COLUMNS) {
    Words left, right;
    memcpy(&left, x, sizeof left);
    memcpy(&right, x + LANE, sizeof right);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      const Words one = Words{} + dy[i];
      sums[i][0] = multiply_add(one, left, sums[i][0], static_cast<const T*>(nullptr));
      sums[i][1] = multiply_add(one, right, sums[i][1], static_cast<const T*>(nullptr));
    }
  }
  Floats held[ROWS][2];  // `sums` with an index that is not known here would not be in registers
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    held[i][0] = sums[i][0];
    held[i][1] = sums[i][1];
  }
  add_tile(held, dw, rows, columns);
}

// A block's tiles. A panel of x is used for all rows while it is near, then the next.
template <class T>
void add_tiles(const Word* dy_panels, const Word* x_panels, int64_t steps, const Rows& dw,
               int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; c += COLUMNS)
    for (int64_t r = 0; r < rows; r += ROWS)
      tile<T>(dy_panels + r / ROWS * PANEL<ROWS>, x_panels + c / COLUMNS * PANEL<COLUMNS>, steps,
              part_of<float>(dw, r, c), least(rows - r, ROWS), least(columns - c, COLUMNS));
}

// Part `index` of `count`, about alike, of a range that is divided at multiples of `unit` only.
struct Range {
  int64_t first, size;
};
Range share_of(int64_t size, int64_t unit, int64_t index, int64_t count) {
  const int64_t units = rounded_up(size, unit), first = units * index / count * unit;
  return {first, least(units * (index + 1) / count * unit, size) - first};
}

// dw (rows × columns) += dyᵀ·x, by one thread, which packs x into the first row of scratch and dy
// into the second.
template <class T>
void add_product(int64_t tokens, int64_t rows, int64_t columns, const Rows& dy, const Rows& x,
                 const Rows& dw, const Rows& scratch) {
  Word *x_panels = row<Word>(scratch, 0), *dy_panels = row<Word>(scratch, 1);
  const int64_t most_rows = least(BLOCK_ROWS, scratch.stride / PANEL<ROWS> * ROWS);
  const int64_t blocks = rounded_up(columns, scratch.stride / PANEL<COLUMNS> * COLUMNS);
  for (int64_t t = 0; t < tokens; t += STEPS * TOKENS<T>)
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t count = least(tokens - t, STEPS * TOKENS<T>);
      // All about as wide: dy is packed anew for each, which a narrow one would not repay.
      const Range block = share_of(columns, COLUMNS, b, blocks);
      pack<T, COLUMNS>(part_of<T>(x, t, block.first), count, block.size, x_panels);
      for (int64_t r = 0; r < rows; r += most_rows) {
        const int64_t height = least(rows - r, most_rows);
        pack<T, ROWS>(part_of<T>(dy, t, r), count, height, dy_panels);
        add_tiles<T>(dy_panels, x_panels, rounded_up(count, TOKENS<T>),
                     part_of<float>(dw, r, block.first), height, block.size);
      }
    }
}

// Into how many parts rows and columns are divided among threads, so that these, who each pack what
// they need, pack the least.
struct Grid {
  int64_t down, across;
};
Grid grid_for(int64_t threads, int64_t rows, int64_t columns) {
  Grid best = {threads, 1};
  for (int64_t down = 1; down < threads; down++) {
    const int64_t across = threads / down;
    if (down * across == threads &&
        rows / down + columns / across < rows / best.down + columns / best.across)
      best = {down, across};
  }
  return best;
}

template <class T>
void add_all(const Launch& launch, int64_t outputs, const Rows& dy, const Rows& x, const Rows& dw,
             const Rows& scratch) {
  const int64_t tokens = launch.rows, inputs = launch.columns, threads = launch.where;
  const Grid grid = grid_for(threads, outputs, inputs);
  // A multiplication is a small part of the work on an element that shared_out reckons with. No
  // thread waits for another before the end: with a block of x that all had packed together, two
  // threads on busy cores took two to six times as long.
  const int64_t size = tokens * outputs / threads * inputs / 16;
  shared_out(launch, threads, size, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const Range r = share_of(outputs, ROWS, i / grid.across, grid.down);
      const Range c = share_of(inputs, COLUMNS, i % grid.across, grid.across);
      add_product<T>(tokens, r.size, c.size, part_of<T>(dy, 0, r.first),
                     part_of<T>(x, 0, c.first), part_of<float>(dw, r.first, c.first),
                     part_of<Word>(scratch, 2 * i, 0));
    }
  });
}

}  // namespace

void linear_wgrad(Launch launch, int64_t outputs, Rows dy, Rows x, Rows dw, Rows scratch) {
  if (launch.type == BF16) add_all<Bf16>(launch, outputs, dy, x, dw, scratch);
  if (launch.type == FP16) add_all<Fp16>(launch, outputs, dy, x, dw, scratch);
}

}  // namespace megallama::MEGALLAMA_VARIANT
