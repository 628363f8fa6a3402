// RMSNorm on the CPU. A row is read twice, the second time from the cache.
#include "../rms_norm.h"

#include "parallel.h"

namespace megallama::MEGALLAMA_VARIANT {

namespace {

template <class T>
Scalar<T> sum_of_squares(const T* x, int64_t columns) {
  Vector<T> sums[4] = {};
  along<T>(columns, sums, [&](int64_t i, auto part, Vector<T>& sum) {
    Vector<T> value = load(x + i, part);
    sum += value * value;
  });
  return total<T>(sums[0], sums[1], sums[2], sums[3]);
}

// sum = x + residual, rounded: the norm is of what is stored, as if computed from it alone.
template <class T>
void add_rows(const T* x, const T* residual, T* sum, int64_t columns) {
  along<T>(columns, [&](int64_t i, auto part) {
    store(sum + i, load(x + i, part) + load(residual + i, part), part);
  });
}

template <class T>
RmsNormSums<Scalar<T>> backward_sums(const T* dn, const T* x, const T* w, int64_t columns) {
  using Sums = RmsNormSums<Vector<T>>;
  Sums s[4] = {};
  along<T>(columns, s, [&](int64_t i, auto part, Sums& sums) {
    sums.add(load(dn + i, part), load(x + i, part), load(w + i, part));
  });
  return {total<T>(s[0].squares, s[1].squares, s[2].squares, s[3].squares),
          total<T>(s[0].products, s[1].products, s[2].products, s[3].products)};
}

}  // namespace

void rms_norm_forward(Launch launch, Rows x, Rows residual, Rows w, double eps, Rows n, Rows sum) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    const int64_t columns = launch.columns;
    shared_out(launch, launch.rows, columns, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) {
        const T *x_row = row<T>(x, t), *weight = row<T>(w, 0);
        if (residual.data) {
          add_rows(x_row, row<T>(residual, t), row<T>(sum, t), columns);
          x_row = row<T>(sum, t);
        }
        const auto r = inverse_rms(sum_of_squares(x_row, columns), columns, eps);
        T* out = row<T>(n, t);
        along<T>(columns, [&](int64_t i, auto part) {
          store(out + i, rms_norm(load(x_row + i, part), r, load(weight + i, part)), part);
        });
      }
    });
  });
}

// Each of dw's rows adds up a share of the rows that depends on their number alone.
void rms_norm_backward(Launch launch, Rows dn, Rows x, Rows w, double eps, Rows residual, Rows dx,
                       Partials dw) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    using S = Scalar<T>;
    const int64_t columns = launch.columns;
    const T* weight = row<T>(w, 0);
    auto backward_row = [&](int64_t t, S* dw_row) {
      const T *dn_row = row<T>(dn, t), *x_row = row<T>(x, t), *more = row<T>(residual, t);
      T* out = row<T>(dx, t);
      const auto sums = backward_sums(dn_row, x_row, weight, columns);
      const S r = inverse_rms(sums.squares, columns, eps);
      const S slope = rms_norm_slope(sums.products, columns, r);
      along<T>(columns, [&](int64_t i, auto part) {
        Vector<T> dn_i = load(dn_row + i, part), x_i = load(x_row + i, part);
        Vector<T> dx_i = rms_norm_dx(dn_i, x_i, load(weight + i, part), r, slope);
        if (residual.data) dx_i += load(more + i, part);
        store(out + i, dx_i, part);
        store(dw_row + i, load(dw_row + i, part) + rms_norm_dw(dn_i, x_i, r), part);
      });
    };
    shared_out(launch, dw.count, launch.rows / dw.count * columns, [&](int64_t first, int64_t last) {
      for (int64_t share = first; share < last; share++) {
        S* dw_row = static_cast<S*>(dw.data) + share * columns;
        for (int64_t i = 0; i < columns; i++) dw_row[i] = 0;
        const int64_t end = launch.rows * (share + 1) / dw.count;
        for (int64_t t = launch.rows * share / dw.count; t < end; t++) backward_row(t, dw_row);
      }
    });
  });
}

}  // namespace megallama::MEGALLAMA_VARIANT
