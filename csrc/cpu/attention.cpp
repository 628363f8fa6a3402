// Causal attention's forward on the CPU (FlashAttention-2, arXiv 2307.08691): a block of queries
// meets one block of keys after the other, and what it has is rescaled where a larger score comes.
#include "attention_operands.h"

namespace megallama::MEGALLAMA_VARIANT {

namespace {

// Below any score, and still finite times log2(e).
constexpr float LOWEST = -__FLT_MAX__ / 2;

// What a block of queries knows of the keys so far, a lane each: the largest score, Σ e^(score −
// largest), and what the last block of keys multiplies earlier sums by.
template <class S>
struct Softmax {
  alignas(64) S largest[BLOCK], sum[BLOCK], fading[BLOCK];

  void begin() {
    for (int64_t i = 0; i < BLOCK; i++) largest[i] = LOWEST, sum[i] = 0;
  }
};

// Turns scores (keys, BLOCK) of the queries in lanes `first` to `last` into words of probabilities.
// In a block on the diagonal, keys later than the query have none: key 0 is query `first`.
// factor: log2(e) times the scale of the scores.
template <class T, bool DIAGONAL>
void probabilities(const Scalar<T>* scores, int64_t keys, int64_t first, int64_t last,
                   Scalar<T> factor, Softmax<Scalar<T>>& softmax, Word<T>* to) {
  using V = Vector<T>;
  using S = Scalar<T>;
  const V least = V{} + LEAST_POWER / factor, never = V{} + LOWEST;
  for (int64_t i = first; i < last; i += LANES<T>) {
    const V query = lane_numbers<T>(i - first), before = read<V>(softmax.largest + i);
    V largest = before;
    for (int64_t k = 0; k < keys; k++) {
      V score = read<V>(scores + k * BLOCK + i);
      if (DIAGONAL) score = query >= S(k) ? score : never;
      largest = at_least(largest, score);
    }
    V sums[ABREAST] = {};
    for (int64_t k = 0; k < keys; k += ABREAST) {
      V p[ABREAST];
      abreast([&](int n) {
        p[n] = at_least(read<V>(scores + (k + n) * BLOCK + i) - largest, least);
      });
      powers(p, factor);
      if (DIAGONAL) abreast([&](int n) { p[n] = query >= S(k + n) ? p[n] : V{}; });
      abreast([&](int n) { sums[n] += p[n]; });
      for (int n = 0; n < ABREAST; n += 2)
        store_pair<T>(p[n], p[n + 1], to + (k + n) / DEPTH<T> * BLOCK + i);
    }
    const V fading = power(at_least(before - largest, least), factor);
    write(softmax.largest + i, largest);
    write(softmax.fading + i, fading);
    const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    write(softmax.sum + i, read<V>(softmax.sum + i) * fading + sum);
  }
}

// The forward of a key head of one segment, in a thread's scratch memory.
template <class T>
class Forward {
  using W = Word<T>;
  using S = Scalar<T>;
  using V = Vector<T>;
  static constexpr int D = DEPTH<T>;

 public:
  Forward(int64_t width, int64_t length, HeadRows<T> k, HeadRows<T> v, Scratch& scratch)
      : width_(width), words_(padded(width) / D), length_(length),
        scale_(S(1 / __builtin_sqrt(double(width)))) {
    scratch.lay_out([&] {
      for (W** operand : {&keys_, &values_}) *operand = scratch.take<W>(padded(length) * words_);
      for (W** operand : {&rows_, &queries_}) *operand = scratch.take<W>(BLOCK * words_);
      p_ = scratch.take<W>(BLOCK / D * BLOCK);
      scores_ = scratch.take<S>(BLOCK * BLOCK);
      sums_ = scratch.take<S>(padded(width) * BLOCK);
    });
    pack_rows<T>(k, length, width, keys_);
    for (int64_t i = 0; i < length; i += BLOCK)
      pack_pairs<T>(v.from(i), least_of(BLOCK, length - i), width, rows_, values_ + i * words_);
  }

  // The queries of the block at `first`.
  void attend(HeadRows<T> q, int64_t first, HeadRows<T> o, S* lse, int64_t lse_stride) {
    const int64_t count = least_of(BLOCK, length_ - first), lanes = padded(count);
    pack_rows<T>(q.from(first), count, width_, rows_);
    transpose(rows_, lanes, words_, queries_);
    softmax_.begin();
    for (int64_t j = 0; j < first; j += BLOCK) meet<false>(j, BLOCK, 0, lanes);
    for (int64_t j = 0; j < lanes; j += HALF)
      meet<true>(first + j, least_of(HALF, lanes - j), j, lanes);
    for (int64_t i = 0; i < count; i++) {
      lse[(first + i) * lse_stride] = softmax_.largest[i] * scale_ + logarithm(softmax_.sum[i]);
      softmax_.sum[i] = 1 / softmax_.sum[i];
    }
    write_transposed(sums_, softmax_.sum, count, width_, o.from(first));
  }

 private:
  // Lanes from `origin` on meet `number` keys at j of the segment.
  template <bool DIAGONAL>
  void meet(int64_t j, int64_t number, int64_t origin, int64_t lanes) {
    const int64_t width = padded(width_);
    multiply(number, lanes - origin, words_, Left<W>{keys_ + j * words_, words_, 1},
             Matrix<const W>{queries_ + origin, BLOCK}, Matrix<S>{scores_ + origin, BLOCK},
             Replaced{});
    probabilities<T, DIAGONAL>(scores_, number, origin, lanes, scale_ * S(1.4426950408889634),
                               softmax_, p_);
    const Left<W> values{values_ + j * words_, 1, width};
    const Matrix<const W> p{p_ + origin, BLOCK};
    const Matrix<S> sums{sums_ + origin, BLOCK};
    const S* fading = softmax_.fading + origin;
    if (j == 0)
      multiply(width, lanes - origin, number / D, values, p, sums, Replaced{});
    else
      multiply(width, lanes - origin, number / D, values, p, sums,
               [&](V sum, const S* old, int64_t lane) {
                 return read<V>(old) * read<V>(fading + lane) + sum;
               });
  }

  int64_t width_, words_, length_;
  S scale_;
  W *keys_, *values_;        // of the segment
  W *rows_, *queries_, *p_;  // of a block
  S *scores_, *sums_;        // (keys, queries) and, o before its division, (padded width, queries)
  Softmax<S> softmax_;
};

}  // namespace

void attention_forward(Launch launch, Attention attention, Heads q, Heads k, Heads v, Heads o,
                       Rows lse) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    const int64_t group = attention.heads / attention.key_heads;
    // In parts, only the packing of keys and values is done more than once.
    each_item(launch, attention, 1.0, [&](const Item& item) {
      const int64_t first = item.part * BLOCK, step = item.parts * BLOCK;
      if (first >= item.length) return;
      thread_local Scratch scratch;
      auto at = [&](const Heads& x, int64_t head) { return head_rows<T>(x, item.token, head); };
      Forward<T> forward(launch.columns, item.length, at(k, item.key_head), at(v, item.key_head),
                         scratch);
      for (int64_t n = 0; n < group; n++) {
        const int64_t head = item.key_head * group + n;
        for (int64_t i = first; i < item.length; i += step)
          forward.attend(at(q, head), i, at(o, head), row<Scalar<T>>(lse, item.token) + head,
                         lse.stride);
      }
    });
  });
}

}  // namespace megallama::MEGALLAMA_VARIANT
