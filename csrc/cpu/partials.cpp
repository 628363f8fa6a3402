// The second pass of a sum over rows: partial sums, added to what is there in a fixed order.
#include "parallel.h"

namespace megallama::MEGALLAMA_VARIANT {

void add_partials(Launch launch, Partials partials, Rows sum) {
  constexpr int64_t WIDTH = 256;  // columns at a time, so that their sums stay in the first cache
  with_wide_type(launch, [&](auto* type) {
    using S = Pointee<decltype(type)>;
    auto add = [&](int64_t column) {
      const int64_t left = launch.columns - column, width = left < WIDTH ? left : WIDTH;
      S sums[WIDTH] = {};
      for (int64_t p = 0; p < partials.count; p++) {
        const S* partial = static_cast<S*>(partials.data) + p * launch.columns + column;
        along<S>(width, [&](int64_t i, auto part) {
          store(sums + i, load(sums + i, part) + load(partial + i, part), part);
        });
      }
      S* out = row<S>(sum, 0) + column;
      along<S>(width, [&](int64_t i, auto part) {
        store(out + i, load(out + i, part) + load(sums + i, part), part);
      });
    };
    const int64_t groups = (launch.columns + WIDTH - 1) / WIDTH;
    // An addition is an eighth of the work on an element that shared_out reckons with; where cores
    // are busy, a second start of threads can cost more than the whole sum.
    shared_out(launch, groups, partials.count * WIDTH / 8, [&](int64_t first, int64_t last) {
      for (int64_t group = first; group < last; group++) add(group * WIDTH);
    });
  });
}

}  // namespace megallama::MEGALLAMA_VARIANT
