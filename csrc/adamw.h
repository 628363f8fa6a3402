// AdamW (arXiv 1711.05101), in the order of operations of torch's fused kernel.
#pragma once

#include "number.h"
#include "ops.h"

namespace megallama::MEGALLAMA_VARIANT {

// An update's factors in the type that it is computed in.
template <class S>
struct AdamWFactors {
  S decay, toward_gradient, beta2, square_share, step_size, root_correction, eps;

  HD explicit AdamWFactors(const AdamW& f)
      : decay(static_cast<S>(f.decay)),
        toward_gradient(static_cast<S>(f.toward_gradient)),
        beta2(static_cast<S>(f.beta2)),
        square_share(static_cast<S>(f.square_share)),
        step_size(static_cast<S>(f.step_size)),
        root_correction(static_cast<S>(f.root_correction)),
        eps(static_cast<S>(f.eps)) {}
};

// Updates the weight w and the moments m and v with the gradient g.
template <class R, class S>
HD void adamw_update(R& w, R& m, R& v, R g, const AdamWFactors<S>& f) {
  w = w * f.decay;
  // From the nearer end, as torch.lerp: exactly m where the share is 0, exactly g where it is 1.
  R change = g - m;
  m = f.toward_gradient < S(0.5) ? m + f.toward_gradient * change
                                 : g + (f.toward_gradient - 1) * change;
  v = v * f.beta2 + f.square_share * g * g;
  R root = square_root(v) / f.root_correction + f.eps;
  w = w - f.step_size * m / root;
}

}  // namespace megallama::MEGALLAMA_VARIANT
