// The CUDA kernels, as functions on the caller's stream: the contracts of projection.h, coreset.h, knn.h and image_score.h, with the same bits.
//
// All pointers are device memory, workspaces and opaque blocks aligned to 16 bytes. Nothing is allocated, nothing waits; errors of a launch are
// returned. What only the device knows when the function returns is told by `flags`, one int32 in device memory that the caller zeroes beforehand:
// kNonFinite where a value is not finite (outputs are then unspecified, but where said otherwise), kNoContraction where a matrix is not what it must
// be, kOutside where an index is none of the bank's.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace patchcore::cuda {

enum Flag : int32_t { kNonFinite = 1, kNoContraction = 2, kOutside = 4 };

// ---- Checks, roots, projections -------------------------------------------------------------------------------------------------------------------

// *row = the first row that holds a NaN or an infinity, or -1. row: int64 in device memory.
cudaError_t first_nonfinite_row_cuda(const Rows& rows, int64_t* row, cudaStream_t stream);

// roots[i] = sqrt(values[i]), i < count, correctly rounded.
cudaError_t square_root_cuda(const double* values, int64_t count, double* roots, cudaStream_t stream);

// projected [rows.count, num_outputs]: projection.h, with the dense matrix [num_outputs, rows.dim]; its zeros cost nothing.
int64_t random_projection_workspace_bytes(int64_t dim, int64_t num_outputs);
cudaError_t random_projection_cuda(const Rows& rows, const double* matrix, int64_t num_outputs, void* workspace, float* projected, int32_t* flags,
                                   cudaStream_t stream);

// ---- Coreset (coreset.h) --------------------------------------------------------------------------------------------------------------------------

// min_squared_distances[i] = min(itself, d2(row i, centre c)) over all centres.
int64_t update_min_distances_workspace_bytes(const Rows& rows, const Rows& centers);
cudaError_t update_min_distances_cuda(const Rows& rows, const Rows& centers, void* workspace, double* min_squared_distances, int32_t* flags,
                                      cudaStream_t stream);

// The int8 copy of the rows: codes [coreset_codes_bytes]. center [dim]; null: the mean of a sample. 1 <= rows.dim <= kMaxFilterDim (filter.h).
int64_t coreset_codes_bytes(int64_t count, int64_t dim);
int64_t coreset_codes_workspace_bytes(int64_t dim);
cudaError_t coreset_codes_cuda(const Rows& rows, const double* center, void* workspace, void* codes, int32_t* flags, cudaStream_t stream);

// Makes rows picks[0 .. count) centres: all rows are lowered by them, and they are marked kPicked. The picks must be rows.
int64_t coreset_workspace_bytes(const Rows& rows);
cudaError_t add_picks_cuda(const Rows& rows, const void* codes, const int64_t* picks, int64_t count, void* workspace, double* min_squared_distances,
                           cudaStream_t stream);

// Looks at a run's state: report[0] = rows that are not picked, report[1] = the first row whose value is neither a squared distance nor kPicked, or
// -1. Turns -0 into 0, which is ordered like its bits. report: two int64 in device memory.
cudaError_t check_state_cuda(double* min_squared_distances, int64_t count, int64_t* report, cudaStream_t stream);

// Greedy picks in passes that nobody waits for: start, then passes as often as it takes, then read `progress` (two int64 in device memory): the picks
// made so far, and 1 when all `count` are. indices, squared_distances: [count]. Passes after the last pick do nothing.
// batch: candidates a pass, 0: decided by the algorithm.
cudaError_t start_coreset_cuda(const Rows& rows, int64_t count, int64_t batch, void* workspace, int64_t* progress, cudaStream_t stream);
cudaError_t coreset_passes_cuda(const Rows& rows, const void* codes, int64_t passes, void* workspace, double* min_squared_distances, int64_t* indices,
                                double* squared_distances, int64_t* progress, cudaStream_t stream);

// Pick by pick, every distance: for rows too long for codes. picked: one int32 of scratch.
cudaError_t greedy_by_all_cuda(const Rows& rows, int64_t count, int32_t* picked, double* min_squared_distances, int64_t* indices,
                               double* squared_distances, int32_t* flags, cudaStream_t stream);

// ---- Nearest neighbours (knn.h) and the image score (image_score.h) -------------------------------------------------------------------------------

// Prefixes of the rotation have fixed lengths on the device.
constexpr int64_t kSeedPrefix = 63, kLongPrefix = 191;

// The bank prepared: int8 codes of all coordinates, and where `with_prefixes`, of two prefixes. center [dim]; matrix [63 + 191, dim]; order [count],
// a permutation (knn.h, BankRotation). 1 <= bank.dim <= kMaxFilterDim.
int64_t prepared_bank_bytes(int64_t count, int64_t dim, bool with_prefixes);
int64_t prepare_bank_workspace_bytes(int64_t count, int64_t dim, bool with_prefixes);
cudaError_t prepare_bank_cuda(const Rows& bank, const double* center, const int16_t* matrix, const int32_t* order, bool with_prefixes,
                              void* workspace, void* prepared, int32_t* flags, cudaStream_t stream);

// What a search did, in device memory; may be null. For tests and benchmarks.
struct SearchCounters {
  unsigned long long canonical;  // canonical distances beside those of the seeds
};

// squared_distances, indices: [queries.count, k]. prepared: what prepare_bank_cuda gave; null: made for this call, without prefixes. A query that is
// not finite gets NaN and index 0. prefix: 1 always filter by it, -1 never, 0 on evidence.
int64_t nearest_neighbors_workspace_bytes(const Rows& queries, const Rows& bank, bool is_prepared, bool with_prefixes, int64_t k);
cudaError_t nearest_neighbors_cuda(const Rows& queries, const Rows& bank, const void* prepared, bool with_prefixes, int64_t k, int prefix,
                                   void* workspace, double* squared_distances, int64_t* indices, SearchCounters* counters, int32_t* flags,
                                   cudaStream_t stream);

// scores [batch]; arguments as in image_score.h. An image with a value that is not finite, or an index outside the bank, gets NaN.
int64_t image_scores_workspace_bytes(const Rows& bank, bool is_prepared, bool with_prefixes, int64_t batch, int64_t num_neighbors);
cudaError_t image_scores_cuda(const double* squared_distances, const int64_t* nearest, const Rows& queries, const Rows& bank, const void* prepared,
                              bool with_prefixes, int64_t batch, int64_t num_patches, int64_t num_neighbors, void* workspace, float* scores,
                              int32_t* flags, cudaStream_t stream);

}  // namespace patchcore::cuda
