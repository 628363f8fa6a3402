// RMSNorm on CUDA.
//
// A row that allows 16-byte accesses and is not too long stays in registers, ITEMS chunks a thread,
// read once: a warp a row and several rows a block for short rows, a block a row for long ones.
// Any other row is read twice, element by element.
//
// The backward's blocks go over many rows and keep their share of dw in registers, so that the
// weight's gradient costs no traffic but one row a block.
#include "../rms_norm.h"

#include "common.cuh"

namespace megallama::cuda {

namespace {

constexpr int MOST_THREADS = 512, MOST_ITEMS = 4, ROWS_OF_WARPS = 8, THREADS = 256;

struct Norm {
  int64_t rows;
  int columns;
  double eps;
};

template <class T, int ITEMS>
__global__ void __launch_bounds__(MOST_THREADS)
    forward_kernel(Norm norm, Rows x, Rows residual, Rows w, Rows n, Rows sum) {
  constexpr int N = CHUNK<T>;
  __shared__ float shared[MOST_THREADS / WARP];
  const int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (t >= norm.rows) return;
  Chunk<T, N> held[ITEMS];
  float sums[1] = {0};
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int i = (item * blockDim.x + threadIdx.x) * N;
    if (i >= norm.columns) continue;
    held[item] = get<N>(row<T>(x, t) + i);
    if (residual.data) {
      const auto more = get<N>(row<T>(residual, t) + i);
#pragma unroll
      for (int k = 0; k < N; k++)
        held[item].of[k] = narrow<T>(widen(held[item].of[k]) + widen(more.of[k]));
      put<N>(row<T>(sum, t) + i, held[item]);
    }
#pragma unroll
    for (int k = 0; k < N; k++) sums[0] += widen(held[item].of[k]) * widen(held[item].of[k]);
  }
  sum_along_x(sums, shared);
  const float r = inverse_rms(sums[0], norm.columns, norm.eps);
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int i = (item * blockDim.x + threadIdx.x) * N;
    if (i >= norm.columns) continue;
    const auto weight = get<N>(static_cast<T*>(w.data) + i);
#pragma unroll
    for (int k = 0; k < N; k++)
      held[item].of[k] = narrow<T>(rms_norm(widen(held[item].of[k]), r, widen(weight.of[k])));
    put<N>(row<T>(n, t) + i, held[item]);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    forward_any_kernel(Norm norm, Rows x, Rows residual, Rows w, Rows n, Rows sum) {
  __shared__ float shared[THREADS / WARP];
  const int64_t t = blockIdx.x;
  const T *from = row<T>(x, t), *more = row<T>(residual, t), *weight = static_cast<T*>(w.data);
  T* total = row<T>(sum, t);
  float sums[1] = {0};
  for (int i = threadIdx.x; i < norm.columns; i += THREADS) {
    T value = from[i];
    if (more) total[i] = value = narrow<T>(widen(value) + widen(more[i]));
    sums[0] += widen(value) * widen(value);
  }
  sum_along_x(sums, shared);
  const float r = inverse_rms(sums[0], norm.columns, norm.eps);
  if (more) from = total;  // a thread reads what it wrote itself
  for (int i = threadIdx.x; i < norm.columns; i += THREADS)
    row<T>(n, t)[i] = narrow<T>(rms_norm(widen(from[i]), r, widen(weight[i])));
}

template <class T, int ITEMS>
__global__ void __launch_bounds__(MOST_THREADS)
    backward_kernel(Norm norm, Rows dn, Rows x, Rows w, Rows residual, Rows dx, Partials dw) {
  constexpr int N = CHUNK<T>;
  __shared__ float shared[2 * MOST_THREADS / WARP];
  extern __shared__ float dw_rows[];  // one of `columns` for each row along y, if there are several
  const int rows = blockDim.y;
  float dw_sums[ITEMS][N] = {};
  for (int64_t t = int64_t{blockIdx.x} * rows + threadIdx.y; t < norm.rows; t += dw.count * rows) {
    const T *dn_row = row<T>(dn, t), *x_row = row<T>(x, t), *more_row = row<T>(residual, t);
    Chunk<T, N> dn_t[ITEMS], x_t[ITEMS];
    RmsNormSums<float> added = {0, 0};
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
      const int i = (item * blockDim.x + threadIdx.x) * N;
      if (i >= norm.columns) continue;
      dn_t[item] = get<N>(dn_row + i);
      x_t[item] = get<N>(x_row + i);
    }
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
      const int i = (item * blockDim.x + threadIdx.x) * N;
      if (i >= norm.columns) continue;
      const auto weight = get<N>(static_cast<T*>(w.data) + i);
#pragma unroll
      for (int k = 0; k < N; k++)
        added.add(widen(dn_t[item].of[k]), widen(x_t[item].of[k]), widen(weight.of[k]));
    }
    float sums[2] = {added.squares, added.products};
    sum_along_x(sums, shared);
    const float r = inverse_rms(sums[0], norm.columns, norm.eps);
    const float slope = rms_norm_slope(sums[1], norm.columns, r);
    T* dx_row = row<T>(dx, t);
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
      const int i = (item * blockDim.x + threadIdx.x) * N;
      if (i >= norm.columns) continue;
      const auto weight = get<N>(static_cast<T*>(w.data) + i);
      Chunk<T, N> more = {};
      if (more_row) more = get<N>(more_row + i);
#pragma unroll
      for (int k = 0; k < N; k++) {
        const float dn_k = widen(dn_t[item].of[k]), x_k = widen(x_t[item].of[k]);
        float dx_k = rms_norm_dx(dn_k, x_k, widen(weight.of[k]), r, slope);
        if (more_row) dx_k += widen(more.of[k]);
        dw_sums[item][k] += rms_norm_dw(dn_k, x_k, r);
        more.of[k] = narrow<T>(dx_k);
      }
      put<N>(dx_row + i, more);
    }
  }
  float* partial = static_cast<float*>(dw.data) + int64_t{blockIdx.x} * norm.columns;
  float* mine = rows > 1 ? dw_rows + threadIdx.y * norm.columns : partial;
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int i = (item * blockDim.x + threadIdx.x) * N;
    if (i >= norm.columns) continue;
#pragma unroll
    for (int k = 0; k < N; k++) mine[i + k] = dw_sums[item][k];
  }
  if (rows == 1) return;
  __syncthreads();
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < norm.columns; i += blockDim.x * rows) {
    float sum = 0;
    for (int y = 0; y < rows; y++) sum += dw_rows[y * norm.columns + i];
    partial[i] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    backward_any_kernel(Norm norm, Rows dn, Rows x, Rows w, Rows residual, Rows dx, Partials dw) {
  __shared__ float shared[2 * THREADS / WARP];
  const T* weight = static_cast<T*>(w.data);
  float* dw_row = static_cast<float*>(dw.data) + int64_t{blockIdx.x} * norm.columns;
  for (int i = threadIdx.x; i < norm.columns; i += THREADS) dw_row[i] = 0;
  for (int64_t t = blockIdx.x; t < norm.rows; t += dw.count) {
    const T *dn_t = row<T>(dn, t), *x_t = row<T>(x, t), *more = row<T>(residual, t);
    RmsNormSums<float> added = {0, 0};
    for (int i = threadIdx.x; i < norm.columns; i += THREADS)
      added.add(widen(dn_t[i]), widen(x_t[i]), widen(weight[i]));
    float sums[2] = {added.squares, added.products};
    sum_along_x(sums, shared);
    const float r = inverse_rms(sums[0], norm.columns, norm.eps);
    const float slope = rms_norm_slope(sums[1], norm.columns, r);
    for (int i = threadIdx.x; i < norm.columns; i += THREADS) {
      const float dn_i = widen(dn_t[i]), x_i = widen(x_t[i]);
      float dx_i = rms_norm_dx(dn_i, x_i, widen(weight[i]), r, slope);
      if (more) dx_i += widen(more[i]);
      dw_row[i] += rms_norm_dw(dn_i, x_i, r);  // a column is one thread's
      row<T>(dx, t)[i] = narrow<T>(dx_i);
    }
  }
}

// How a row of so many chunks is shared out; no items: it is too long.
struct Plan {
  int items;
  dim3 block;
};

Plan plan(int64_t chunks) {
  if (chunks <= WARP * MOST_ITEMS) {
    const int items = chunks <= WARP ? 1 : chunks <= 2 * WARP ? 2 : MOST_ITEMS;
    return {items, dim3(WARP, ROWS_OF_WARPS)};
  }
  const int threads = divided_up(divided_up(chunks, MOST_ITEMS), WARP) * WARP;
  return {threads <= MOST_THREADS ? MOST_ITEMS : 0, dim3(threads)};
}

// The plan, where all of these rows allow 16-byte accesses.
template <class T, class... Operands>
Plan plan_for(const Launch& launch, const Operands&... rows) {
  const bool wide = launch.columns % CHUNK<T> == 0 && (aligned<T>(rows) && ...);
  return wide ? plan(launch.columns / CHUNK<T>) : Plan{};
}

Norm norm_of(const Launch& launch, double eps) {
  return {launch.rows, counted(launch.columns), eps};
}

}  // namespace

void rms_norm_forward(Launch launch, Rows x, Rows residual, Rows w, double eps, Rows n, Rows sum) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    const Plan how = plan_for<T>(launch, x, residual, w, n, sum);
    auto* kernel = how.items == 1   ? forward_kernel<T, 1>
                   : how.items == 2 ? forward_kernel<T, 2>
                   : how.items      ? forward_kernel<T, MOST_ITEMS>
                                    : forward_any_kernel<T>;
    const dim3 block = how.items ? how.block : dim3(THREADS);
    kernel<<<divided_up(launch.rows, block.y), block, 0, stream(launch)>>>(
        norm_of(launch, eps), x, residual, w, n, sum);
    launched("rms_norm_forward");
  });
}

void rms_norm_backward(Launch launch, Rows dn, Rows x, Rows w, double eps, Rows residual, Rows dx,
                       Partials dw) {
  if (launch.columns == 0) return;
  if (launch.rows == 0) {
    cudaMemsetAsync(dw.data, 0, dw.count * launch.columns * sizeof(float), stream(launch));
    return launched("rms_norm_backward");
  }
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    const Plan how = plan_for<T>(launch, dn, x, w, residual, dx);
    auto* kernel = how.items == 1   ? backward_kernel<T, 1>
                   : how.items == 2 ? backward_kernel<T, 2>
                   : how.items      ? backward_kernel<T, MOST_ITEMS>
                                    : backward_any_kernel<T>;
    const dim3 block = how.items ? how.block : dim3(THREADS);
    const size_t shared = block.y > 1 ? block.y * launch.columns * sizeof(float) : 0;
    kernel<<<counted(dw.count), block, shared, stream(launch)>>>(norm_of(launch, eps), dn, x, w,
                                                                 residual, dx, dw);
    launched("rms_norm_backward");
  });
}

}  // namespace megallama::cuda
