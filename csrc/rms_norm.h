// RMSNorm (arXiv 1910.07467): n = x·r·w with r = 1 / √(mean(x²) + ε), over a row.
//
// With y = x·r: dw = Σ_rows dn·y and dx = r·(dn·w − y·mean(dn·w·y)). That mean is r/D·Σ dn·w·x, so
// one read of the row gives both of its sums.
#pragma once

#include "number.h"

namespace megallama::MEGALLAMA_VARIANT {

// r of a row of `columns` elements. S: float or double.
template <class S>
HD S inverse_rms(S sum_of_squares, int64_t columns, double eps) {
  return 1 / square_root(sum_of_squares / static_cast<S>(columns) + static_cast<S>(eps));
}

template <class R, class S>
HD R rms_norm(R x, S r, R w) {
  return x * r * w;
}

// What a row's backward adds up: `squares` of x, `products` dn·w·x.
template <class R>
struct RmsNormSums {
  R squares, products;

  HD void add(R dn, R x, R w) {
    squares += x * x;
    products += dn * w * x;
  }
  HD void operator+=(const RmsNormSums& other) {
    squares += other.squares;
    products += other.products;
  }
};

// What y is multiplied by in dx, as a factor of x: r² · mean(dn·w·x).
template <class S>
HD S rms_norm_slope(S products, int64_t columns, S r) {
  return r * r * (products / static_cast<S>(columns));
}

template <class R, class S>
HD R rms_norm_dx(R dn, R x, R w, S r, S slope) {
  return (dn * w - x * slope) * r;
}

template <class R, class S>
HD R rms_norm_dw(R dn, R x, S r) {
  return dn * (x * r);
}

}  // namespace megallama::MEGALLAMA_VARIANT
