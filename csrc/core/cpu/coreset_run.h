// What the steps of the batched coreset share: the state of a run, and the pass over all rows.
#pragma once

#include "coreset.h"
#include "cpu/candidate.h"
#include "cpu/codes.h"
#include "cpu/operands.h"
#include "filter.h"

namespace patchcore {

constexpr int64_t kLargestBatch = 4096;
constexpr int64_t kFewPicks = 4;  // a pass over so few is done by single dot products

// Everything that the steps of a run share.
struct CoresetRun {
  const Rows& rows;
  const Parallel& parallel;
  double* state;          // min_squared_distances
  double* reach;          // [N], of `first` (filter.h, section 4); follows `state`
  Candidate* candidates;  // [N]
  int32_t* active;        // [N], the rows that passes lower: those not left behind (coreset.h); picks may be among them
  int64_t num_active;
  Codes prefix, full;
  Codes first, second;  // the filter in use: prefix then full, or full twice
  double slack;
  char* slots;  // slot_bytes each
  int64_t slot_bytes;
  CoresetStatistics statistics;
};

// Bytes of a slot's scratch memory for the pass.
int64_t slot_memory_bytes(const Rows& rows);

inline double reach_of(const CoresetRun& run, const Codes& codes, int64_t row) {
  return update_reach(run.state[row], 0, codes.residuals[row], codes.scale, run.slack);
}

// Chooses the filter, and brings `reach` up to date when it is another one than before.
void use_filter(CoresetRun* run, const Codes& first);

// Uses the prefix, or drops it when it leaves so much that scanning all coordinates is cheaper. `which` are the operands to come; `operands` is
// scratch memory.
void choose_filter(CoresetRun* run, const CoresetOptions& options, const int64_t* which, int64_t count, Operands* operands);

// Lowers rows which[0 .. count) by the operands.
void update_rows(CoresetRun* run, const Operands& operands, const int32_t* which, int64_t count);

// Candidates for the next picks.
struct Selection {
  int64_t count;       // candidates, ascending by index at the front of run->candidates
  Candidate excluded;  // the best row that is not among them
};

// The first `batch` of the active rows in the order of picks.
Selection select_candidates(CoresetRun* run, int64_t batch);

// Memory of the candidates beside their operands.
struct Chain {
  Operands operands;
  double* values;   // [padded], kPicked where there is none
  int32_t* floors;  // [padded]
  int64_t* rows;    // [count]
};

// Sequential greedy among the candidates while the best of them comes before `excluded` and is not below the threshold of the rows left behind; at
// most `count` picks. Returns their number and leaves state and reach of the candidates as the picks leave them.
int64_t run_chain(CoresetRun* run, const Selection& selection, double threshold, int64_t count, Chain* chain, int64_t* indices,
                  double* squared_distances);

}  // namespace patchcore
