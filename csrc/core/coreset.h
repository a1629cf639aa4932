// Greedy k-center coreset: Eq. (5) and Algorithm 1 of Roth et al. 2022 (arXiv:2106.08265); the greedy 2-approximation of Gonzalez 1985.
//
// State: min_squared_distances[i], the canonical squared distance (distance.h) of row i to its nearest centre so far; infinity before the first
// centre; kPicked once row i is a centre itself. A pick is the row with the largest value, the lowest index among equals; it is never picked again.
// Duplicates, all-equal rows and as many picks as rows therefore give a permutation.
//
// NaN: a non-finite value in any row or centre gives Status::kNonFinite.
#pragma once

#include "parallel.h"
#include "types.h"

namespace patchcore {

constexpr double kPicked = -1.0;

// Bytes of workspace for the two functions below.
int64_t coreset_workspace_bytes(const Rows& rows, const Parallel& parallel);

// min_squared_distances[i] = min(min_squared_distances[i], d2(row i, centre c)) over all centres. rows [N, D], centers [m, D], min_squared_distances
// [N].
Status update_min_distances_cpu(const Rows& rows, const Rows& centers, const Parallel& parallel, void* workspace, double* min_squared_distances);

// `count` greedy picks (0 <= count <= rows not yet picked): indices[p] is the row of pick p and squared_distances[p] its value when it was picked;
// the state is left as if update_min_distances_cpu had been called with every pick. indices, squared_distances: [count].
Status greedy_coreset_cpu(const Rows& rows, int64_t count, const Parallel& parallel, void* workspace, double* min_squared_distances, int64_t* indices,
                          double* squared_distances);

}  // namespace patchcore
