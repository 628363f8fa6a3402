// RoPE on CUDA: a block a token, whose angles its heads share through the first cache.
#include "../rope.h"

#include "common.cuh"

namespace megallama::cuda {

namespace {

constexpr int THREADS = 256;

template <class T>
__device__ __forceinline__ T* head_of(const Heads& heads, int64_t token, int64_t head) {
  return static_cast<T*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
}

template <int N>
__device__ __forceinline__ void table(const float* from, float (&to)[N]) {
  constexpr int PART = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += PART) {
    const auto part = get<PART>(from + i);
#pragma unroll
    for (int k = 0; k < PART; k++) to[i + k] = part.of[k];
  }
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    rope_kernel(Heads x, Rows cos, Rows sin, int heads, int half, float sign) {
  const int64_t token = blockIdx.x;
  const int chunks = half / N;
  for (int item = threadIdx.x; item < heads * chunks; item += THREADS) {
    const int head = item / chunks, e = item % chunks * N;
    T* pairs = head_of<T>(x, token, head) + e;
    auto first = get<N>(pairs), second = get<N>(pairs + half);
    float cosines[N], sines[N];
    table(row<float>(cos, token) + e, cosines);
    table(row<float>(sin, token) + e, sines);
#pragma unroll
    for (int k = 0; k < N; k++) {
      float a = widen(first.of[k]), b = widen(second.of[k]);
      rotate(a, b, cosines[k], sign * sines[k]);
      first.of[k] = narrow<T>(a);
      second.of[k] = narrow<T>(b);
    }
    put<N>(pairs, first);
    put<N>(pairs + half, second);
  }
}

template <class T>
bool aligned_heads(const Heads& heads) {
  return aligned<T>({heads.data, heads.token_stride}) && heads.head_stride % CHUNK<T> == 0;
}

}  // namespace

void rope(Launch launch, int64_t heads, Heads x, Rows cos, Rows sin, bool inverse) {
  if (heads == 0) return;
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    constexpr int N = CHUNK<T>;
    const bool wide = launch.columns % N == 0 && aligned_heads<T>(x) && aligned<float>(cos) &&
                      aligned<float>(sin);
    auto* kernel = wide ? rope_kernel<T, N> : rope_kernel<T, 1>;
    counted(heads * launch.columns);  // so a token's items, and both factors, are 32-bit numbers
    kernel<<<counted(launch.rows), THREADS, 0, stream(launch)>>>(
        x, cos, sin, static_cast<int>(heads), static_cast<int>(launch.columns),
        inverse ? -1.0f : 1.0f);
    launched("rope");
  });
}

}  // namespace megallama::cuda
