// SwiGLU on CUDA: a thread an access, all of them independent.
#include "../swiglu.h"

#include "common.cuh"

namespace megallama::cuda {

namespace {

constexpr int THREADS = 128;

template <class T, int N>
__global__ void __launch_bounds__(THREADS) forward_kernel(Rows gate_up, Rows act, int columns) {
  const int i = (blockIdx.y * THREADS + threadIdx.x) * N;
  if (i >= columns) return;
  const T* from = row<T>(gate_up, blockIdx.x) + i;
  const auto gate = get<N>(from), up = get<N>(from + columns);
  Chunk<T, N> out;
#pragma unroll
  for (int k = 0; k < N; k++) out.of[k] = narrow<T>(swiglu(widen(gate.of[k]), widen(up.of[k])));
  put<N>(row<T>(act, blockIdx.x) + i, out);
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    backward_kernel(Rows dact, Rows gate_up, Rows dgate_up, Rows act, int columns) {
  const int i = (blockIdx.y * THREADS + threadIdx.x) * N;
  if (i >= columns) return;
  const T* from = row<T>(gate_up, blockIdx.x) + i;
  const auto gate = get<N>(from), up = get<N>(from + columns);
  const auto down = get<N>(row<T>(dact, blockIdx.x) + i);
  Chunk<T, N> dgate, dup, out;
#pragma unroll
  for (int k = 0; k < N; k++) {
    const auto g = swiglu_gradient(widen(down.of[k]), widen(gate.of[k]), widen(up.of[k]));
    dgate.of[k] = narrow<T>(g.dgate);
    dup.of[k] = narrow<T>(g.dup);
    out.of[k] = narrow<T>(g.act);
  }
  T* to = row<T>(dgate_up, blockIdx.x) + i;
  put<N>(to, dgate);
  put<N>(to + columns, dup);
  put<N>(row<T>(act, blockIdx.x) + i, out);
}

dim3 grid(const Launch& launch, int chunk) {
  return dim3(counted(launch.rows), divided_up(launch.columns, int64_t{THREADS} * chunk));
}

}  // namespace

void swiglu_forward(Launch launch, Rows gate_up, Rows act) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    constexpr int N = CHUNK<T>;
    const bool wide = launch.columns % N == 0 && aligned<T>(gate_up) && aligned<T>(act);
    auto* kernel = wide ? forward_kernel<T, N> : forward_kernel<T, 1>;
    kernel<<<grid(launch, wide ? N : 1), THREADS, 0, stream(launch)>>>(
        gate_up, act, counted(launch.columns));
    launched("swiglu_forward");
  });
}

void swiglu_backward(Launch launch, Rows dact, Rows gate_up, Rows dgate_up, Rows act) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    constexpr int N = CHUNK<T>;
    const bool wide = launch.columns % N == 0 && aligned<T>(dact) && aligned<T>(gate_up) &&
                      aligned<T>(dgate_up) && aligned<T>(act);
    auto* kernel = wide ? backward_kernel<T, N> : backward_kernel<T, 1>;
    kernel<<<grid(launch, wide ? N : 1), THREADS, 0, stream(launch)>>>(
        dact, gate_up, dgate_up, act, counted(launch.columns));
    launched("swiglu_backward");
  });
}

}  // namespace megallama::cuda
