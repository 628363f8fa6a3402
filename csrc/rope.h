// Rotary position embedding (RoFormer, arXiv 2104.09864): each pair (x[e], x[e + E/2]) is turned.
#pragma once

#include "number.h"

namespace megallama::MEGALLAMA_VARIANT {

// Turns (a, b) by the angle of this cosine and sine; the inverse has the sine's sign changed.
template <class R>
HD void rotate(R& a, R& b, R cos, R sin) {
  R turned = a * cos - b * sin;
  b = b * cos + a * sin;
  a = turned;
}

}  // namespace megallama::MEGALLAMA_VARIANT
