// What CUDA launchers share: 16-byte chunks of a row, sums over a block, the choice of a type.
//
// A kernel comes in two versions: N elements a memory access, where every row allows 16 bytes, and
// one element. Writing over an operand is allowed: a thread reads what it writes, before, itself.
#pragma once

#include <climits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../number.h"
#include "../ops.h"

namespace megallama::cuda {

constexpr int WARP = 32;

template <class T>
constexpr int CHUNK = 16 / sizeof(T);

template <class T, int N>
struct alignas(sizeof(T) * N) Chunk {
  T of[N];
};

template <int N, class T>
__device__ __forceinline__ Chunk<T, N> get(const T* from) {
  return *reinterpret_cast<const Chunk<T, N>*>(from);
}

template <int N, class T>
__device__ __forceinline__ void put(T* to, const Chunk<T, N>& chunk) {
  *reinterpret_cast<Chunk<T, N>*>(to) = chunk;
}

template <class T>
__device__ __forceinline__ T* row(const Rows& rows, int64_t index) {
  return static_cast<T*>(rows.data) + index * rows.stride;
}

// K sums over the threads of a block whose x is theirs, given back to each of them. Blocks have one
// warp along x, or one row along y. `shared` has K numbers a warp.
template <int K>
__device__ __forceinline__ void sum_along_x(float (&sums)[K], float* shared) {
#pragma unroll
  for (int lane = WARP / 2; lane; lane /= 2)
#pragma unroll
    for (int k = 0; k < K; k++) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], lane);
  if (blockDim.x == WARP) return;
  const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  __syncthreads();  // the last row's sums have been read
  if (threadIdx.x % WARP == 0)
    for (int k = 0; k < K; k++) shared[warp * K + k] = sums[k];
  __syncthreads();
  for (int k = 0; k < K; k++) sums[k] = 0;
  for (int other = 0; other < warps; other++)
    for (int k = 0; k < K; k++) sums[k] += shared[other * K + k];
}

// Whether 16-byte accesses reach every row.
template <class T>
bool aligned(const Rows& rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % CHUNK<T> == 0;
}

// A number that the hardware counts in 32 bits: blocks of a grid, or columns, of which a loop adds a
// block's width (8,192 at most) to the last. Throws where it would wrap.
inline int counted(int64_t number) {
  if (number > INT_MAX - 65536)
    throw std::length_error(std::to_string(number) + " rows or columns; CUDA kernels take " +
                            std::to_string(INT_MAX - 65536) + " at most");
  return static_cast<int>(number);
}

inline int divided_up(int64_t count, int64_t size) { return counted((count + size - 1) / size); }

inline cudaStream_t stream(const Launch& launch) {
  return reinterpret_cast<cudaStream_t>(launch.where);
}

// Throws what the last launch failed with.
inline void launched(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

// f(static_cast<T*>(nullptr)) for the launch's element type T, where there is anything to do.
template <class F>
void with_type(const Launch& launch, F f) {
  if (launch.rows == 0 || launch.columns == 0) return;
  switch (launch.type) {
    case FP32: return f(static_cast<float*>(nullptr));
    case BF16: return f(static_cast<Bf16*>(nullptr));
    case FP16: return f(static_cast<Fp16*>(nullptr));
  }
  throw std::invalid_argument("CUDA kernels take fp32, bf16 and fp16, not type " +
                              std::to_string(launch.type));
}

template <class P>
using Pointee = std::remove_pointer_t<P>;

}  // namespace megallama::cuda
