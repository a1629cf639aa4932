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
inline bool all_finite(const double* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i] - values[i];
  return sum == 0;
}

}  // namespace patchcore
