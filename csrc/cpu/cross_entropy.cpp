// Cross-entropy on the CPU. A row comes from memory once: what is done to it next finds it in the
// cache (64 KiB at 32,000 columns of bf16).
#include "../cross_entropy.h"

#include "parallel.h"

namespace megallama::MEGALLAMA_VARIANT {

namespace {

// Columns whose largest logit is found before their exponentials are summed: both from the first
// cache. One exponential an element, where a maximum kept per lane takes two.
constexpr int64_t BLOCK = 2048;

// Lanes beyond the row count for nothing: −∞.
template <class T>
Vector<T> load_logits(const T* from, Whole part) {
  return load(from, part);
}
template <class T>
Vector<T> load_logits(const T* from, Tail part) {
  Vector<T> x = load(from, part);
  for (int64_t i = part.count; i < LANES<T>; i++) x[i] = -__builtin_inff();
  return x;
}

template <class V>
HD V larger(V a, V b) {
  return a > b ? a : b;
}

template <class T>
Scalar<T> largest_of(const T* logits, int64_t columns) {
  using V = Vector<T>;
  constexpr int64_t L = LANES<T>;
  const V least = V{} + LogSum<Scalar<T>>::none().largest;
  V most[4] = {least, least, least, least};
  int64_t whole = 0;
  for (; whole + 4 * L <= columns; whole += 4 * L)
    for (int k = 0; k < 4; k++)
      most[k] = larger(load(logits + whole + k * L, Whole{}), most[k]);
  along<T>(columns - whole, [&](int64_t i, auto part) {
    most[0] = larger(load_logits(logits + whole + i, part), most[0]);
  });
  const V lanes = larger(larger(most[0], most[1]), larger(most[2], most[3]));
  Scalar<T> found = lanes[0];
  for (int i = 1; i < LANES<T>; i++) found = lanes[i] > found ? lanes[i] : found;
  return found;
}

template <class T>
LogSum<Scalar<T>> log_sum(const T* logits, int64_t columns) {
  auto all = LogSum<Scalar<T>>::none();
  for (int64_t first = 0; first < columns; first += BLOCK) {
    const T* block = logits + first;
    const int64_t size = columns - first < BLOCK ? columns - first : BLOCK;
    const Scalar<T> largest = largest_of(block, size);
    Vector<T> sums[4] = {};
    along<T>(size, sums, [&](int64_t i, auto part, Vector<T>& sum) {
      sum += probability(load_logits(block + i, part), largest);
    });
    all.add({largest, total<T>(sums[0], sums[1], sums[2], sums[3])});
  }
  return all;
}

template <class T>
Scalar<T> at(const T* row, int64_t column) {
  return load(row + column, Tail{1})[0];
}

template <class T>
void fill_zero(T* row, int64_t first, int64_t columns) {
  along<T>(columns - first,
           [&](int64_t i, auto part) { store(row + first + i, Vector<T>{}, part); });
}

// Turns `width` logits into their gradient; `target` is the label's column, or −1.
template <class T>
void to_gradient(T* logits, int64_t width, int64_t target, Scalar<T> lse) {
  Vector<T> of_target = {};
  if (target >= 0) of_target = probability(load(logits + target, Tail{1}), lse) - 1;
  along<T>(width, [&](int64_t i, auto part) {
    store(logits + i, probability(load(logits + i, part), lse), part);
  });
  if (target >= 0) store(logits + target, of_target, Tail{1});
}

// exps[i] = e^(logits[i] − largest), which may be the same memory; their sum.
template <class T, class S>
S exponentials(const T* logits, S* exps, int64_t columns, S largest) {
  Vector<T> sums[4] = {};
  along<T>(columns, sums, [&](int64_t i, auto part, Vector<T>& sum) {
    const Vector<T> e = probability(load_logits(logits + i, part), largest);
    store(exps + i, e, part);
    sum += e;
  });
  return total<T>(sums[0], sums[1], sums[2], sums[3]);
}

// The loss of a row whose logits become their gradient, by one exponential each.
template <class T, class S>
S loss_and_gradient(T* logits, S* scratch, int64_t width, int64_t target) {
  S* exps = scratch;
  if constexpr (std::is_same_v<T, S>) exps = logits;
  const S largest = largest_of(logits, width), logit = target >= 0 ? at(logits, target) : 0;
  const S sum = exponentials(logits, exps, width, largest), scale = 1 / sum;
  const S p = target >= 0 ? exps[target] * scale : 0;
  along<T>(width, [&](int64_t i, auto part) {
    store(logits + i, load(exps + i, part) * scale, part);
  });
  if (target >= 0) store(logits + target, Vector<T>{} + (p - 1), Tail{1});
  return largest + logarithm(sum) - logit;
}

}  // namespace

void cross_entropy_statistics(Launch launch, Rows logits, Rows labels, int64_t first,
                              int64_t width, Rows log_sums, Rows targets) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    using S = Scalar<T>;
    shared_out(launch, launch.rows, width, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const T* x = row<T>(logits, t);
        const int64_t target = column_of(row<int64_t>(labels, 0)[t], first, width);
        row<S>(targets, 0)[t] = target >= 0 ? at(x, target) : 0;
        row<S>(log_sums, 0)[t] = log_sum(x, width).value();
      }
    });
  });
}

void cross_entropy_gradient(Launch launch, Rows logits, Rows labels, Rows lse, int64_t first,
                            int64_t width) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    const int64_t columns = launch.columns;
    shared_out(launch, launch.rows, 2 * columns, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        T* x = row<T>(logits, t);
        const int64_t label = row<int64_t>(labels, 0)[t];
        const bool predicted = label != IGNORED;
        if (predicted)
          to_gradient(x, width, column_of(label, first, width), row<Scalar<T>>(lse, 0)[t]);
        fill_zero(x, predicted ? width : 0, columns);
      }
    });
  });
}

// A row's exponentials are kept, those of two-byte logits in the share's row of `scratch`: taking
// them again from the cached logits is slower by half.
void cross_entropy(Launch launch, Rows logits, Rows labels, int64_t width, Rows loss,
                   Partials scratch) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    using S = Scalar<T>;
    const int64_t columns = launch.columns, shares = scratch.count;
    auto rows_of_share = [&](int64_t share) {
      S* held = static_cast<S*>(scratch.data) + share * width;
      const int64_t end = launch.rows * (share + 1) / shares;
      for (int64_t t = launch.rows * share / shares; t < end; t++) {
        T* x = row<T>(logits, t);
        const int64_t label = row<int64_t>(labels, 0)[t];
        const bool predicted = label != IGNORED;
        row<S>(loss, 0)[t] =
            predicted ? loss_and_gradient(x, held, width, column_of(label, 0, width)) : S{0};
        fill_zero(x, predicted ? width : 0, columns);
      }
    };
    const int64_t size = launch.rows * columns / (shares ? shares : 1);
    shared_out(launch, shares, 2 * size, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; share++) rows_of_share(share);
    });
  });
}

}  // namespace megallama::MEGALLAMA_VARIANT
