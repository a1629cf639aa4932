// Exact k nearest neighbours by canonical squared distance (distance.h).
//
// For each query the k bank rows with the smallest (squared distance, index), in that order: ties go to the lowest index. 1 <= k <= bank.count.
// A query gets the same bits alone or in a batch. A NaN or an infinity in a query or in the bank gives Status::kNonFinite.
#pragma once

#include "parallel.h"
#include "types.h"

namespace patchcore {

int64_t nearest_neighbors_workspace_bytes(const Rows& queries, const Rows& bank, int64_t k, const Parallel& parallel);

// squared_distances, indices: [queries.count, k].
Status nearest_neighbors_cpu(const Rows& queries, const Rows& bank, int64_t k, const Parallel& parallel, void* workspace, double* squared_distances,
                             int64_t* indices);

}  // namespace patchcore
