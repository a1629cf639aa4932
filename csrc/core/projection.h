// Random projection with the same bits everywhere.
//
//   y[i, j] = (float) sum_k (double)x[i, k] * matrix[j, k]     k ascending; every product and every sum rounded to float64 on its own; one rounding
//   to
//                                                              float32 at the end
//
// A BLAS product sums in an order that depends on the device, the library and the number of threads; picks made on such projections differ as well.
// Zero entries of the matrix may be left out: adding +-0 changes no sum (a sum that starts at +0 is never -0).
// A result beyond float32's range is Status::kNonFinite, like a NaN or an infinity in x.
#pragma once

#include "parallel.h"
#include "types.h"

namespace patchcore {

// The matrix by input column k: entries offsets[k] .. offsets[k + 1] add values[e] * x[k] to output outputs[e].
struct ProjectionMatrix {
  int64_t num_inputs;      // D
  int64_t num_outputs;     // d*
  const int64_t* offsets;  // [D + 1]
  const int32_t* outputs;  // [offsets[D]]
  const double* values;    // [offsets[D]]
};

// Bytes of workspace for random_projection_cpu.
int64_t random_projection_workspace_bytes(const Rows& rows, const ProjectionMatrix& matrix, const Parallel& parallel);

// projected: [rows.count, num_outputs], contiguous.
Status random_projection_cpu(const Rows& rows, const ProjectionMatrix& matrix, const Parallel& parallel, void* workspace, float* projected);

}  // namespace patchcore
