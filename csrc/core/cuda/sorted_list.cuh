// The list of the nearest rows found so far, in the order of neighbours.
#pragma once

#include "common.cuh"

namespace patchcore::cuda {

// Puts (distance, row) into a sorted list of k, whose last entry falls out. By a warp, 32 entries at a time from the end; the new entry must come
// before the last one.
__device__ __forceinline__ void insert(double* distances, int32_t* rows, int64_t k, double distance, int32_t row) {
  const int lane = lane_of_thread();
  for (int64_t begin = (k - 1) / kWarp * kWarp;; begin -= kWarp) {
    const int64_t at = begin + lane;
    const bool inside = at < k;
    const double held = inside ? distances[at] : 0;
    const int32_t held_row = inside ? rows[at] : 0;
    const bool behind = inside && nearer(distance, row, held, held_row);
    __syncwarp();  // all have read
    if (behind && at + 1 < k) {
      distances[at + 1] = held;
      rows[at + 1] = held_row;
    }
    const uint32_t ahead = __ballot_sync(kAllLanes, inside && !behind);
    if (ahead != 0 || begin == 0) {
      const int64_t place = begin + __popc(ahead);
      __syncwarp();  // the entry that lay there has moved
      if (lane == 0) {
        distances[place] = distance;
        rows[place] = row;
      }
      __syncwarp();
      return;
    }
  }
}

}  // namespace patchcore::cuda
