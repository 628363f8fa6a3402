// RoPE on the CPU; `columns` of the launch are pairs, half a head's width.
#include "../rope.h"

#include "parallel.h"

namespace megallama::MEGALLAMA_VARIANT {

void rope(Launch launch, int64_t heads, Heads x, Rows cos, Rows sin, bool inverse) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    using S = Scalar<T>;
    const int64_t half = launch.columns;
    const S sign = inverse ? -1 : 1;
    auto turn = [&](T* pairs, const S* cosines, const S* sines) {
      along<T>(half, [&](int64_t e, auto part) {
        Vector<T> a = load(pairs + e, part), b = load(pairs + half + e, part);
        rotate(a, b, load(cosines + e, part), sign * load(sines + e, part));
        store(pairs + e, a, part);
        store(pairs + half + e, b, part);
      });
    };
    shared_out(launch, launch.rows, 2 * half * heads, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++)
        for (int64_t head = 0; head < heads; head++)
          turn(static_cast<T*>(x.data) + t * x.token_stride + head * x.head_stride,
               row<S>(cos, t), row<S>(sin, t));
    });
  });
}

}  // namespace megallama::MEGALLAMA_VARIANT
