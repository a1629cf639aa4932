// Exact k nearest neighbours by canonical squared distance (distance.h).
//
// For each query the k bank rows with the smallest (squared distance, index), in that order: ties go to the lowest index. 1 <= k <= bank.count.
// A query gets the same bits alone or in a batch. A NaN or an infinity in a query or in the bank gives Status::kNonFinite.
#pragma once

#include "parallel.h"
#include "types.h"

namespace patchcore {

int64_t nearest_neighbors_workspace_bytes(const Rows& queries, const Rows& bank, int64_t k, const Parallel& parallel);

// Every pair is evaluated. squared_distances, indices: [queries.count, k].
Status nearest_neighbors_cpu(const Rows& queries, const Rows& bank, int64_t k, const Parallel& parallel, void* workspace, double* squared_distances,
                             int64_t* indices);

// ---- The filtered search: the same neighbours, hardly any distances -------------------------------------------------------------------------------
//
// The bank is prepared once: int8 codes of a prefix of a rotation, of a longer prefix that it begins or of all coordinates, and of all coordinates in
// tiles (filter.h). A block of queries is then compared with tiles of 64 bank rows by integer dot products of the short prefix, in stages, which
// leaves a percent; the longer codes, row by row, leave a few per mille; then squared differences in float32, then canonical distances, the nearest
// by codes first. What is skipped is proven to be farther than the k-th best so far, which tightens chunk by chunk and starts, where queries are the
// patches of an image, from the neighbours of the patch above. Where a prefix cannot tell rows apart (unstructured data), all coordinates are scanned
// at once.

// The rotation: one prefix, or two, one the beginning of the other, as a contraction of x - center by an int16 matrix, A / 2^14 (filter.h, section
// 8).
struct BankRotation {
  const double* center;   // [dim], where most rows are: a median
  int64_t short_outputs;  // rows of the matrix that make the short prefix; 0: no prefix
  int64_t long_outputs;   // the rows behind them, which make it the long prefix; 0: all coordinates are looked up instead
  const int16_t* matrix;  // [short_outputs + long_outputs, dim]
  const int32_t* order;   // [bank.count], a permutation of the rows: 64 at a time make a tile, best of rows that lie together
};

// Whether the matrix is certainly a contraction: by Gershgorin no singular value exceeds 1 when no row of |A A^T| sums to more than 2^28.
bool is_contraction(const BankRotation& rotation, int64_t dim);

// A bank is worth preparing, and can be, when it has at least so many rows and dimensions and no more dimensions than kMaxFilterDim (filter.h).
constexpr int64_t kFewestPreparedRows = 64;
constexpr int64_t kFewestPreparedDims = 8;

int64_t prepared_bank_bytes(const Rows& bank, const BankRotation& rotation);
int64_t prepare_bank_workspace_bytes(const Rows& bank, const BankRotation& rotation, const Parallel& parallel);

// prepared: [prepared_bank_bytes], 64-byte aligned. The bank must be finite.
void prepare_bank_cpu(const Rows& bank, const BankRotation& rotation, const Parallel& parallel, void* workspace, void* prepared);

// Whether `prepared`, of that many bytes, can come from prepare_bank_cpu for such a bank. That it is of these very rows is the caller's word.
bool prepared_bank_fits(const Rows& bank, const void* prepared, int64_t bytes);

// How to run; the result does not depend on it.
struct SearchOptions {
  int64_t line = 0;    // queries i and i + line lie one above the other in an image; 0: to be guessed, -1: they do not
  int32_t prefix = 0;  // 1: always scan the prefix first, -1: never, 0: as planned, switched on evidence
};

// What a search did.
struct SearchStatistics {
  int64_t pairs = 0;        // compared by tiles
  int64_t survivors = 0;    // of that
  int64_t differences = 0;  // float32 differences
  int64_t canonical = 0;    // canonical distances
};

int64_t filtered_neighbors_workspace_bytes(const Rows& queries, const Rows& bank, const void* prepared, int64_t k, const Parallel& parallel);

// nearest_neighbors_cpu with the bank prepared. statistics may be null.
Status filtered_neighbors_cpu(const Rows& queries, const Rows& bank, const void* prepared, int64_t k, const SearchOptions& options,
                              const Parallel& parallel, void* workspace, double* squared_distances, int64_t* indices, SearchStatistics* statistics);

}  // namespace patchcore
