// The filtered search (knn.h): queries in blocks, blocks over threads.
#include <algorithm>
#include <atomic>

#include "cpu/float_environment.h"
#include "cpu/search.h"

namespace patchcore {

namespace {

constexpr int64_t kFewQueries = 24;    // a block of fewer would read the bank too often
constexpr int64_t kLongestLine = 128;  // of a patch grid, that is recognised
constexpr int64_t kProbes = 16;
constexpr int64_t kProbedDims = 64;

// Mean squared difference between queries `lag` apart, on a few of them and their first dimensions.
float difference_at(const Rows& queries, int64_t lag, float* scratch) {
  float sum = 0;
  for (int64_t i = 0; i < kProbes; ++i) {
    const int64_t q = i * (queries.count - kLongestLine - 1) / (kProbes - 1);
    const FloatRows one = float_rows(queries, q, 1, scratch), other = float_rows(queries, q + lag, 1, scratch + queries.dim);
    sum += level().squared_difference(one.data, other.data, std::min(queries.dim, kProbedDims));
  }
  return sum / kProbes;
}

// The length of a line of the patch grid that the queries come from, or 0: the patch below looks like the one above it, so that is the shortest lag
// at which queries are much more alike than at others. Where it is wrong, the search takes longer.
int64_t guess_line(const Rows& queries, float* scratch) {
  constexpr int64_t kShortestLine = 4;
  if (queries.count <= 2 * kLongestLine) return 0;
  float differences[kLongestLine + 1], mean = 0;
  for (int64_t lag = kShortestLine; lag <= kLongestLine; ++lag) {
    differences[lag] = difference_at(queries, lag, scratch);
    mean += differences[lag] / (kLongestLine - kShortestLine + 1);
  }
  const float least = *std::min_element(differences + kShortestLine, differences + kLongestLine + 1);
  if (!(least < 0.75f * mean)) return 0;
  int64_t lag = kShortestLine;
  while (differences[lag] > least + 0.25f * (mean - least)) ++lag;
  while (lag < kLongestLine && differences[lag + 1] < differences[lag]) ++lag;  // down to the bottom of the valley
  return lag;
}

// Queries of a block: a line of the patch grid, so that the block before lies above, or several short lines, or a part of a long one.
int64_t queries_in_block(int64_t line, int64_t k) {
  const int64_t most = block_queries(k);
  if (line <= 0 || line >= most) return most;
  return line * std::max<int64_t>(1, kFewQueries / line);
}

}  // namespace

int64_t filtered_neighbors_workspace_bytes(const Rows& queries, const Rows& bank, const void* prepared, int64_t k, const Parallel& parallel) {
  Pieces slot(nullptr);
  search_memory(queries, bank, prepared_bank_at(prepared), k, &slot);
  return std::max(parallel.num_slots * slot.used(), 2 * queries.dim * static_cast<int64_t>(sizeof(float))) + 64;
}

Status filtered_neighbors_cpu(const Rows& queries, const Rows& bank, const void* prepared, int64_t k, const SearchOptions& options,
                              const Parallel& parallel, void* workspace, double* squared_distances, int64_t* indices, SearchStatistics* statistics) {
  const PreparedBank known = prepared_bank_at(prepared);
  Pieces size(nullptr);
  search_memory(queries, bank, known, k, &size);
  char* slots = static_cast<char*>(aligned_start(workspace));
  const FloatEnvironment ieee;
  const int64_t line = options.line != 0 ? options.line : guess_line(queries, static_cast<float*>(workspace));
  const int64_t block = queries_in_block(line, k), num_blocks = (queries.count + block - 1) / block;
  std::atomic<bool> finite{true};
  std::atomic<int64_t> counted[4] = {};
  parallel([&](int64_t slot) {
    Pieces pieces(slots + slot * size.used());
    const SearchMemory memory = search_memory(queries, bank, known, k, &pieces);
    BlockSearch search(bank, known, k, options, memory);
    const Share share = share_of(num_blocks, slot, parallel.num_slots);
    for (int64_t b = share.begin; b < share.end; ++b) {
      const int64_t begin = b * block, count = std::min(block, queries.count - begin);
      const int64_t back = std::max(block, line);  // results that far back are there, and most like what comes
      const int64_t* above = line > 0 && begin - back >= share.begin * block ? indices + (begin - back) * k : nullptr;
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
