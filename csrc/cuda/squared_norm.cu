// Σ x² on CUDA: a block a partial sum, then one block over those, each in a fixed order.
#include "../squared_norm.h"

#include "common.cuh"

namespace megallama::cuda {

namespace {

constexpr int THREADS = 256;

// The sum over a block's threads, in its first one.
__device__ __forceinline__ double sum_of_block(double mine) {
  __shared__ double of_warp[THREADS / WARP];
#pragma unroll
  for (int lane = WARP / 2; lane; lane /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, lane);
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = mine;
  __syncthreads();
  mine = 0;
  for (int warp = 0; warp < THREADS / WARP; warp++) mine += of_warp[warp];
  return mine;
}

template <class T, int N>
__device__ __forceinline__ double sum_of_squares(const T* x, int64_t first, int64_t last) {
  double sum = 0;
  for (int64_t i = first + int64_t{threadIdx.x} * N; i < last; i += THREADS * N) {
    const auto chunk = get<N>(x + i);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const double value = widen(chunk.of[k]);
      sum += value * value;
    }
  }
  return sum;
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    partial_kernel(const T* x, int64_t size, int64_t share, double* partials) {
  const int64_t first = blockIdx.x * share, count = min(share, size - first);
  double mine = 0;
  if (count > 0) {
    const int64_t whole = first + count / N * N;
    mine = sum_of_squares<T, N>(x, first, whole);
    if (N > 1) mine += sum_of_squares<T, 1>(x, whole, first + count);
  }
  mine = sum_of_block(mine);
  if (threadIdx.x == 0) partials[blockIdx.x] = mine;
}

__global__ void __launch_bounds__(THREADS)
    total_kernel(const double* partials, int64_t count, double* sum) {
  double mine = 0;
  for (int64_t p = threadIdx.x; p < count; p += THREADS) mine += partials[p];
  mine = sum_of_block(mine);
  if (threadIdx.x == 0) *sum = mine;
}

}  // namespace

void squared_norm(Launch launch, Rows x, Rows partials, Rows sum) {
  auto* partial = static_cast<double*>(partials.data);
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    auto* kernel = aligned<T>(x) ? partial_kernel<T, CHUNK<T>> : partial_kernel<T, 1>;
    kernel<<<counted(launch.rows), THREADS, 0, stream(launch)>>>(
        static_cast<T*>(x.data), launch.columns, share_of(launch.columns, launch.rows), partial);
    launched("squared_norm");
  });
  total_kernel<<<1, THREADS, 0, stream(launch)>>>(partial, launch.rows,
                                                  static_cast<double*>(sum.data));
  launched("squared_norm");
}

}  // namespace megallama::cuda
