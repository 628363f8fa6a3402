// SwiGLU (arXiv 2002.05202): act = silu(gate) · up, silu(g) = g·s with s = 1 / (1 + e^-g).
#pragma once

#include "number.h"

namespace megallama::MEGALLAMA_VARIANT {

template <class R>
HD R sigmoid(R x) {
  return 1 / (1 + exponential(-x));
}

template <class R>
HD R swiglu(R gate, R up) {
  return gate * sigmoid(gate) * up;
}

// The gradients of one element, and `act`, the forward's own result bit for bit.
template <class R>
struct SwigluGradient {
  R dgate, dup, act;
};

// silu'(g) = s·(1 + g·(1 − s)).
template <class R>
HD SwigluGradient<R> swiglu_gradient(R dact, R gate, R up) {
  R s = sigmoid(gate), silu = gate * s;
  return {dact * up * (s * (1 + gate * (1 - s))), dact * silu, silu * up};
}

}  // namespace megallama::MEGALLAMA_VARIANT
