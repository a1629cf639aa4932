// Rows of features as int8 codes for the filters (filter.h): all coordinates, and two prefixes of an integer contraction (filter.h, section 8), each
// with the norm of the rest as one more coordinate. All sums are of integers or bounded in any order, so how warps share them out does not matter.
//
//   features --encode_rows--> codes of all coordinates
//                        `--> steps (14 bits, as two planes of 7) --contract--> products --encode_views--> codes of the prefixes
#pragma once

#include "common.cuh"
#include "kernels.h"

namespace patchcore::cuda {

constexpr int kSeedOutputs = kSeedPrefix;    // of the contraction, and the residual coordinate: 64 codes to find a near row by
constexpr int kPrefixOutputs = kLongPrefix;  // those behind them, and the residual coordinate: 192 codes to filter by
constexpr int kOutputs = kSeedOutputs + kPrefixOutputs;
constexpr int kSeedDepth = 64, kPrefixDepth = 192;
constexpr int kProductColumns = 256;                  // kOutputs padded
constexpr int kPlaneBits = 7;                         // value = 128 high + low, both int8
constexpr double kLargestPlaneValue = 127 * 128 - 1;  // so that high <= 127
constexpr int64_t kSampleRows = 2048;                 // that scales are chosen by

__host__ __device__ inline int64_t full_depth(int64_t dim) { return round_up(dim, 64); }
__host__ __device__ inline int64_t padded_rows(int64_t count) { return round_up(count > 0 ? count : 1, 128); }  // whole tiles, at least one

// How coordinates become codes. `per_unit`: S of filter.h, not below the codes per unit of distance.
struct ViewScale {
  double shift, scale, per_unit;
};

// Lives in device memory: chosen by kernels, read by kernels.
struct Scales {
  double step_scale;
  ViewScale full, seed, prefix;
};

// Codes of `count` rows, padded to whole tiles. Padding: zero codes that no limit lets survive.
struct CodeRows {
  int64_t depth = 0;
  int8_t* codes = nullptr;          // [padded, depth]
  int32_t* norms = nullptr;         // [padded]
  int32_t* starts = nullptr;        // [padded / 2][4], see tile_scan.cuh
  float* residuals = nullptr;       // [padded], in codes, S E_x included; NaN where the row is not finite
  float* tile_residuals = nullptr;  // [padded / 128], their maxima
};

inline CodeRows code_rows_at(int64_t count, int64_t depth, Pieces* pieces) {
  const int64_t padded = padded_rows(count);
  CodeRows rows;
  rows.depth = depth;
  rows.codes = pieces->take<int8_t>(padded * depth);
  rows.norms = pieces->take<int32_t>(padded);
  rows.starts = pieces->take<int32_t>(padded * 2);
  rows.residuals = pieces->take<float>(padded);
  rows.tile_residuals = pieces->take<float>(padded / 128);
  return rows;
}

// The rows from `begin`, a multiple of 128, on.
inline CodeRows rows_from(CodeRows rows, int64_t begin) {
  rows.codes += begin * rows.depth;
  rows.norms += begin;
  rows.starts += begin * 2;
  rows.residuals += begin;
  rows.tile_residuals += begin / 128;
  return rows;
}

// Where one row's results go.
__device__ __forceinline__ void store_row(const CodeRows& out, int64_t row, int32_t norm, float residual, bool padding) {
  const int32_t start = padding ? kInt8PaddingStart : int8_start(norm);
  out.norms[row] = norm;
  out.residuals[row] = residual;
  out.starts[row / 2 * 4 + row % 2] = out.starts[row / 2 * 4 + row % 2 + 2] = start;
  // Floats that are not negative are ordered like their bits; a NaN comes last.
  atomicMax(reinterpret_cast<unsigned int*>(out.tile_residuals) + row / 128, __float_as_uint(residual) & 0x7fffffffu);
}

// The integer steps of rows, on their way into the contraction.
struct StepRows {
  int8_t* planes = nullptr;     // [padded, 2, depth]: high, low
  double* norms = nullptr;      // [padded], squared, exact
  double* errors = nullptr;     // [padded], filter.h: e
  int32_t* products = nullptr;  // [padded, kProductColumns], times 2^14
};

inline StepRows step_rows_at(int64_t count, int64_t dim, Pieces* pieces) {
  const int64_t padded = padded_rows(count);
  StepRows rows;
  rows.planes = pieces->take<int8_t>(padded * 2 * full_depth(dim));
  rows.norms = pieces->take<double>(padded);
  rows.errors = pieces->take<double>(padded);
  rows.products = pieces->take<int32_t>(padded * kProductColumns);
  return rows;
}

// How rows are encoded: what a prepared bank keeps for the queries.
struct Encoding {
  const double* center;  // [dim]
  const Scales* scales;
  const int8_t* matrix = nullptr;  // [kProductColumns, 2, full_depth(dim)] planes; null: no prefixes
};

// Rows map[0 .. count) of `rows` (null: the first `count`) as codes. seed, prefix: depth 0 where there is no matrix; steps: room for `count` rows.
// flags: kNonFinite is set when a value is not finite.
cudaError_t encode_rows(const Rows& rows, const int32_t* map, int64_t count, const Encoding& encoding, const StepRows& steps, const CodeRows& full,
                        const CodeRows& seed, const CodeRows& prefix, int32_t* flags, cudaStream_t stream);

// The first part of it: `full`, and with a matrix steps.products.
cudaError_t encode_steps(const Rows& rows, const int32_t* map, int64_t count, const Encoding& encoding, const StepRows& steps, const CodeRows& full,
                         int32_t* flags, cudaStream_t stream);

// center[j] = the mean of a sample: good enough for rows that are used once.
cudaError_t mean_of_sample(const Rows& rows, double* center, cudaStream_t stream);

// Chooses all scales from a sample of the rows, which must be finite. sample: [kSampleRows]; steps, full: room for kSampleRows rows or all there are,
// used with a matrix only and then free again.
cudaError_t choose_scales(const Rows& rows, const Encoding& encoding, const StepRows& steps, const CodeRows& full, double* sample, Scales* scales,
                          int32_t* flags, cudaStream_t stream);

// matrix [kOutputs, dim] into planes [kProductColumns, 2, depth]. flags: kNoContraction unless both prefixes are contractions by Gershgorin
// (knn.h) and all entries fit the planes.
cudaError_t split_matrix(const int16_t* matrix, int64_t dim, int8_t* planes, int32_t* flags, cudaStream_t stream);

}  // namespace patchcore::cuda
