// Causal attention's backward on the CPU (FlashAttention-2, arXiv 2307.08691): with the forward's
// log-sum-exp, a block of probabilities p is made again from its queries and keys. Then
//   dv += pᵀ·do, dp = do·vᵀ, ds = p·(dp − delta), dq += ds·k, dk += dsᵀ·q,
// where delta is Σ do·o over a query's head; dq and dk get the scale of the scores at the end.
#include "attention_operands.h"

namespace megallama::MEGALLAMA_VARIANT {

namespace {

// Keys whose scores become gradients at once, from the first cache.
constexpr int64_t STRIP = 16;

// The backward of a query head of one segment, in a thread's scratch memory.
template <class T>
class Backward {
  using W = Word<T>;
  using S = Scalar<T>;
  using V = Vector<T>;
  using E = Element<T>;
  static constexpr int D = DEPTH<T>;

 public:
  Backward(int64_t width, int64_t length, Scratch& scratch)
      : width_(width), padded_(padded(width)), words_(padded_ / D), length_(length),
        scale_(S(1 / __builtin_sqrt(double(width)))) {
    const int64_t count = (length + BLOCK - 1) / BLOCK * BLOCK;
    scratch.lay_out([&] {
      for (W** operand : {&q_columns_, &q_pairs_, &do_columns_, &do_pairs_})
        *operand = scratch.take<W>(count * words_);
      for (S** sums : {&dq_, &dk_, &dv_}) *sums = scratch.take<S>(count * padded_);
      for (S** numbers : {&lse_, &delta_}) *numbers = scratch.take<S>(count);
      for (W** operand : {&rows_, &keys_, &values_, &key_pairs_})
        *operand = scratch.take<W>(BLOCK * words_);
      for (W** operand : {&p_, &ds_, &ds_pairs_}) *operand = scratch.take<W>(BLOCK / D * BLOCK);
      for (S** strip : {&scores_, &dp_}) *strip = scratch.take<S>(STRIP * BLOCK);
      scales_ = scratch.take<S>(BLOCK);
    });
    std::fill_n(scales_, BLOCK, scale_);
  }

  // Makes a query head's operands and statistics.
  void pack_queries(HeadRows<T> q, HeadRows<T> d_o, HeadRows<T> o, const S* lse, int64_t stride) {
    for (int64_t i = 0; i < length_; i += BLOCK) {
      const int64_t lanes = padded(count_at(i));
      pack_columns(q.from(i), i, q_columns_, q_pairs_);
      pack_columns(d_o.from(i), i, do_columns_, do_pairs_);
      for (int64_t r = i; r < i + lanes; r++) {
        const bool there = r < length_;
        lse_[r] = there ? lse[r * stride] : 0;
        delta_[r] = there ? product(d_o.from(r).data, o.from(r).data) : 0;
      }
    }
  }

  // Makes the gradients of the item's blocks: the head's dq, and its dk and dv, which those of a
  // group's first head begin and those of its last are written with.
  void gradients(const Item& item, HeadRows<T> k, HeadRows<T> v, HeadRows<T> dq, HeadRows<T> dk,
                 HeadRows<T> dv, bool first, bool last) {
    const bool whole = item.parts == 1;
    const int64_t step = item.parts * BLOCK;
    for (int64_t j = item.part * BLOCK; j < length_; j += step) {
      const int64_t count = count_at(j), kept = first && last ? 0 : j * padded_;
      pack_keys(k.from(j), v.from(j), count);
      if (first) std::fill_n(dk_ + kept, BLOCK * padded_, S(0));
      if (first) std::fill_n(dv_ + kept, BLOCK * padded_, S(0));
      for (int64_t i = j; i < length_; i += BLOCK)
        meet_block(i, j, whole, dk_ + kept, dv_ + kept);
      if (whole) write_transposed(dq_ + j * padded_, scales_, count, width_, dq.from(j));
      if (!last) continue;
      write_rows(dk_ + kept, scale_, count, width_, dk.from(j));
      write_rows(dv_ + kept, S(1), count, width_, dv.from(j));
    }
    // In parts, p and ds are made twice: other items have the keys that these queries meet.
    for (int64_t i = item.part * BLOCK; i < length_ && !whole; i += step) {
      for (int64_t j = 0; j <= i; j += BLOCK) {
        pack_keys(k.from(j), v.from(j), count_at(j));
        meet_block(i, j, true, nullptr, nullptr);
      }
      write_transposed(dq_ + i * padded_, scales_, count_at(i), width_, dq.from(i));
    }
  }

 private:
  int64_t count_at(int64_t first) const { return least_of(BLOCK, length_ - first); }

  // Both kinds of right operands that queries are, and output gradients.
  void pack_columns(HeadRows<T> x, int64_t first, W* columns, W* pairs) {
    const int64_t count = count_at(first), at = first * words_;
    pack_pairs<T>(x, count, width_, rows_, pairs + at);
    transpose(D == 2 ? rows_ : pairs + at, padded(count), words_, columns + at);
  }

  void pack_keys(HeadRows<T> k, HeadRows<T> v, int64_t count) {
    pack_pairs<T>(k, count, width_, keys_, D == 2 ? key_pairs_ : keys_);
    pack_rows<T>(v, count, width_, values_);
  }

  S product(const T* a, const T* b) const {
    V sums[4] = {};
    along<T>(width_, sums, [&](int64_t e, auto part, V& sum) {
      sum += load(a + e, part) * load(b + e, part);
    });
    return total<T>(sums[0], sums[1], sums[2], sums[3]);
  }

  // What the block of keys at j and the block of queries at i add to the gradients: to dq if asked,
  // to dk and dv if there are any.
  void meet_block(int64_t i, int64_t j, bool to_dq, S* dk, S* dv) {
    if (i > j) return meet<false>(i, j, 0, BLOCK, to_dq, dk, dv);
    const int64_t number = padded(count_at(j));
    for (int64_t n = 0; n < number; n += HALF)
      meet<true>(i, j, n, least_of(HALF, number - n), to_dq, dk, dv);
  }

  // The same for `number` keys from key `first` of the block on. On the diagonal, queries before
  // that key are left out.
  template <bool DIAGONAL>
  void meet(int64_t i, int64_t j, int64_t first, int64_t number, bool to_dq, S* dk, S* dv) {
    const int64_t origin = DIAGONAL ? first : 0, lanes = padded(count_at(i)) - origin;
    const int64_t at = i * words_;
    for (int64_t n = 0; n < number; n += STRIP) {
      const int64_t key = (first + n) * words_;
      multiply(STRIP, lanes, words_, Left<W>{keys_ + key, words_, 1},
               Matrix<const W>{q_columns_ + at + origin, BLOCK}, Matrix<S>{scores_, BLOCK},
               Replaced{});
      multiply(STRIP, lanes, words_, Left<W>{values_ + key, words_, 1},
               Matrix<const W>{do_columns_ + at + origin, BLOCK}, Matrix<S>{dp_, BLOCK},
               Replaced{});
      strip<DIAGONAL>(n, lanes, lse_ + i + origin, delta_ + i + origin);
    }
    if (dk) {
      const int64_t query = at + origin / D * padded_, row = first * padded_;
      multiply(number, padded_, lanes / D, Left<W>{p_, BLOCK / D, 1},
               Matrix<const W>{do_pairs_ + query, padded_}, Matrix<S>{dv + row, padded_}, Added{});
      multiply(number, padded_, lanes / D, Left<W>{ds_, BLOCK / D, 1},
               Matrix<const W>{q_pairs_ + query, padded_}, Matrix<S>{dk + row, padded_}, Added{});
    }
    if (!to_dq) return;
    const Left<W> keys{(D == 2 ? key_pairs_ : keys_) + first / D * padded_, 1, padded_};
    const Matrix<const W> ds{D == 2 ? ds_pairs_ : ds_, BLOCK};
    const Matrix<S> dq{dq_ + i * padded_ + origin, BLOCK};
    if (j + first == 0)
      multiply(padded_, lanes, number / D, keys, ds, dq, Replaced{});
    else
      multiply(padded_, lanes, number / D, keys, ds, dq, Added{});
  }

  // p and ds of a strip of keys from their scores and dp. On the diagonal, key 0 is query 0.
  template <bool DIAGONAL>
  void strip(int64_t first, int64_t lanes, const S* lse, const S* delta) {
    const S least = S(LEAST_POWER * 0.6931471805599453), log2_e = S(1.4426950408889634);
    E *p_rows = reinterpret_cast<E*>(p_) + first * BLOCK,
      *ds_rows = reinterpret_cast<E*>(ds_) + first * BLOCK;
    for (int64_t i = 0; i < lanes; i += LANES<T>) {
      const V log_sum = read<V>(lse + i), low = log_sum + least, deltas = read<V>(delta + i);
      const V query = lane_numbers<T>(i);
      for (int64_t k = 0; k < STRIP; k += ABREAST) {
        const int64_t at = k * BLOCK + i;
        V p[ABREAST], ds[ABREAST];
        // The product is rounded as the log-sum-exp's was: p is at most 1, however large it is.
        abreast([&](int n) {
          p[n] = at_least(read<V>(scores_ + at + n * BLOCK) * scale_, low) - log_sum;
        });
        powers(p, log2_e);
        if (DIAGONAL) abreast([&](int n) { p[n] = query >= S(first + k + n) ? p[n] : V{}; });
        abreast([&](int n) { ds[n] = p[n] * (read<V>(dp_ + at + n * BLOCK) - deltas); });
        for (int n = 0; n < ABREAST; n += 2) {
          store_rows<T>(p[n], p[n + 1], p_rows + at + n * BLOCK);
          store_rows<T>(ds[n], ds[n + 1], ds_rows + at + n * BLOCK);
          if constexpr (D == 2)
            store_pair<T>(ds[n], ds[n + 1], ds_pairs_ + (first + k + n) / D * BLOCK + i);
        }
      }
    }
  }

  int64_t width_, padded_, words_, length_;
  S scale_;
  // Of the segment: queries and output gradients as both kinds of right operands, sums (dq
  // transposed block by block), and what the rows of p and ds are made with.
  W *q_columns_, *q_pairs_, *do_columns_, *do_pairs_;
  S *dq_, *dk_, *dv_, *lse_, *delta_;
  W *rows_, *keys_, *values_, *key_pairs_, *p_, *ds_, *ds_pairs_;  // of a block
  S *scores_, *dp_, *scales_;                                      // of a strip
};

}  // namespace

void attention_backward(Launch launch, Attention attention, Heads d_o, Heads q, Heads k, Heads v,
                        Heads o, Rows lse, Heads dq, Heads dk, Heads dv) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    const int64_t group = attention.heads / attention.key_heads;
    // In parts, there are seven products to a pair of blocks and not five.
    each_item(launch, attention, 1.4, [&](const Item& item) {
      if (item.part * BLOCK >= item.length) return;
      thread_local Scratch scratch;
      Backward<T> backward(launch.columns, item.length, scratch);
      auto at = [&](const Heads& x, int64_t head) { return head_rows<T>(x, item.token, head); };
      for (int64_t n = 0; n < group; n++) {
        const int64_t head = item.key_head * group + n;
        backward.pack_queries(at(q, head), at(d_o, head), at(o, head),
                              row<Scalar<T>>(lse, item.token) + head, lse.stride);
        backward.gradients(item, at(k, item.key_head), at(v, item.key_head), at(dq, head),
                           at(dk, item.key_head), at(dv, item.key_head), n == 0, n == group - 1);
      }
    });
  });
}

}  // namespace megallama::MEGALLAMA_VARIANT
