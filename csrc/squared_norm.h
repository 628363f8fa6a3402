// Σ x² in fp64: the square of an fp32 number is exact there and cannot overflow.
#pragma once

#include "number.h"

namespace megallama::MEGALLAMA_VARIANT {

// Elements to each of `count` partial sums, the last ones' fewer; a multiple that keeps every share
// as aligned as the first.
HD int64_t share_of(int64_t size, int64_t count) { return ((size - 1) / count / 64 + 1) * 64; }

}  // namespace megallama::MEGALLAMA_VARIANT
