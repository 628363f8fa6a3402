// Cross-entropy over a shard of the vocabulary: loss = log Σ e^x − x[label], and its gradient
// e^(x − log Σ e^x) − [column is the label].
#pragma once

#include "number.h"

namespace megallama::MEGALLAMA_VARIANT {

// The label of a token that is not predicted, as megallama/spec/labels.py has it.
constexpr int64_t IGNORED = -100;

// A label's column of the shard whose first vocabulary row is `first`; −1 where it is elsewhere.
HD int64_t column_of(int64_t label, int64_t first, int64_t width) {
  int64_t column = label - first;
  return column >= 0 && column < width ? column : -1;
}

// Σ e^x of some logits as e^largest · sum. Of none: the smallest finite number and 0, so that a
// shard of nothing but padding, or of logits that are −∞, has −∞ for its logarithm and not NaN.
template <class S>
struct LogSum {
  S largest, sum;

  static HD LogSum none() { return {-largest_finite(S{}), 0}; }

  // NaNs are in `sum` alone: no comparison lets one into `largest`.
  HD void add(LogSum other) {
    S least = largest < other.largest ? largest : other.largest;
    S most = largest < other.largest ? other.largest : largest;
    S scale = exponential(least - most);
    sum = largest < other.largest ? sum * scale + other.sum : sum + other.sum * scale;
    largest = most;
  }

  HD S value() const { return largest + logarithm(sum); }
};

template <class R, class S>
HD R probability(R logit, S log_sum) {
  return exponential(logit - log_sum);
}

}  // namespace megallama::MEGALLAMA_VARIANT
