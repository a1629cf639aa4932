// What codes.cu and scales.cu share: blocks of a warp a row, the largest step, and one row in a view (a prefix of the contraction, and the norm of
// the rest), for its codes and for the scales that they are made by.
#pragma once

#include "codes.cuh"

namespace patchcore::cuda {

constexpr int kCodeWarps = 8;
constexpr int kCodeThreads = kCodeWarps * kWarp;

__device__ __forceinline__ double largest_plane_step(int64_t dim) {
  const double most = largest_step(dim);
  return most < kLargestPlaneValue ? most : kLargestPlaneValue;
}

// Coordinates of one row in a view, held by a warp: lane l has outputs l, l + 32, ..., all lanes the residual coordinate.
template <int kCount>
struct ViewRow {
  static constexpr int kEach = (kCount + kWarp - 1) / kWarp;
  double values[kEach];
  double residual, squared_norm;

  __device__ ViewRow(const int32_t* products, double step_norm) {
    double squares = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int k = i * kWarp + lane_of_thread();
      values[i] = k < kCount ? multiply(products[k], 0x1p-14) : 0.0;
      squares = add(squares, multiply(values[i], values[i]));
    }
    squared_norm = warp_sum(squares);
    residual = residual_coordinate(step_norm, squared_norm);
  }

  __device__ double largest(double shift) const {
    double most = fabs(subtract(residual, shift));
#pragma unroll
    for (int i = 0; i < kEach; ++i) most = fabs(values[i]) > most ? fabs(values[i]) : most;
    return warp_max(most);
  }

  // Codes [kCount + 1] of the row; the result is valid in all lanes. As cpu/encoder.cpp, where the error is derived.
  __device__ float encode(const ViewScale& view, double step_error, int64_t dim, int8_t* codes, int32_t* norm) const {
    int32_t norm_part = 0;
    double error_part = 0;
    const auto take = [&](int k, double value) {
      const Int8Code code = int8_code(multiply(view.scale, value));
      codes[k] = code.code;
      norm_part += code.code * code.code;
      error_part = add(error_part, multiply(code.error, code.error));
    };
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int k = i * kWarp + lane_of_thread();
      if (k < kCount) take(k, values[i]);
    }
    if (lane_of_thread() == kCount % kWarp) take(kCount, subtract(residual, view.shift));
    *norm = warp_sum(norm_part);
    const double error_squares = warp_sum(error_part);
    const double z_norm = inflate(rounded_root(squared_norm), kCount + 4);
    const double shifted = inflate(multiply(add(residual, fabs(view.shift)), 0x1p-53), 4);
    const double error = inflate(add(add(step_error, residual_coordinate_error(residual, z_norm, 0, dim)), shifted), 4);
    return round_up_to_float(inflate(add(residual_bound(error_squares, *norm, kCount + 1), multiply(view.scale, error)), 2));
  }
};

}  // namespace patchcore::cuda
