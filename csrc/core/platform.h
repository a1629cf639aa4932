// Arithmetic that gives the same bits in every build: g++, clang, nvcc device code.
//
// The exactness contract (distance.h) needs every float64 product and sum rounded on its own. Three things could break that, and each is shut out
// here: contraction of a * b + c to one fma (built with -ffp-contract=off; device code uses the _rn intrinsics, which nvcc never contracts),
// value-changing optimisation (-ffast-math is refused below), and excess precision (x87; refused below).
#pragma once

#include <cfloat>

#if defined(__FAST_MATH__)
#error "patchcore: -ffast-math changes results; build without it"
#endif
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "patchcore: float and double must be evaluated in their own precision (x86: -msse2 -mfpmath=sse)"
#endif

#if defined(__CUDACC__)
#define PATCHCORE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PATCHCORE_HOST_DEVICE inline
#endif

namespace patchcore {

PATCHCORE_HOST_DEVICE double multiply(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

PATCHCORE_HOST_DEVICE double add(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

PATCHCORE_HOST_DEVICE double subtract(double a, double b) { return add(a, -b); }

}  // namespace patchcore
