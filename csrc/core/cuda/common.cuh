// What every kernel file starts with: how kernels are launched, warps, features of any scalar type, and the canonical distance by half-warps.
//
// Rules of this folder: everything runs on the caller's stream; no allocation, no synchronisation, no default stream; memory comes from the caller,
// sizes from the *_workspace_bytes functions; offsets are int64; feature rows may start at any element. Kernels use dynamic shared memory only. The
// same sources run on the CPU, block after block, under csrc/tests/simt (PATCHCORE_SIMT): what they use of CUDA beyond that is in mma.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "distance.h"
#include "filter.h"
#include "types.h"

#ifndef PATCHCORE_LAUNCH
#define PATCHCORE_UNPACK(...) __VA_ARGS__
#define PATCHCORE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) PATCHCORE_UNPACK kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define PATCHCORE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

namespace patchcore::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int32_t kNoRow = INT32_MAX;  // behind every row in the order of ties

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }

// Sums over a warp; every lane gets the total.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int width = kWarp / 2; width > 0; width /= 2) value += __shfl_xor_sync(kAllLanes, value, width);
  return value;
}

__device__ __forceinline__ double warp_max(double value) {
  for (int width = kWarp / 2; width > 0; width /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, value, width);
    value = other > value ? other : value;
  }
  return value;
}

// The order of neighbours: nearer first, the lower row among equals.
__device__ __forceinline__ bool nearer(double distance_a, int32_t row_a, double distance_b, int32_t row_b) {
  return distance_a < distance_b || (distance_a == distance_b && row_a < row_b);
}

// The order of picks: farther first, the lower row among equals.
__device__ __forceinline__ bool picked_before(double value_a, int32_t row_a, double value_b, int32_t row_b) {
  return value_a > value_b || (value_a == value_b && row_a < row_b);
}

__device__ __forceinline__ double not_a_number() { return __longlong_as_double(0x7ff8000000000000ll); }

// ---- Features -------------------------------------------------------------------------------------------------------------------------------------

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
// Exact: a subnormal half is its mantissa times 2^-24; else the exponent is moved from bias 15 to bias 127.
__device__ __forceinline__ float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint(static_cast<float>(mantissa) * 0x1p-24f));
  return __uint_as_float(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13);
}

// Calls use(pointer to the first scalar of the row) with the rows' own type.
template <class F>
__device__ __forceinline__ void with_row(const Rows& rows, int64_t row, F&& use) {
  const int64_t at = row * rows.stride;
  if (rows.type == ScalarType::kFloat32)
    use(static_cast<const float*>(rows.data) + at);
  else if (rows.type == ScalarType::kFloat16)
    use(static_cast<const Float16*>(rows.data) + at);
  else
    use(static_cast<const BFloat16*>(rows.data) + at);
}

// The canonical squared distance (distance.h) by 16 lanes: lane l of either half of a warp sums the terms j = l, l + 16, ...; then the tree. All 16
// lanes get the value: in a step lane l adds the sum of lane l ^ width to its own, and x + y has the bits of y + x. All 32 lanes must call, each half
// with rows of its own.
template <class A, class B>
__device__ __forceinline__ double half_warp_distance(const A* a, const B* b, int64_t dim) {
  double sum = 0;
#pragma unroll 8  // the loads need not wait for the sum
  for (int64_t j = lane_of_thread() % kLanes; j < dim; j += kLanes) {
    const double difference = subtract(static_cast<double>(widen(a[j])), static_cast<double>(widen(b[j])));
    sum = add(sum, multiply(difference, difference));
  }
  for (int width = kLanes / 2; width > 0; width /= 2) sum = add(sum, __shfl_xor_sync(kAllLanes, sum, width, kLanes));
  return sum;
}

// Not inlined: the nine combinations of types stay out of the kernels' registers.
inline __device__ __noinline__ double half_warp_distance(const Rows& a, int64_t row_a, const Rows& b, int64_t row_b) {
  double distance = 0;
  with_row(a, row_a, [&](const auto* x) { with_row(b, row_b, [&](const auto* y) { distance = half_warp_distance(x, y, a.dim); }); });
  return distance;
}

// ---- Host side ------------------------------------------------------------------------------------------------------------------------------------

__host__ __device__ inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t blocks_of(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

// More than 48 KiB of shared memory must be asked for.
template <class Kernel>
cudaError_t allow_shared(Kernel* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Cuts a block of memory into aligned arrays; with null memory only the sizes count.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* at = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return at;
  }
  int64_t used() const { return used_; }
  static constexpr int64_t kAlignment = 256;

 private:
  char* memory_;
  int64_t used_ = 0;
};

// The first error of a sequence of steps: later ones are not attempted.
#define PATCHCORE_CUDA_TRY(step)                              \
  do {                                                        \
    const cudaError_t status_of_step = (step);                \
    if (status_of_step != cudaSuccess) return status_of_step; \
  } while (false)

}  // namespace patchcore::cuda
