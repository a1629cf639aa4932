// The filtered search of one block of queries in a prepared bank (knn.h), for whoever has queries: the search itself and Eq. (7).
#pragma once

#include "cpu/bank.h"
#include "cpu/chunks.h"
#include "cpu/neighbor_heap.h"

namespace patchcore {

// Queries that are searched for together: fewer where each brings a long list of neighbours.
inline int64_t block_queries(int64_t k) { return k <= 256 ? kBlockQueries : 8; }

// Masks of one query, with a step from one to the next that spreads them over the cache.
constexpr int64_t kMaskStride = kChunkTiles + 8;

// One slot's memory.
struct SearchMemory {
  EncoderMemory encoder;
  float* widened;          // [kBlockQueries, dim] of the queries, unused for float32
  float* widened_row;      // [dim] of a bank row
  uint8_t* scanned_codes;  // [kBlockQueries, 4 * words] in the view that is scanned
  char* row_starts;        // [stages, kBlockQueries] of a scan in stages
  uint8_t* second_codes;   // [kBlockQueries, 4 * words]
  uint64_t* masks;         // [kBlockQueries, kMaskStride], bits of the rows that the scan leaves of each tile
  int32_t* left;           // [kChunkTiles * 64 + 4], places in the tiles that are left for a query
  int32_t* dots;           // [kChunkTiles * 64]
  int64_t* keys;           // [kChunkTiles * 64], squared distance of second codes * 2^32 + place
  Neighbor* neighbors;     // [block_queries(k), k]
};

SearchMemory search_memory(const Rows& queries, const Rows& rows, const PreparedBank& bank, int64_t k, Pieces* pieces);

// Searches block by block; what it learns in one serves the next.
class BlockSearch {
 public:
  BlockSearch(const Rows& rows, const PreparedBank& bank, int64_t k, const SearchOptions& options, const SearchMemory& memory);

  // The k nearest rows of `count` <= block_queries(k) queries: sorted in memory.neighbors [count, k]. above: [count, k] bank rows that are probably
  // near (distinct for each query), or null. False when a query is not finite.
  bool search(const FloatRows& queries, int64_t count, const int64_t* above);

  const SearchStatistics& statistics() const { return statistics_; }

  // Whether scanning the prefix is cheaper than scanning all coordinates, given what it left.
  bool prefix_pays(const SearchStatistics& found) const;

 private:
  int64_t gather_seeds(int64_t q, const int64_t* above, int64_t count);
  void start_from_seeds(int64_t q, const int64_t* above, int64_t count);
  int64_t look_up(int64_t q, int64_t count, int32_t limit);
  void encode_scanned(int64_t count);
  void scan(const Chunks& chunks, int64_t count);
  void scan_in_stages(const TileFilter& filter, const Chunks& chunks, int64_t count, const int32_t* floors);
  int64_t rescue(const Chunks& chunks, int64_t count);
  int64_t take_marked(int64_t q, int64_t begin, int64_t end, const Chunks& chunks);
  void rescue_by_second(int64_t q, int64_t count);
  void prefetch(int64_t place) const;
  void evaluate(int64_t q, int64_t place);
  double canonical(int64_t q, int64_t row);
  double bound(int64_t q) const;

  const Rows& rows_;
  const PreparedBank& bank_;
  const int64_t k_;
  const SearchOptions options_;
  SearchMemory memory_;
  Encoder encoder_;
  const double slack_;
  SearchStatistics statistics_;
  bool prefix_ = false;         // scanning the prefix, or all coordinates
  bool seeded_ = false;         // heaps hold rows that the scan meets again
  int64_t blocks_to_wait_ = 0;  // before the prefix is tried again,
  int64_t next_wait_ = 0;       // and when it does not pay then
  FloatRows queries_ = {nullptr, 0};

  // Of the queries of the block:
  alignas(64) double reach_[kBlockQueries];  // filter.h, of the scanned view
  alignas(64) int32_t norms_[kBlockQueries];
  double residuals_[kBlockQueries];
  RowCodes second_[kBlockQueries];
  NeighborHeap heaps_[kBlockQueries];
};

}  // namespace patchcore
