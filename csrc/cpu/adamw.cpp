// AdamW on the CPU, over contiguous elements: four reads and three writes of an fp32 each, and the
// weight's rounded copy.
#include "../adamw.h"

#include "parallel.h"

namespace megallama::MEGALLAMA_VARIANT {

void adamw(Launch launch, Rows master, Rows gradient, Rows exp_avg, Rows exp_avg_sq, Rows weight,
           Rows divisor, AdamW update) {
  constexpr int64_t BLOCK = 8192;  // elements: what threads divide among themselves
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    using S = Scalar<T>;
    const AdamWFactors<S> factors(update);
    const S scale = *row<S>(divisor, 0);
    auto elements = [&](int64_t first, int64_t count) {
      S *w = row<S>(master, 0) + first, *m = row<S>(exp_avg, 0) + first;
      S* v = row<S>(exp_avg_sq, 0) + first;
      const S* g = row<S>(gradient, 0) + first;
      T* rounded = weight.data ? row<T>(weight, 0) + first : nullptr;
      along<S>(count, [&](int64_t i, auto part) {
        Vector<S> w_i = load(w + i, part), m_i = load(m + i, part), v_i = load(v + i, part);
        adamw_update(w_i, m_i, v_i, load(g + i, part) / scale, factors);
        store(w + i, w_i, part);
        store(m + i, m_i, part);
        store(v + i, v_i, part);
        if (rounded) store(rounded + i, w_i, part);
      });
    };
    const int64_t blocks = (launch.columns + BLOCK - 1) / BLOCK;
    shared_out(launch, blocks, BLOCK, [&](int64_t begin, int64_t end) {
      end = end * BLOCK < launch.columns ? end * BLOCK : launch.columns;
      elements(begin * BLOCK, end - begin * BLOCK);
    });
  });
}

}  // namespace megallama::MEGALLAMA_VARIANT
