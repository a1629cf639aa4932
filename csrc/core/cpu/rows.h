// Rows of any scalar type as float32, a block at a time: float32 rows are used in place, half-precision rows are widened into the caller's scratch.
#pragma once

#include "cpu/dispatch.h"
#include "types.h"

namespace patchcore {

struct FloatRows {
  const float* data;
  int64_t stride;
};

// Rows [begin, begin + count) of `rows`; scratch: [count * rows.dim] floats, unused for float32.
inline FloatRows float_rows(const Rows& rows, int64_t begin, int64_t count, float* scratch) {
  if (rows.type == ScalarType::kFloat32) return {static_cast<const float*>(rows.data) + begin * rows.stride, rows.stride};
  const auto widen = rows.type == ScalarType::kFloat16 ? level().float16_to_float : level().bfloat16_to_float;
  for (int64_t r = 0; r < count; ++r) {
    widen(static_cast<const uint16_t*>(rows.data) + (begin + r) * rows.stride, rows.dim, scratch + r * rows.dim);
  }
  return {scratch, rows.dim};
}

// Floats of scratch that float_rows needs for `count` rows.
inline int64_t float_scratch(const Rows& rows, int64_t count) { return rows.type == ScalarType::kFloat32 ? 0 : count * rows.dim; }

// True when all values are finite: x - x is 0 for finite x and NaN otherwise.
template <class T>
inline bool all_finite(const T* values, int64_t count) {
  T sums[8] = {};  // side by side, for speed
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int64_t l = 0; l < 8; ++l) sums[l] += values[i + l] - values[i + l];
  }
  for (; i < count; ++i) sums[0] += values[i] - values[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])) == 0;
}

}  // namespace patchcore
