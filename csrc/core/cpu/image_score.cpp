#include "image_score.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/neighbor_heap.h"
#include "cpu/rows.h"
#include "exp.h"
#include "platform.h"

namespace patchcore {

namespace {

int64_t scratch_floats(const Rows& queries, const Rows& bank) { return float_scratch(queries, 1) + float_scratch(bank, 1 + kBlockRows); }

// One slot's workspace: N_b(m*), the distances to its members, the widened patch, m* and a block of the bank.
int64_t slot_bytes(const Rows& queries, const Rows& bank, int64_t num_neighbors) {
  return num_neighbors * static_cast<int64_t>(sizeof(Neighbor) + sizeof(double)) + (scratch_floats(queries, bank) + 1) / 2 * 8;
}

struct Slot {
  Neighbor* neighbors;  // [num_neighbors]
  double* distances;    // [num_neighbors]
  float* patch;
  float* nearest;
  float* block;
};

Slot slot_of(const Rows& queries, const Rows& bank, int64_t num_neighbors, void* workspace, int64_t slot) {
  char* bytes = static_cast<char*>(workspace) + slot * slot_bytes(queries, bank, num_neighbors);
  Neighbor* neighbors = reinterpret_cast<Neighbor*>(bytes);
  double* distances = reinterpret_cast<double*>(neighbors + num_neighbors);
  float* patch = reinterpret_cast<float*>(distances + num_neighbors);
  float* nearest = patch + float_scratch(queries, 1);
  return {neighbors, distances, patch, nearest, nearest + float_scratch(bank, 1)};
}

// N_b(m*) into slot.neighbors. False when a distance is not finite.
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

// exp(distances[0]) / sum_j exp(distances[j]).
double softmax_of_first(const double* distances, int64_t count) {
  const double largest = *std::max_element(distances, distances + count);
  double sum = 0;
  for (int64_t j = 0; j < count; ++j) sum = add(sum, exp_of_nonpositive(subtract(distances[j], largest)));
  return exp_of_nonpositive(subtract(distances[0], largest)) / sum;
}

}  // namespace

int64_t image_scores_workspace_bytes(const Rows& queries, const Rows& bank, int64_t num_neighbors, const Parallel& parallel) {
  return parallel.num_slots * slot_bytes(queries, bank, std::min(num_neighbors, bank.count));
}

Status image_scores_cpu(const double* squared_distances, const int64_t* nearest, const Rows& queries, const Rows& bank, int64_t batch,
                        int64_t num_patches, int64_t num_neighbors, const Parallel& parallel, void* workspace, float* scores) {
  const int64_t b = std::min(num_neighbors, bank.count);
  std::atomic<bool> finite{true};
  parallel([&](int64_t s) {
    const Slot slot = slot_of(queries, bank, b, workspace, s);
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
      if (!find_neighborhood(bank, nearest[patch], b, slot)) finite = false;
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
