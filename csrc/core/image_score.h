// The image-level anomaly score: Eq. (6) and Eq. (7) of Roth et al. 2022 (arXiv:2106.08265).
//
//   t  = the patch of the image with the largest distance to its nearest bank row m*; s* is that distance                                   (6)
//   N_b(m*) = the b bank rows nearest to m*: m* itself in slot 0 (by its index, so duplicates cannot take its place), then the others by (distance,
//   index) s  = (1 - exp(d(t, m*)) / sum over m in N_b(m*) of exp(d(t, m))) * s* (7)
//
// Choices are made on canonical squared distances (distance.h), ties to the lowest index; distances are their correctly rounded roots. The quotient
// is a softmax in float64: the largest distance is subtracted first, the exponentials are those of exp.h, and the sum runs in slot order. b larger
// than the bank is reduced to the bank's size; with b = 1 there is nothing to compare with and s = s*.
//
// NaN: a non-finite value met on the way gives Status::kNonFinite.
#pragma once

#include "parallel.h"
#include "types.h"

namespace patchcore {

// `prepared`: the bank as prepare_bank_cpu (knn.h) leaves it, with which N_b is searched for by codes; null: by all distances. Same scores.
int64_t image_scores_workspace_bytes(const Rows& queries, const Rows& bank, const void* prepared, int64_t num_neighbors, const Parallel& parallel);

// queries: the patches of all images, [batch * num_patches, D]; squared_distances and nearest: [batch, num_patches], each patch's nearest bank row as
// found by nearest_neighbors_cpu with k = 1; nearest must lie in [0, bank.count). scores: [batch].
Status image_scores_cpu(const double* squared_distances, const int64_t* nearest, const Rows& queries, const Rows& bank, const void* prepared,
                        int64_t batch, int64_t num_patches, int64_t num_neighbors, const Parallel& parallel, void* workspace, float* scores);

}  // namespace patchcore
