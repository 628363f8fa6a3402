// Cross-entropy on CUDA: a block a row. The fused kernel keeps the first ITEMS chunks a thread of
// its row in registers; the rest of a long row is read again, from the second cache.
#include "../cross_entropy.h"

#include "common.cuh"

namespace megallama::cuda {

namespace {

constexpr int THREADS = 512, ITEMS = 8;

// A row's logits: `width` of a shard, then padding up to `columns`.
struct Shard {
  int64_t first;
  int width, columns;
};

// A chunk in whole registers. The compiler, where it sees through to two-byte elements, keeps a
// register for each (70 bytes spilled on sm_90); what it cannot see through, it leaves packed.
template <class T, int N>
struct Packed {
  uint32_t words[(sizeof(T) * N + 3) / 4];

  __device__ __forceinline__ void hold(const Chunk<T, N>& chunk) {
    memcpy(words, &chunk, sizeof chunk);
  }

  __device__ __forceinline__ Chunk<T, N> chunk() const {
    Packed opaque = *this;
#pragma unroll
    for (uint32_t& word : opaque.words) asm volatile("" : "+r"(word));
    Chunk<T, N> chunk;
    memcpy(&chunk, opaque.words, sizeof chunk);
    return chunk;
  }
};

// Combines the LogSums of a block's threads, in the same order in each of them.
__device__ __forceinline__ LogSum<float> combined(LogSum<float> mine) {
  __shared__ LogSum<float> of_warp[THREADS / WARP];
#pragma unroll
  for (int lane = WARP / 2; lane; lane /= 2) {
    const float largest = __shfl_xor_sync(0xffffffffu, mine.largest, lane);
    mine.add({largest, __shfl_xor_sync(0xffffffffu, mine.sum, lane)});
  }
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = mine;
  __syncthreads();
  mine = of_warp[0];
  for (int warp = 1; warp < THREADS / WARP; warp++) mine.add(of_warp[warp]);
  return mine;
}

template <class T, int N>
__device__ __forceinline__ void add_chunk(LogSum<float>& all, const Chunk<T, N>& chunk) {
  auto here = LogSum<float>::none();
#pragma unroll
  for (int k = 0; k < N; k++) here.largest = fmaxf(here.largest, widen(chunk.of[k]));
#pragma unroll
  for (int k = 0; k < N; k++) here.sum += probability(widen(chunk.of[k]), here.largest);
  all.add(here);
}

// `target` is a column of the chunk, or not.
template <class T, int N>
__device__ __forceinline__ void put_gradient(T* to, Chunk<T, N> chunk, int64_t target, float lse) {
#pragma unroll
  for (int k = 0; k < N; k++) {
    const float p = probability(widen(chunk.of[k]), lse);
    chunk.of[k] = narrow<T>(k == target ? p - 1 : p);
  }
  put<N>(to, chunk);
}

// This thread's share of columns first … last, N at a time.
template <int N, class T>
__device__ __forceinline__ void add_columns(LogSum<float>& all, const T* x, int first, int last) {
  for (int i = first + threadIdx.x * N; i < last; i += THREADS * N)
    add_chunk(all, get<N>(x + i));
}

template <int N, class T>
__device__ __forceinline__ void put_gradients(T* x, int first, int last, int64_t target,
                                              float lse) {
  for (int i = first + threadIdx.x * N; i < last; i += THREADS * N)
    put_gradient(x + i, get<N>(x + i), target - i, lse);
}

template <class T>
__device__ __forceinline__ void put_zeros(T* x, int first, int last) {
  for (int i = first + threadIdx.x; i < last; i += THREADS) x[i] = narrow<T>(0);
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    statistics_kernel(Rows logits, const int64_t* labels, Shard shard, float* log_sums,
                      float* targets) {
  const int64_t t = blockIdx.x;
  const T* x = row<T>(logits, t);
  const int whole = shard.width / N * N;
  auto mine = LogSum<float>::none();
  add_columns<N>(mine, x, 0, whole);
  add_columns<1>(mine, x, whole, shard.width);
  mine = combined(mine);
  if (threadIdx.x) return;
  const int64_t target = column_of(labels[t], shard.first, shard.width);
  log_sums[t] = mine.value();
  targets[t] = target >= 0 ? widen(x[target]) : 0;
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    gradient_kernel(Rows logits, const int64_t* labels, Shard shard, const float* log_sums) {
  const int64_t t = blockIdx.x, label = labels[t];
  T* x = row<T>(logits, t);
  if (label == IGNORED) return put_zeros(x, 0, shard.columns);
  const int64_t target = column_of(label, shard.first, shard.width);
  const int whole = shard.width / N * N;
  put_gradients<N>(x, 0, whole, target, log_sums[t]);
  put_gradients<1>(x, whole, shard.width, target, log_sums[t]);
  put_zeros(x, shard.width, shard.columns);
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS, 2)
    fused_kernel(Rows logits, const int64_t* labels, Shard shard, float* losses) {
  const int64_t t = blockIdx.x, label = labels[t];
  T* x = row<T>(logits, t);
  if (label == IGNORED) {
    if (threadIdx.x == 0) losses[t] = 0;
    return put_zeros(x, 0, shard.columns);
  }
  const int64_t target = column_of(label, shard.first, shard.width);
  const float logit = target >= 0 ? widen(x[target]) : 0;
  const int whole = shard.width / N * N, rest = min(whole, ITEMS * THREADS * N);
  Packed<T, N> held[ITEMS];
  auto mine = LogSum<float>::none();
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int i = (item * THREADS + threadIdx.x) * N;
    if (i < whole) held[item].hold(get<N>(x + i));
  }
#pragma unroll
  for (int item = 0; item < ITEMS; item++)
    if ((item * THREADS + threadIdx.x) * N < whole) add_chunk(mine, held[item].chunk());
  add_columns<N>(mine, x, rest, whole);
  add_columns<1>(mine, x, whole, shard.width);
  const float lse = combined(mine).value();  // after a barrier: every thread has read `logit`
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int i = (item * THREADS + threadIdx.x) * N;
    if (i < whole) put_gradient(x + i, held[item].chunk(), target - i, lse);
  }
  put_gradients<N>(x, rest, whole, target, lse);
  put_gradients<1>(x, whole, shard.width, target, lse);
  put_zeros(x, shard.width, shard.columns);
  if (threadIdx.x == 0) losses[t] = lse - logit;
}

Shard shard_of(const Launch& launch, int64_t first, int64_t width) {
  return {first, counted(width), counted(launch.columns)};
}

const int64_t* data_of(const Rows& labels) { return static_cast<const int64_t*>(labels.data); }

}  // namespace

void cross_entropy_statistics(Launch launch, Rows logits, Rows labels, int64_t first,
                              int64_t width, Rows log_sums, Rows targets) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    auto* kernel = aligned<T>(logits) ? statistics_kernel<T, CHUNK<T>> : statistics_kernel<T, 1>;
    kernel<<<counted(launch.rows), THREADS, 0, stream(launch)>>>(
        logits, data_of(labels), shard_of(launch, first, width),
        static_cast<float*>(log_sums.data), static_cast<float*>(targets.data));
    launched("cross_entropy_statistics");
  });
}

void cross_entropy_gradient(Launch launch, Rows logits, Rows labels, Rows lse, int64_t first,
                            int64_t width) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    auto* kernel = aligned<T>(logits) ? gradient_kernel<T, CHUNK<T>> : gradient_kernel<T, 1>;
    kernel<<<counted(launch.rows), THREADS, 0, stream(launch)>>>(logits, data_of(labels),
                                                        shard_of(launch, first, width),
                                                        static_cast<const float*>(lse.data));
    launched("cross_entropy_gradient");
  });
}

void cross_entropy(Launch launch, Rows logits, Rows labels, int64_t width, Rows loss, Partials) {
  with_type(launch, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    auto* kernel = aligned<T>(logits) ? fused_kernel<T, CHUNK<T>> : fused_kernel<T, 1>;
    kernel<<<counted(launch.rows), THREADS, 0, stream(launch)>>>(logits, data_of(labels),
                                                        shard_of(launch, 0, width),
                                                        static_cast<float*>(loss.data));
    launched("cross_entropy");
  });
}

}  // namespace megallama::cuda
