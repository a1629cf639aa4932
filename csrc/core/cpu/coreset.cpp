// The canonical coreset: one pass over all rows a pick. It defines the result; a faster algorithm must reproduce its bits.
#include "coreset.h"

#include <algorithm>
#include <atomic>

#include "cpu/candidate.h"
#include "cpu/rows.h"

namespace patchcore {

namespace {

// One slot's workspace: its best candidate, the widened centre, a block of widened rows.
struct Slot {
  Candidate* best;
  float* center;
  float* block;
};

int64_t slot_bytes(const Rows& rows) { return static_cast<int64_t>(sizeof(Candidate)) + (float_scratch(rows, 1 + kBlockRows) + 1) / 2 * 8; }

Slot slot_of(const Rows& rows, void* workspace, int64_t slot) {
  char* bytes = static_cast<char*>(workspace) + slot * slot_bytes(rows);
  float* floats = reinterpret_cast<float*>(bytes + sizeof(Candidate));
  return {reinterpret_cast<Candidate*>(bytes), floats, floats + float_scratch(rows, 1)};
}

// Lowers the values of rows [begin, end) by one centre, and offers each of them to `best`. False when a distance is not finite.
bool update_share(const Rows& rows, Share share, const float* center, float* scratch, double* min_squared_distances, Candidate* best) {
  double distances[kBlockRows];
  bool finite = true;
  for (int64_t begin = share.begin; begin < share.end; begin += kBlockRows) {
    const int64_t count = std::min(kBlockRows, share.end - begin);
    const FloatRows block = float_rows(rows, begin, count, scratch);
    level().squared_distances(center, block.data, block.stride, count, rows.dim, distances);
    finite &= all_finite(distances, count);
    for (int64_t i = 0; i < count; ++i) {
      double& value = min_squared_distances[begin + i];
      if (distances[i] < value) value = distances[i];
      if (value > best->squared_distance) *best = {value, begin + i};  // ascending index: strict comparison keeps the lowest
    }
  }
  return finite;
}

}  // namespace

int64_t coreset_workspace_bytes(const Rows& rows, const Parallel& parallel) { return parallel.num_slots * slot_bytes(rows); }

Status update_min_distances_cpu(const Rows& rows, const Rows& centers, const Parallel& parallel, void* workspace, double* min_squared_distances) {
  std::atomic<bool> finite{true};
  parallel([&](int64_t s) {
    const Slot slot = slot_of(rows, workspace, s);
    const Share share = share_of(rows.count, s, parallel.num_slots);
    Candidate ignored = kNoCandidate;
    for (int64_t c = 0; c < centers.count; ++c) {
      const float* center = float_rows(centers, c, 1, slot.center).data;
      if (!update_share(rows, share, center, slot.block, min_squared_distances, &ignored)) finite = false;
    }
  });
  return finite ? Status::kOk : Status::kNonFinite;
}

Status greedy_coreset_cpu(const Rows& rows, int64_t count, const Parallel& parallel, void* workspace, double* min_squared_distances, int64_t* indices,
                          double* squared_distances) {
  Candidate best = kNoCandidate;
  for (int64_t i = 0; i < rows.count; ++i) {
    const Candidate candidate = {min_squared_distances[i], i};
    if (candidate.squared_distance > best.squared_distance) best = candidate;
  }
  std::atomic<bool> finite{true};
  for (int64_t p = 0; p < count && finite; ++p) {
    indices[p] = best.index;
    squared_distances[p] = best.squared_distance;
    min_squared_distances[best.index] = kPicked;
    parallel([&](int64_t s) {
      const Slot slot = slot_of(rows, workspace, s);
      const float* center = float_rows(rows, indices[p], 1, slot.center).data;
      *slot.best = kNoCandidate;
      const Share share = share_of(rows.count, s, parallel.num_slots);
      if (!update_share(rows, share, center, slot.block, min_squared_distances, slot.best)) finite = false;
    });
    best = kNoCandidate;
    for (int64_t s = 0; s < parallel.num_slots; ++s) {
      const Candidate& candidate = *slot_of(rows, workspace, s).best;
      if (candidate.before(best)) best = candidate;
    }
  }
  return finite ? Status::kOk : Status::kNonFinite;
}

}  // namespace patchcore
