// What every kernel speaks: rows of features, the caller's threads, a status. Raw pointers; no torch, no exceptions, no allocation.
#pragma once

#include <cstdint>

namespace patchcore {

// float16 and bfloat16 are exact inputs: widening to float32 loses nothing, and every kernel computes on the widened values.
enum class ScalarType : int32_t { kFloat32, kFloat16, kBFloat16 };

// `count` rows of `dim` contiguous scalars; row r starts at element r * stride of `data`.
struct Rows {
  const void* data;
  ScalarType type;
  int64_t count;
  int64_t dim;
  int64_t stride;
};

// kNonFinite: a NaN or an infinity was met. Outputs are then unspecified and the caller must report the error (first_nonfinite_row names the row).
enum class Status : int32_t { kOk, kNonFinite };

// Limits. Row indices are int64 everywhere; the filters (filter.h) pack them into 32 bits, so kernels take at most 2^31 - 1 rows.
constexpr int64_t kMaxRows = INT32_MAX;

// A row's squared distance to its nearest centre once it is a centre itself (coreset.h).
constexpr double kPicked = -1.0;

// Rows that a kernel handles at a time: distances of one block stay in the first-level cache.
constexpr int64_t kBlockRows = 256;

}  // namespace patchcore
