// The canonical search: every pair is evaluated. It defines the result; a faster search must reproduce its bits.
#include "knn.h"

#include <algorithm>
#include <atomic>

#include "cpu/neighbor_heap.h"
#include "cpu/rows.h"

namespace patchcore {

namespace {

constexpr int64_t kTileQueries = 8;  // queries that share one pass over the bank

int64_t tile_floats(const Rows& queries, const Rows& bank) { return float_scratch(queries, kTileQueries) + float_scratch(bank, kBlockRows); }

// One slot's workspace: k neighbours for each query of a tile, the widened queries, a block of widened bank rows.
int64_t slot_bytes(const Rows& queries, const Rows& bank, int64_t k) {
  return kTileQueries * k * static_cast<int64_t>(sizeof(Neighbor)) + (tile_floats(queries, bank) + 1) / 2 * 8;
}

// Nearest rows of queries [begin, begin + count), count <= kTileQueries, into `neighbors` [count, k], sorted. False when a distance is not finite.
bool search_tile(const Rows& queries, int64_t begin, int64_t count, const Rows& bank, int64_t k, Neighbor* neighbors, float* scratch) {
  const FloatRows tile = float_rows(queries, begin, count, scratch);
  float* block_scratch = scratch + float_scratch(queries, kTileQueries);
  double distances[kBlockRows];
  bool finite = true;
  NeighborHeap heaps[kTileQueries] = {{neighbors, k},         {neighbors + k, k},     {neighbors + 2 * k, k}, {neighbors + 3 * k, k},
                                      {neighbors + 4 * k, k}, {neighbors + 5 * k, k}, {neighbors + 6 * k, k}, {neighbors + 7 * k, k}};
  for (int64_t row = 0; row < bank.count; row += kBlockRows) {
    const int64_t block_rows = std::min(kBlockRows, bank.count - row);
    const FloatRows block = float_rows(bank, row, block_rows, block_scratch);
    for (int64_t q = 0; q < count; ++q) {
      level().squared_distances(tile.data + q * tile.stride, block.data, block.stride, block_rows, bank.dim, distances);
      finite &= all_finite(distances, block_rows);
      for (int64_t i = 0; i < block_rows; ++i) heaps[q].offer({distances[i], row + i});
    }
  }
  for (int64_t q = 0; q < count; ++q) heaps[q].sort();
  return finite;
}

}  // namespace

int64_t nearest_neighbors_workspace_bytes(const Rows& queries, const Rows& bank, int64_t k, const Parallel& parallel) {
  return parallel.num_slots * slot_bytes(queries, bank, k);
}

Status nearest_neighbors_cpu(const Rows& queries, const Rows& bank, int64_t k, const Parallel& parallel, void* workspace, double* squared_distances,
                             int64_t* indices) {
  std::atomic<bool> finite{true};
  parallel([&](int64_t slot) {
    Neighbor* neighbors = reinterpret_cast<Neighbor*>(static_cast<char*>(workspace) + slot * slot_bytes(queries, bank, k));
    float* scratch = reinterpret_cast<float*>(neighbors + kTileQueries * k);
    const Share share = share_of(queries.count, slot, parallel.num_slots);
    for (int64_t begin = share.begin; begin < share.end; begin += kTileQueries) {
      const int64_t count = std::min(kTileQueries, share.end - begin);
      if (!search_tile(queries, begin, count, bank, k, neighbors, scratch)) finite = false;
      for (int64_t i = 0; i < count * k; ++i) {
        squared_distances[begin * k + i] = neighbors[i].squared_distance;
        indices[begin * k + i] = neighbors[i].index;
      }
    }
  });
  return finite ? Status::kOk : Status::kNonFinite;
}

}  // namespace patchcore
