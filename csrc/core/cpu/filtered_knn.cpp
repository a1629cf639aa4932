// The filtered search (knn.h): queries in blocks, blocks over threads.
#include <algorithm>
#include <atomic>

#include "cpu/search.h"

namespace patchcore {

namespace {

constexpr int64_t kFewQueries = 24;  // a block of fewer would read the bank too often

// Queries of a block: a line of the patch grid where the caller knows its length, or several short ones, or a part of a long one.
int64_t queries_in_block(const SearchOptions& options, int64_t k) {
  const int64_t most = block_queries(k), line = options.line;
  if (line <= 0 || line >= most) return most;
  return line * std::max<int64_t>(1, kFewQueries / line);
}

}  // namespace

int64_t filtered_neighbors_workspace_bytes(const Rows& queries, const Rows& bank, const void* prepared, int64_t k, const Parallel& parallel) {
  Pieces slot(nullptr);
  search_memory(queries, bank, prepared_bank_at(prepared), k, &slot);
  return parallel.num_slots * slot.used() + 64;
}

Status filtered_neighbors_cpu(const Rows& queries, const Rows& bank, const void* prepared, int64_t k, const SearchOptions& options,
                              const Parallel& parallel, void* workspace, double* squared_distances, int64_t* indices, SearchStatistics* statistics) {
  const PreparedBank known = prepared_bank_at(prepared);
  Pieces size(nullptr);
  search_memory(queries, bank, known, k, &size);
  char* slots = static_cast<char*>(aligned_start(workspace));
  const int64_t block = queries_in_block(options, k), num_blocks = (queries.count + block - 1) / block;
  std::atomic<bool> finite{true};
  std::atomic<int64_t> counted[4] = {};
  parallel([&](int64_t slot) {
    Pieces pieces(slots + slot * size.used());
    const SearchMemory memory = search_memory(queries, bank, known, k, &pieces);
    BlockSearch search(bank, known, k, options, memory);
    const Share share = share_of(num_blocks, slot, parallel.num_slots);
    for (int64_t b = share.begin; b < share.end; ++b) {
      const int64_t begin = b * block, count = std::min(block, queries.count - begin);
      const int64_t back = std::max(block, options.line);  // results that far back are there, and most like what comes
      const int64_t* above = begin - back >= share.begin * block ? indices + (begin - back) * k : nullptr;
      if (!search.search(float_rows(queries, begin, count, memory.widened), count, above)) {
        finite = false;
        return;
      }
      for (int64_t i = 0; i < count * k; ++i) {
        squared_distances[begin * k + i] = memory.neighbors[i].squared_distance;
        indices[begin * k + i] = memory.neighbors[i].index;
      }
    }
    const SearchStatistics& s = search.statistics();
    const int64_t values[4] = {s.pairs, s.survivors, s.differences, s.canonical};
    for (int i = 0; i < 4; ++i) counted[i] += values[i];
  });
  if (statistics != nullptr) *statistics = {counted[0], counted[1], counted[2], counted[3]};
  return finite ? Status::kOk : Status::kNonFinite;
}

}  // namespace patchcore
