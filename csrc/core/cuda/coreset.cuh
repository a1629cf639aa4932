// What the parts of the coreset share: the run as the device knows it, rows as sides of the filter, and the steps of a pass that other files launch.
#pragma once

#include "chain.cuh"
#include "filter.cuh"
#include "kernels.h"

namespace patchcore::cuda {

constexpr int kMostCandidates = 4096, kFewestCandidates = 256;
constexpr int64_t kMostEdges = int64_t{1} << 19;  // 256 candidates have fewer than 2^15; a pass with more takes one pick and the next is smaller
constexpr int kDigitBits = 12, kDigits = 1 << kDigitBits;  // what the threshold of the candidates is found by (candidates.cu)
constexpr int kMostSelectBlocks = 256;

// The order of picks as a number: a larger key is picked before. The bits of a value that is not negative are ordered like the value; of equal ones
// the lower row comes first.
struct PickKey {
  unsigned long long value;
  uint32_t row;  // its complement
};

struct Progress {
  int64_t picked;  // of the run's count
  int64_t done;
};

struct Run {
  int64_t count;        // picks wanted
  int32_t fixed_batch;  // 0: as many candidates as paid off
  int32_t batch;
  // the threshold: candidates are the rows whose first `digits` digits are above it
  PickKey threshold;
  int32_t digits;
  int32_t candidates_above;  // the threshold
  int32_t found;             // the threshold is where it should be
  int32_t num_candidates;
  double excluded;  // the best of the others
  int32_t excluded_row;
  int32_t num_edges;
  int32_t num_picks;        // of this pass
  uint32_t blocks_counted;  // of the kernel that runs
};

struct CoresetMemory {
  Run* run;
  int32_t* histogram;      // [kDigits]
  double* block_excluded;  // [kMostSelectBlocks]
  int32_t* block_rows;     // [kMostSelectBlocks]
  int32_t* candidates;     // [kMostCandidates] rows
  double* keys;            // [kMostCandidates]
  int32_t* picks;          // [kMostCandidates] rows
  Edge* edges;             // [kMostEdges]
  CodeRows gathered;       // of the candidates, then of the picks
};

inline CoresetMemory coreset_memory(int64_t dim, Pieces* pieces) {
  CoresetMemory memory;
  memory.run = pieces->take<Run>(1);
  memory.histogram = pieces->take<int32_t>(kDigits);
  memory.block_excluded = pieces->take<double>(kMostSelectBlocks);
  memory.block_rows = pieces->take<int32_t>(kMostSelectBlocks);
  memory.candidates = pieces->take<int32_t>(kMostCandidates);
  memory.keys = pieces->take<double>(kMostCandidates);
  memory.picks = pieces->take<int32_t>(kMostCandidates);
  memory.edges = pieces->take<Edge>(kMostEdges);
  memory.gathered = code_rows_at(kMostCandidates, full_depth(dim), pieces);
  return memory;
}

struct CoresetCodes {
  Scales* scales;
  CodeRows rows;
};

inline CoresetCodes coreset_codes_at(int64_t count, int64_t dim, const void* codes) {
  Pieces pieces(const_cast<void*>(codes));
  Scales* scales = pieces.take<Scales>(1);
  return {scales, code_rows_at(count, full_depth(dim), &pieces)};
}

// Rows as either side of the filter: by all coordinates, at once.
inline FilterSide side_of(const CodeRows& codes, const Rows& rows, const int32_t* order) { return {codes, CodeRows{}, rows, order}; }

inline FilterArguments arguments_of(const FilterSide& a, const FilterSide& b, const Scales* scales, int tiles_per_split) {
  FilterArguments arguments = {};
  arguments.a = a;
  arguments.b = b;
  arguments.first_per_unit = arguments.full_per_unit = &scales->full.per_unit;
  arguments.slack = canonical_slack(a.rows.dim);
  arguments.tiles_per_split = tiles_per_split;
  return arguments;
}

// Calls use(Scan<depth>{}) with the depth at compile time where rows have one that projections usually give.
template <class F>
cudaError_t with_depth(int64_t depth, F&& use) {
  return depth == 64 ? use(Scan<64>{}) : depth == 128 ? use(Scan<128>{}) : use(Scan<0>{});
}

// Lists the candidates of a pass, memory.candidates and keys, in any order, with their codes gathered; and finds the best row that is none.
cudaError_t choose_candidates(const CodeRows& codes, const double* values, int64_t count, const CoresetMemory& memory, const Progress* progress,
                              cudaStream_t stream);

// Copies the codes of listed[0 .. *count) into memory for kMostCandidates rows, and pads the last tile.
cudaError_t gather_codes(const CodeRows& codes, const int32_t* listed, const int32_t* count, const CodeRows& out, cudaStream_t stream);

// values[a] = min(itself, d2(a, b)) over all rows b of the other side.
cudaError_t update_by_codes(const FilterArguments& arguments, double* values, cudaStream_t stream);

// The same by every distance, for few centres and for rows too long for codes. center: the only one, known on the device only; null: all of them.
cudaError_t update_by_all(const Rows& rows, const Rows& centers, const int32_t* center, double* values, int32_t* flags, cudaStream_t stream);

}  // namespace patchcore::cuda
