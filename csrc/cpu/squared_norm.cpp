// Σ x² on the CPU. Converting to fp64 costs no time that reading the numbers does not take.
#include "../squared_norm.h"

#include "parallel.h"

namespace megallama::MEGALLAMA_VARIANT {

namespace {

typedef float HalfFloats __attribute__((vector_size(BYTES / 2)));

// A register's squares, those of fp32 numbers as the sums of its halves.
HD Doubles squares(Doubles x) { return x * x; }
HD Doubles squares(Floats x) {
  HalfFloats half[2];
  memcpy(half, &x, sizeof x);
  const Doubles low = __builtin_convertvector(half[0], Doubles);
  const Doubles high = __builtin_convertvector(half[1], Doubles);
  return low * low + high * high;
}

template <class T>
double sum_of_squares(const T* x, int64_t count) {
  Doubles sums[4] = {};
  along<T>(count, sums, [&](int64_t i, auto part, Doubles& sum) {
    sum += squares(load(x + i, part));
  });
  return total<double>(sums[0], sums[1], sums[2], sums[3]);
}

}  // namespace

void squared_norm(Launch launch, Rows x, Rows partials, Rows sum) {
  const int64_t count = launch.rows, size = launch.columns;
  double *partial = row<double>(partials, 0), all = 0;
  if (count) {
    const int64_t share = share_of(size, count);
    with_type(launch, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      shared_out(launch, count, share, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p++) {
          const int64_t first = p * share, left = size - first;
          partial[p] = sum_of_squares(row<T>(x, 0) + first, left < share ? left : share);
        }
      });
    });
  }
  for (int64_t p = 0; p < count; p++) all += partial[p];
  *row<double>(sum, 0) = all;
}

}  // namespace megallama::MEGALLAMA_VARIANT
