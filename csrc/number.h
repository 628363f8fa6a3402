// What formulas are written with: `exponential`, and the macro that puts a function on both devices.
//
// The formulas of an op (rms_norm.h, …) are templates over R, the type they are computed in: float
// or double on CUDA, a vector register of either on the CPU. So both devices run the same text.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#include "cuda/scalar.cuh"
#else
#define HD inline __attribute__((always_inline))
#include "cpu/vector.h"
#endif
