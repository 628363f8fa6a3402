// Element types on CUDA, the fp32 they are computed in, and the functions that formulas use.
// number.h includes it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>

namespace megallama::cuda {

using Bf16 = __nv_bfloat16;
using Fp16 = __half;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(Fp16 x) { return __half2float(x); }

// Round to the nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow(float x) {
  return x;
}
template <>
__device__ __forceinline__ Bf16 narrow(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ Fp16 narrow(float x) {
  return __float2half_rn(x);
}

HD float exponential(float x) { return expf(x); }
HD float square_root(float x) { return sqrtf(x); }
HD float logarithm(float x) { return logf(x); }
HD float largest_finite(float) { return FLT_MAX; }

}  // namespace megallama::cuda
