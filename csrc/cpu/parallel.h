// Work on rows, divided among threads, for the element type of a launch.
#pragma once

#include "../number.h"
#include "../ops.h"

namespace megallama::MEGALLAMA_VARIANT {

// work(first, last) for contiguous shares of `count` items of `size` elements each. Which thread
// does an item changes no bit: items are independent.
template <class Work>
void shared_out(const Launch& launch, int64_t count, int64_t size, Work work) {
  // Starting a thread's share takes a few microseconds, as moving this many elements does.
  const int64_t grain = 16384;
  int64_t threads = count * size / grain;
  threads = threads < 1 ? 1 : threads;
  threads = threads < (int64_t)launch.where ? threads : (int64_t)launch.where;
  threads = threads < count ? threads : count;
  if (threads <= 1) {
    work(int64_t{0}, count);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t i = 0; i < threads; i++) work(count * i / threads, count * (i + 1) / threads);
}

// f(static_cast<T*>(nullptr)) for the launch's element type T.
template <class F>
void with_type(const Launch& launch, F f) {
  switch (launch.type) {
    case FP32: return f(static_cast<float*>(nullptr));
    case BF16: return f(static_cast<Bf16*>(nullptr));
    case FP16: return f(static_cast<Fp16*>(nullptr));
    case FP64: return f(static_cast<double*>(nullptr));
  }
}

// The same for a launch of sums: fp32, or fp64.
template <class F>
void with_wide_type(const Launch& launch, F f) {
  return launch.type == FP64 ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

// T of a pointer to it.
template <class P>
using Pointee = std::remove_pointer_t<P>;

template <class T>
HD T* row(const Rows& rows, int64_t index) {
  return static_cast<T*>(rows.data) + index * rows.stride;
}

}  // namespace megallama::MEGALLAMA_VARIANT
