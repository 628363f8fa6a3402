// AdamW on CUDA: a thread an access, all of them independent.
#include "../adamw.h"

#include "common.cuh"

namespace megallama::cuda {

namespace {

constexpr int THREADS = 256;

// Where an update reads and writes; `weight` is null where no rounded copy is wanted.
template <class T>
struct Elements {
  float *master, *exp_avg, *exp_avg_sq;
  const float* gradient;
  T* weight;
};

// A float whose operations are rounded one by one. The compiler fuses multiplications with additions,
// others where a thread has four elements than where it has one (seen in its PTX), and an element's
// bits would depend on where it lies.
struct Rounded {
  float value;

  __device__ __forceinline__ Rounded(float value) : value(value) {}

  friend __device__ __forceinline__ Rounded operator+(Rounded a, Rounded b) {
    return __fadd_rn(a.value, b.value);
  }
  friend __device__ __forceinline__ Rounded operator-(Rounded a, Rounded b) {
    return __fsub_rn(a.value, b.value);
  }
  friend __device__ __forceinline__ Rounded operator*(Rounded a, Rounded b) {
    return __fmul_rn(a.value, b.value);
  }
  friend __device__ __forceinline__ Rounded operator/(Rounded a, Rounded b) {
    return __fdiv_rn(a.value, b.value);
  }
};

__device__ __forceinline__ Rounded square_root(Rounded x) { return __fsqrt_rn(x.value); }

template <int N, class T>
__device__ __forceinline__ void update(const Elements<T>& at, int64_t i, float divisor,
                                       const AdamWFactors<float>& factors) {
  auto w = get<N>(at.master + i), m = get<N>(at.exp_avg + i), v = get<N>(at.exp_avg_sq + i);
  const auto g = get<N>(at.gradient + i);
  Chunk<T, N> rounded;
#pragma unroll
  for (int k = 0; k < N; k++) {
    Rounded w_k = w.of[k], m_k = m.of[k], v_k = v.of[k];
    adamw_update(w_k, m_k, v_k, Rounded(g.of[k]) / divisor, factors);
    w.of[k] = w_k.value, m.of[k] = m_k.value, v.of[k] = v_k.value;
    rounded.of[k] = narrow<T>(w.of[k]);
  }
  put<N>(at.master + i, w);
  put<N>(at.exp_avg + i, m);
  put<N>(at.exp_avg_sq + i, v);
  if (at.weight) put<N>(at.weight + i, rounded);
}

// The first threads take N elements each, those after them one each of what is left.
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    adamw_kernel(Elements<T> at, int64_t count, const float* divisor, AdamWFactors<float> factors) {
  const int64_t item = int64_t{blockIdx.x} * THREADS + threadIdx.x, chunks = count / N;
  const int64_t single = chunks * N + (item - chunks);
  if (item < chunks)
    update<N>(at, item * N, *divisor, factors);
  else if (single < count)
    update<1>(at, single, *divisor, factors);
}

}  // namespace

void adamw(Launch launch, Rows master, Rows gradient, Rows exp_avg, Rows exp_avg_sq, Rows weight,
           Rows divisor, AdamW update) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    constexpr int N = CHUNK<float>;
    const Elements<T> at = {static_cast<float*>(master.data), static_cast<float*>(exp_avg.data),
                            static_cast<float*>(exp_avg_sq.data),
                            static_cast<const float*>(gradient.data), static_cast<T*>(weight.data)};
    const bool wide = aligned<float>(master) && aligned<float>(gradient) &&
                      aligned<float>(exp_avg) && aligned<float>(exp_avg_sq) &&
                      reinterpret_cast<uintptr_t>(weight.data) % sizeof(Chunk<T, N>) == 0;
    const int64_t items = wide ? launch.columns / N + launch.columns % N : launch.columns;
    auto* kernel = wide ? adamw_kernel<T, N> : adamw_kernel<T, 1>;
    kernel<<<divided_up(items, THREADS), THREADS, 0, stream(launch)>>>(
        at, launch.columns, static_cast<const float*>(divisor.data), AdamWFactors<float>(update));
    launched("adamw");
  });
}

}  // namespace megallama::cuda
