#include "image_score.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/search.h"
#include "exp.h"
#include "platform.h"

namespace patchcore {

namespace {

// One slot's memory.
struct Slot {
  Neighbor* neighbors;  // [num_neighbors], N_b(m*)
  double* distances;    // [num_neighbors], of the patch to its members
  float* patch;         // widened rows
  float* nearest;
  float* block;
  SearchMemory search;  // where the bank is prepared
};

Slot slot_at(const Rows& queries, const Rows& bank, const void* prepared, int64_t num_neighbors, Pieces* pieces) {
  Slot slot = {};
  slot.neighbors = pieces->take<Neighbor>(num_neighbors);
  slot.distances = pieces->take<double>(num_neighbors);
  slot.patch = pieces->take<float>(float_scratch(queries, 1));
  slot.nearest = pieces->take<float>(float_scratch(bank, 1));
  slot.block = pieces->take<float>(float_scratch(bank, kBlockRows));
  if (prepared != nullptr) slot.search = search_memory(bank, bank, prepared_bank_at(prepared), num_neighbors, pieces);
  return slot;
}

// N_b(m*) into slot.neighbors, from all distances. False when one is not finite.
bool find_neighborhood(const Rows& bank, int64_t nearest, int64_t num_neighbors, const Slot& slot) {
  slot.neighbors[0] = {0.0, nearest};
  NeighborHeap others(slot.neighbors + 1, num_neighbors - 1);
  const float* center = float_rows(bank, nearest, 1, slot.nearest).data;
  double distances[kBlockRows];
  bool finite = true;
  for (int64_t row = 0; row < bank.count; row += kBlockRows) {
    const int64_t count = std::min(kBlockRows, bank.count - row);
    const FloatRows block = float_rows(bank, row, count, slot.block);
    level().squared_distances(center, block.data, block.stride, count, bank.dim, distances);
    finite &= all_finite(distances, count);
    for (int64_t i = 0; i < count; ++i) {
      if (row + i != nearest) others.offer({distances[i], row + i});
    }
  }
  others.sort();
  return finite;
}

// The same by codes: of the b rows nearest to m*, itself among them unless b duplicates come before it, the first b - 1 others.
bool find_neighborhood(const Rows& bank, int64_t nearest, int64_t num_neighbors, const Slot& slot, BlockSearch* search) {
  if (!search->search(float_rows(bank, nearest, 1, slot.nearest), 1, nullptr)) return false;
  slot.neighbors[0] = {0.0, nearest};
  int64_t found = 1;
  for (int64_t i = 0; found < num_neighbors; ++i) {
    if (slot.search.neighbors[i].index != nearest) slot.neighbors[found++] = slot.search.neighbors[i];
  }
  return true;
}

// exp(distances[0]) / sum_j exp(distances[j]).
double softmax_of_first(const double* distances, int64_t count) {
  const double largest = *std::max_element(distances, distances + count);
  double sum = 0;
  for (int64_t j = 0; j < count; ++j) sum = add(sum, exp_of_nonpositive(subtract(distances[j], largest)));
  return exp_of_nonpositive(subtract(distances[0], largest)) / sum;
}

}  // namespace

int64_t image_scores_workspace_bytes(const Rows& queries, const Rows& bank, const void* prepared, int64_t num_neighbors, const Parallel& parallel) {
  Pieces pieces(nullptr);
  slot_at(queries, bank, prepared, std::min(num_neighbors, bank.count), &pieces);
  return parallel.num_slots * pieces.used() + 64;
}

Status image_scores_cpu(const double* squared_distances, const int64_t* nearest, const Rows& queries, const Rows& bank, const void* prepared,
                        int64_t batch, int64_t num_patches, int64_t num_neighbors, const Parallel& parallel, void* workspace, float* scores) {
  const int64_t b = std::min(num_neighbors, bank.count);
  const PreparedBank known = prepared == nullptr ? PreparedBank{} : prepared_bank_at(prepared);
  Pieces size(nullptr);
  slot_at(queries, bank, prepared, b, &size);
  char* slots = static_cast<char*>(aligned_start(workspace));
  std::atomic<bool> finite{true};
  parallel([&](int64_t s) {
    Pieces pieces(slots + s * size.used());
    const Slot slot = slot_at(queries, bank, prepared, b, &pieces);
    BlockSearch search(bank, known, b, {}, slot.search);
    const Share share = share_of(batch, s, parallel.num_slots);
    for (int64_t image = share.begin; image < share.end; ++image) {
      const double* values = squared_distances + image * num_patches;
      if (!all_finite(values, num_patches)) finite = false;
      const int64_t patch = image * num_patches + (std::max_element(values, values + num_patches) - values);  // the first of equals
      const double largest = std::sqrt(squared_distances[patch]);
      if (b == 1) {
        scores[image] = static_cast<float>(largest);
        continue;
      }
      const bool found =
          prepared == nullptr ? find_neighborhood(bank, nearest[patch], b, slot) : find_neighborhood(bank, nearest[patch], b, slot, &search);
      if (!found) {
        finite = false;
        return;
      }
      const float* features = float_rows(queries, patch, 1, slot.patch).data;
      for (int64_t j = 0; j < b; ++j) {
        const FloatRows row = float_rows(bank, slot.neighbors[j].index, 1, slot.block);
        level().squared_distances(features, row.data, row.stride, 1, bank.dim, slot.distances + j);
        slot.distances[j] = std::sqrt(slot.distances[j]);
      }
      if (!all_finite(slot.distances, b)) finite = false;
      scores[image] = static_cast<float>(multiply(subtract(1.0, softmax_of_first(slot.distances, b)), largest));
    }
  });
  return finite ? Status::kOk : Status::kNonFinite;
}

}  // namespace patchcore
