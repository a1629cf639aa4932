// Banks, and the search as a sequence of launches: shared by its parts (seeds.cu, all_pairs.cu, bank.cu) and the image score.
#pragma once

#include "filter.cuh"
#include "kernels.h"

namespace patchcore::cuda {

// A bank with its codes, wherever they come from.
struct Bank {
  Rows rows;
  Encoding encoding;
  const int32_t* order;  // the bank row of each place; null: the same
  CodeRows full, seed, prefix;
  bool with_prefixes() const { return prefix.depth > 0; }
};

// The memory of a bank's codes, and of encoding `chunk` rows at a time.
Bank bank_at(const Rows& bank, bool with_prefixes, Pieces* pieces);
Bank prepared_bank_at(const Rows& bank, bool with_prefixes, const void* prepared);

// The codes of a bank for one call: no prefixes, no order.
struct OneOff {
  Bank bank;
  double* sample;
};
OneOff one_off_at(const Rows& bank, Pieces* pieces);
cudaError_t encode_one_off(const Rows& bank, const OneOff& memory, int32_t* flags, cudaStream_t stream);

// Queries of one search and the memory for it.
struct SearchMemory {
  int64_t chunk;   // queries at a time
  int64_t splits;  // shares of the bank
  StepRows steps;
  CodeRows full, seed, prefix;
  unsigned long long* near_codes;  // [splits, chunk]: the nearest by codes in each share, sum and place in one word
  int32_t* seed_begin;             // [chunk]: the run of k places around it, whose distances are known first
  double* seed_keys;               // [chunk]: the largest of the run,
  int32_t* seed_rows;              // [chunk]: and its row
  double* list_distances;          // [1 + splits, chunk, k]: the run, sorted, and what each share found, sorted
  int32_t* list_rows;
  unsigned long long* survivors;  // of a trial of the prefix
};

// How the bank is shared out among blocks.
struct Split {
  int64_t splits;
  int tiles_per_split;
};

// Finds a near row of each query by the seed codes, or by those of all coordinates: then in a part of the tiles. Fills memory.near_codes, seed_*, and
// the first list: the distances of the run of k places around it.
cudaError_t find_seeds(const Rows& queries, const int32_t* map, int64_t count, const Bank& bank, int64_t k, const Split& split, bool by_seed_codes,
                       const Evidence& evidence, const SearchMemory& memory, cudaStream_t stream);

// Merges sorted lists [lists <= 32][count, k], list_stride apart. residuals [count]: NaN where a query is not finite, which gets NaN and index 0.
cudaError_t merge_lists(int64_t count, int64_t k, int64_t lists, int64_t list_stride, const double* list_distances, const int32_t* list_rows,
                        const float* residuals, double* squared_distances, int64_t* indices, cudaStream_t stream);

SearchMemory search_memory(int64_t num_queries, const Rows& bank, bool with_prefixes, int64_t k, Pieces* pieces);

// The k nearest bank rows of queries map[0 .. count) of `queries` (null: the first `count`).
cudaError_t search(const Rows& queries, const int32_t* map, int64_t count, const Bank& bank, int64_t k, int prefix, const SearchMemory& memory,
                   double* squared_distances, int64_t* indices, SearchCounters* counters, int32_t* flags, cudaStream_t stream);

// The same for rows too long for codes (filter.h, kMaxFilterDim): every distance.
struct AllPairsMemory {
  double* list;  // [count, k]
  int32_t* list_rows;
  float* marks;  // [count], NaN where a query is not finite
};

AllPairsMemory all_pairs_memory(int64_t count, int64_t k, Pieces* pieces);
cudaError_t search_all_pairs(const Rows& queries, const int32_t* map, int64_t count, const Rows& bank, int64_t k, const AllPairsMemory& memory,
                             double* squared_distances, int64_t* indices, int32_t* flags, cudaStream_t stream);

}  // namespace patchcore::cuda
