// Eq. (6) and (7) for every image of a batch (image_score.h): the patch that decides, the neighbourhood of its nearest bank row, the softmax.
#include "exp.h"
#include "nearest.cuh"

namespace patchcore::cuda {

namespace {

// What is known of each image.
struct Deciding {
  int32_t* patch;    // the row of the queries with the largest distance, the lowest among equals
  int32_t* nearest;  // its nearest bank row m*
  double* distance;  // squared; NaN where the image has no score
};

// A block an image.
__global__ void __launch_bounds__(kThreads) deciding_patch_kernel(const double* squared_distances, const int64_t* nearest, int64_t num_patches,
                                                                  int64_t bank_rows, const Deciding out, int32_t* flags) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  double* values = reinterpret_cast<double*>(shared);                // [kThreads]
  int32_t* patches = reinterpret_cast<int32_t*>(values + kThreads);  // [kThreads]
  int32_t* problems = patches + kThreads;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * num_patches;
  if (thread == 0) *problems = 0;
  __syncthreads();
  double most = -1;
  int32_t patch = kNoRow;
  for (int64_t i = thread; i < num_patches; i += kThreads) {
    const double value = squared_distances[first + i];
    const int64_t row = nearest[first + i];
    if (!(subtract(value, value) == 0)) atomicOr(problems, kNonFinite);
    if (row < 0 || row >= bank_rows) atomicOr(problems, kOutside);
    if (picked_before(value, static_cast<int32_t>(i), most, patch)) {
      most = value;
      patch = static_cast<int32_t>(i);
    }
  }
  values[thread] = most;
  patches[thread] = patch;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (thread < width && picked_before(values[thread + width], patches[thread + width], values[thread], patches[thread])) {
      values[thread] = values[thread + width];
      patches[thread] = patches[thread + width];
    }
  }
  __syncthreads();
  if (thread != 0) return;
  if (*problems != 0) atomicOr(flags, *problems);
  const bool good = *problems == 0 && patches[0] != kNoRow;
  out.patch[blockIdx.x] = good ? static_cast<int32_t>(first) + patches[0] : 0;
  out.nearest[blockIdx.x] = good ? static_cast<int32_t>(nearest[first + patches[0]]) : 0;
  out.distance[blockIdx.x] = good ? values[0] : not_a_number();
}

// A warp an image. neighbors [batch, b]: the b rows nearest to m*; distances [batch, b]: scratch.
__global__ void __launch_bounds__(kThreads) scores_kernel(const Rows queries, const Rows bank, const Deciding deciding, const int64_t* neighbors,
                                                          int64_t batch, int64_t b, double* distances, float* scores, int32_t* flags) {
  const int64_t image = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_of_thread();
  if (image >= batch) return;
  const int lane = lane_of_thread(), half = lane / kLanes;
  const int64_t patch = deciding.patch[image], center = deciding.nearest[image];
  const double largest = rounded_root(deciding.distance[image]);
  if (b == 1) {
    if (lane == 0) scores[image] = static_cast<float>(largest);
    return;
  }
  const int64_t* members = neighbors + image * b;
  double* own = distances + image * b;
  // m* is slot 0 by its index; the slots behind it are the nearest others. Where in the list is m*? Behind all when b duplicates come before it.
  int64_t at = b;
  for (int64_t i = lane; i < b; i += kWarp) at = members[i] == center ? i : at;
  for (int width = kWarp / 2; width > 0; width /= 2) {
    const int64_t other = __shfl_xor_sync(kAllLanes, at, width);
    at = other < at ? other : at;
  }
  bool finite = true;
  for (int64_t j = 0; j < b; j += 2) {
    const int64_t slot = half == 1 && j + 1 < b ? j + 1 : j;
    const int64_t row = slot == 0 ? center : members[slot - 1 < at ? slot - 1 : slot];
    const double distance = rounded_root(half_warp_distance(queries, patch, bank, row));
    finite = finite && subtract(distance, distance) == 0;
    if (lane % kLanes == 0) own[slot] = distance;
  }
  finite = __all_sync(kAllLanes, finite) != 0;
  __syncwarp();  // all slots are written
  if (lane != 0) return;
  double most = own[0], sum = 0;
  for (int64_t j = 1; j < b; ++j) most = own[j] > most ? own[j] : most;
  for (int64_t j = 0; j < b; ++j) sum = add(sum, exp_of_nonpositive(subtract(own[j], most)));
  const double share = exp_of_nonpositive(subtract(own[0], most)) / sum;
  scores[image] = static_cast<float>(finite ? multiply(subtract(1.0, share), largest) : not_a_number());
  if (!finite) atomicOr(flags, kNonFinite);
}

struct ScoreMemory {
  Deciding deciding;
  double* squared_distances;  // [batch, b], of N_b to m*
  int64_t* neighbors;         // [batch, b]
  double* distances;          // [batch, b], of N_b to the patch
};

ScoreMemory score_memory(int64_t batch, int64_t b, Pieces* pieces) {
  return {{pieces->take<int32_t>(batch), pieces->take<int32_t>(batch), pieces->take<double>(batch)},
          pieces->take<double>(batch * b),
          pieces->take<int64_t>(batch * b),
          pieces->take<double>(batch * b)};
}

}  // namespace

int64_t image_scores_workspace_bytes(const Rows& bank, bool is_prepared, bool with_prefixes, int64_t batch, int64_t num_neighbors) {
  const int64_t b = num_neighbors < bank.count ? num_neighbors : bank.count;
  Pieces pieces(nullptr);
  score_memory(batch, b, &pieces);
  if (b == 1) return pieces.used();
  if (bank.dim > kMaxFilterDim) all_pairs_memory(batch, b, &pieces);
  if (bank.dim > kMaxFilterDim) return pieces.used();
  if (!is_prepared) one_off_at(bank, &pieces);
  search_memory(batch, bank, is_prepared && with_prefixes, b, &pieces);
  return pieces.used();
}

cudaError_t image_scores_cuda(const double* squared_distances, const int64_t* nearest, const Rows& queries, const Rows& bank, const void* prepared,
                              bool with_prefixes, int64_t batch, int64_t num_patches, int64_t num_neighbors, void* workspace, float* scores,
                              int32_t* flags, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const int64_t b = num_neighbors < bank.count ? num_neighbors : bank.count;
  Pieces pieces(workspace);
  const ScoreMemory memory = score_memory(batch, b, &pieces);
  PATCHCORE_LAUNCH((deciding_patch_kernel), dim3(static_cast<unsigned>(batch)), dim3(kThreads), kThreads * 12 + 16, stream, squared_distances,
                   nearest, num_patches, bank.count, memory.deciding, flags);
  PATCHCORE_CUDA_TRY(cudaGetLastError());
  if (b > 1) {
    if (bank.dim > kMaxFilterDim) {
      PATCHCORE_CUDA_TRY(search_all_pairs(bank, memory.deciding.nearest, batch, bank, b, all_pairs_memory(batch, b, &pieces),
                                          memory.squared_distances, memory.neighbors, flags, stream));
    } else {
      Bank known = {};
      if (prepared != nullptr) {
        known = prepared_bank_at(bank, with_prefixes, prepared);
      } else {
        const OneOff one_off = one_off_at(bank, &pieces);
        PATCHCORE_CUDA_TRY(encode_one_off(bank, one_off, flags, stream));
        known = one_off.bank;
      }
      const SearchMemory searching = search_memory(batch, bank, known.with_prefixes(), b, &pieces);
      PATCHCORE_CUDA_TRY(
          search(bank, memory.deciding.nearest, batch, known, b, 0, searching, memory.squared_distances, memory.neighbors, nullptr, flags, stream));
    }
  }
  const dim3 warps(static_cast<unsigned>(blocks_of(batch, kThreads / kWarp)));
  PATCHCORE_LAUNCH((scores_kernel), warps, dim3(kThreads), 0, stream, queries, bank, memory.deciding, memory.neighbors, batch, b, memory.distances,
                   scores, flags);
  return cudaGetLastError();
}

}  // namespace patchcore::cuda
