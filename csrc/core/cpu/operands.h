// A few rows gathered for a comparison with many: their codes as tiles for the scan, row by row for single dot products, and their features for the
// canonical distance.
#pragma once

#include "cpu/codes.h"
#include "cpu/dispatch.h"
#include "types.h"

namespace patchcore {

struct Operands {
  int64_t count;           // gathered rows
  int8_t* tiles;           // [ceil(count / 64)] tiles of the first codes
  int32_t* start;          // [count, padded]: what an accumulator starts at
  float* residuals;        // [count, padded], of the first codes
  double* tile_residuals;  // [tiles]: the largest residual of each tile
  int8_t* codes;           // [count, 4 * words] second codes, or the first where there are no second
  int32_t* squared_norms;  // [count], of `codes`
  int32_t* biases;         // [count], (most + 1) * sum of `codes`: what a dot product with offset codes is too large by
  float* code_residuals;   // [count], of `codes`
  float* rows;             // [count, dim], widened
};

inline int64_t num_tiles(int64_t count) { return (count + kTileOperands - 1) / kTileOperands; }

// Bytes for up to `capacity` operands, and where they lie in `memory` (64-byte aligned).
int64_t operands_bytes(int64_t capacity, int64_t dim, const Codes& first, const Codes& second);
Operands operands_at(int64_t capacity, int64_t dim, const Codes& first, const Codes& second, void* memory);

// Whether accumulators include the operands' own norms: in a pass the scanned row brings its floor and the operand its norm; among candidates it is
// the other way.
enum class StartWith { kNothing, kNorm };

// Gathers rows[which[i]], i < count. first.words and second.words are the codes of all rows; pass `first` twice where there are no second codes.
void gather_operands(const Rows& rows, const Codes& first, const Codes& second, const int64_t* which, int64_t count, StartWith start,
                     const Parallel& parallel, Operands* out);

}  // namespace patchcore
