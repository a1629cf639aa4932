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

// Bytes of workspace for the two functions below.
int64_t coreset_workspace_bytes(const Rows& rows, const Parallel& parallel);

// min_squared_distances[i] = min(min_squared_distances[i], d2(row i, centre c)) over all centres. rows [N, D], centers [m, D], min_squared_distances
// [N].
Status update_min_distances_cpu(const Rows& rows, const Rows& centers, const Parallel& parallel, void* workspace, double* min_squared_distances);

// `count` greedy picks (0 <= count <= rows not yet picked): indices[p] is the row of pick p and squared_distances[p] its value when it was picked;
// the state is left as if update_min_distances_cpu had been called with every pick. indices, squared_distances: [count].
Status greedy_coreset_cpu(const Rows& rows, int64_t count, const Parallel& parallel, void* workspace, double* min_squared_distances, int64_t* indices,
                          double* squared_distances);

// ---- The batched algorithm: the same picks, many of them a pass -----------------------------------------------------------------------------------
//
// Greedy selection looks sequential: each pick needs the distances to the pick before. But distances only fall. Order the rows by (value descending,
// index ascending), take the first B as candidates, and run the greedy loop among them alone: as long as the best candidate comes before the best row
// OUTSIDE, as that one stood at the beginning, it is the pick of the whole set, since rows outside have only fallen since. Then one pass lowers all
// rows by all accepted picks. The result is the sequential one, whatever B; a tie that would fall outside is excluded by the total order.
//
// In a pass and among the candidates, pairs are discarded by integer dot products of int8 codes (filter.h): first of a short prefix of a rotation,
// then of all coordinates; what is left, about one pair in 1,600 on real features, is evaluated canonically. Where codes cannot discard
// (unstructured data), the prefix is dropped; where candidates stay few (tight clusters), B grows.

// Rows left behind. A row whose value is below that of every pick to come is never picked, and nobody asks what the picks would still do to it. So a
// run may leave out of its passes the rows below a threshold, a little under the largest value: their values stay where they are, bounds from above
// that lie below the threshold, while those of the others are exact. As long as the largest of these is not below the threshold, it is the largest of
// all, and its ties are among them. When it falls below, a lower threshold is chosen, and the rows with values above it catch up: they are lowered by
// the picks that they have missed. Of the pairs of rows and picks about half are never compared (real features, 1% to 25%).

// What is kept of the rows left behind from one call to the next.
struct CoresetBehind {
  const int64_t* picks;  // [count], those of earlier calls with the same `lowered`, in order
  int64_t count;
  int32_t* lowered;  // [N]: by how many of the picks a row has been lowered that was left behind; kUpToDate where that is all of them
};
constexpr int32_t kUpToDate = -1;

// The prefix of a rotation that comes first in the filter, as a contraction of x - center (filter.h, section 7). outputs = 0: no prefix.
struct CoresetRotation {
  const double* center;  // [dim], where most rows are: a median
  int64_t outputs;
  int64_t columns;       // outputs rounded up to a multiple of 8
  const double* matrix;  // [dim, columns], columns beyond `outputs` zero; largest singular value at most 1
};

// Bytes of the int8 copy of `rows`, and of workspace to make it. rows.dim <= kMaxFilterDim (filter.h).
int64_t coreset_codes_bytes(const Rows& rows, const CoresetRotation& rotation);
int64_t coreset_codes_workspace_bytes(const Rows& rows, const CoresetRotation& rotation, const Parallel& parallel);

// Makes the int8 copy: codes [coreset_codes_bytes], 64-byte aligned. The rows must be finite.
void pack_coreset_codes_cpu(const Rows& rows, const CoresetRotation& rotation, const Parallel& parallel, void* workspace, void* codes);

// Whether `codes`, of that many bytes, can be the codes of such rows: sizes fit, and norms and residuals are such as the filter relies on. That they
// are of these very rows is the caller's word.
bool coreset_codes_fit(const Rows& rows, const void* codes, int64_t bytes);

// How to run; the result does not depend on it. 0: decided by the algorithm.
struct CoresetOptions {
  int64_t batch = 0;   // candidates a pass
  int32_t prefix = 0;  // 1: always filter by the prefix, -1: never
  int32_t single = 0;  // 1: one pick a pass
};

// What a run did, for benchmarks and for the choice of a plan.
struct CoresetStatistics {
  int64_t passes = 0;
  int64_t pairs = 0;      // pairs compared by codes in the passes
  int64_t survivors = 0;  // of the first comparison
  int64_t canonical = 0;  // evaluated canonically
};

int64_t batched_coreset_workspace_bytes(const Rows& rows, const void* codes, const Parallel& parallel);

// Makes rows picks[0 .. count) centres, as if they had been picked: all rows are lowered by them, and they are marked kPicked. The workspace of
// batched_coreset_workspace_bytes.
void batched_add_picks_cpu(const Rows& rows, const void* codes, const int64_t* picks, int64_t count, const Parallel& parallel, void* workspace,
                           double* min_squared_distances, CoresetStatistics* statistics);

// greedy_coreset_cpu by the batched algorithm, with the codes of the same rows. With `behind`, rows may be left behind: then min_squared_distances is
// exact for the rows that are not, and they have the largest values. statistics may be null.
void batched_greedy_coreset_cpu(const Rows& rows, const void* codes, int64_t count, const CoresetOptions& options, const Parallel& parallel,
                                void* workspace, double* min_squared_distances, const CoresetBehind* behind, int64_t* indices,
                                double* squared_distances, CoresetStatistics* statistics);

}  // namespace patchcore
