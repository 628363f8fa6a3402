// The second pass of a sum over rows: partial sums, added to what is there in a fixed order.
#include "common.cuh"

namespace megallama::cuda {

namespace {

// A column's partial sums are shared out among GROUPS threads.
constexpr int COLUMNS = 32, GROUPS = 32;

__global__ void __launch_bounds__(COLUMNS* GROUPS)
    add_kernel(const float* partials, int64_t count, float* sum, int64_t columns) {
  __shared__ float sums[GROUPS][COLUMNS];
  const int64_t column = int64_t{blockIdx.x} * COLUMNS + threadIdx.x;
  float mine = 0;
  if (column < columns)
    for (int64_t p = threadIdx.y; p < count; p += GROUPS) mine += partials[p * columns + column];
  sums[threadIdx.y][threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.y || column >= columns) return;
  for (int group = 1; group < GROUPS; group++) mine += sums[group][threadIdx.x];
  sum[column] += mine;
}

}  // namespace

void add_partials(Launch launch, Partials partials, Rows sum) {
  if (launch.columns == 0) return;
  add_kernel<<<divided_up(launch.columns, COLUMNS), dim3(COLUMNS, GROUPS), 0, stream(launch)>>>(
      static_cast<float*>(partials.data), partials.count, static_cast<float*>(sum.data),
      launch.columns);
  launched("add_partials");
}

}  // namespace megallama::cuda
