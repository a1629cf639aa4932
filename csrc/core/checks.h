// Input checks that read every value.
#pragma once

#include "parallel.h"
#include "types.h"

namespace patchcore {

// The first row that holds a NaN or an infinity, or -1.
int64_t first_nonfinite_row_cpu(const Rows& rows, const Parallel& parallel);

}  // namespace patchcore
