// The canonical squared distance: the one number on which every decision of this package is made.
//
//   d2(a, b) = sum_j ((double)a_j - (double)b_j)^2   in float64, in one fixed order:
//
//   16 lanes; lane l sums the terms j = l, l + 16, l + 32, ... in that order, each square and each sum rounded on its own (no fma);
//   then lane[l] += lane[l + 8] for l < 8, lane[l] += lane[l + 4] for l < 4, += lane[l + 2] for l < 2, += lane[l + 1]: lane[0] is the result.
//   A row whose length is not a multiple of 16 acts as if padded with zeros (adding +0 changes no lane, for lanes are never -0).
//
// Every level of the CPU code (cpu/level_*.cpp) and the CUDA code give these bits. This file is the definition; it is written to be read.
//
// Range: features are finite float32, so a difference is exact or rounded once and at most 2 * FLT_MAX < 2^129; its square is below 2^258 and at
// least 2^-298 when not zero: a sum of 2^31 of them neither overflows nor underflows in float64. A non-finite result therefore means a non-finite
// input.
//
// Ties, everywhere: equal canonical values are resolved to the lowest index.
#pragma once

#include <cstdint>

#include "platform.h"

namespace patchcore {

constexpr int kLanes = 16;

// a, b: [dim] of float or double.
template <class A, class B>
PATCHCORE_HOST_DEVICE double squared_distance(const A* a, const B* b, int64_t dim) {
  double lane[kLanes] = {};
  for (int64_t j = 0; j < dim; ++j) {
    const double difference = subtract(static_cast<double>(a[j]), static_cast<double>(b[j]));
    lane[j % kLanes] = add(lane[j % kLanes], multiply(difference, difference));
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] = add(lane[l], lane[l + width]);
  }
  return lane[0];
}

}  // namespace patchcore
