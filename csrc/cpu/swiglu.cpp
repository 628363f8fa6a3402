// SwiGLU on the CPU; gate and up are the halves of a row.
#include "../swiglu.h"

#include "parallel.h"

namespace megallama::MEGALLAMA_VARIANT {

void swiglu_forward(Launch launch, Rows gate_up, Rows act) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    shared_out(launch, launch.rows, 3 * launch.columns, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) {
        const T *gate = row<T>(gate_up, t), *up = gate + launch.columns;
        T* out = row<T>(act, t);
        along<T>(launch.columns, [&](int64_t i, auto part) {
          store(out + i, swiglu(load(gate + i, part), load(up + i, part)), part);
        });
      }
    });
  });
}

void swiglu_backward(Launch launch, Rows dact, Rows gate_up, Rows dgate_up, Rows act) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    shared_out(launch, launch.rows, 6 * launch.columns, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) {
        const T *gate = row<T>(gate_up, t), *up = gate + launch.columns, *from = row<T>(dact, t);
        T *dgate = row<T>(dgate_up, t), *dup = dgate + launch.columns, *out = row<T>(act, t);
        along<T>(launch.columns, [&](int64_t i, auto part) {
          auto [dg, du, a] =
              swiglu_gradient(load(from + i, part), load(gate + i, part), load(up + i, part));
          store(dgate + i, dg, part);
          store(dup + i, du, part);
          store(out + i, a, part);
        });
      }
    });
  });
}

}  // namespace megallama::MEGALLAMA_VARIANT
