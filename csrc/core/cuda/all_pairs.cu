// Nearest neighbours by every distance, for rows too long for codes (filter.h, kMaxFilterDim).
#include "nearest.cuh"
#include "sorted_list.cuh"

namespace patchcore::cuda {

namespace {

// A warp a query; list [count, k].
__global__ void __launch_bounds__(kThreads)
    all_pairs_kernel(const Rows queries, const int32_t* map, int64_t count, const Rows bank, int64_t k, double* list, int32_t* list_rows) {
  const int64_t query = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_of_thread();
  if (query >= count) return;
  const int half = lane_of_thread() / kLanes;
  const int64_t asked = map == nullptr ? query : map[query];
  double* distances = list + query * k;
  int32_t* rows = list_rows + query * k;
  for (int64_t i = lane_of_thread(); i < k; i += kWarp) {
    distances[i] = INFINITY;
    rows[i] = kNoRow;
  }
  __syncwarp();
  for (int64_t row = 0; row < bank.count; row += 2) {
    const bool two = row + 1 < bank.count;
    const double distance = half_warp_distance(queries, asked, bank, half == 1 && two ? row + 1 : row);
    for (int h = 0; h < (two ? 2 : 1); ++h) {
      const double offered = __shfl_sync(kAllLanes, distance, h * kLanes);
      if (nearer(offered, static_cast<int32_t>(row) + h, distances[k - 1], rows[k - 1])) {
        __syncwarp();  // all have read the last one
        insert(distances, rows, k, offered, static_cast<int32_t>(row) + h);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) finite_rows_kernel(const Rows rows, const int32_t* map, int64_t count, float* marks, int32_t* flags) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_of_thread();
  if (row >= count) return;
  bool finite = true;
  with_row(rows, map == nullptr ? row : map[row], [&](const auto* x) {
    for (int64_t j = lane_of_thread(); j < rows.dim; j += kWarp) finite = finite && widen(x[j]) - widen(x[j]) == 0;
  });
  finite = __all_sync(kAllLanes, finite) != 0;
  if (lane_of_thread() != 0) return;
  if (!finite) atomicOr(flags, kNonFinite);
  if (marks != nullptr) marks[row] = finite ? 0.0f : __uint_as_float(0x7fc00000u);
}

}  // namespace

AllPairsMemory all_pairs_memory(int64_t count, int64_t k, Pieces* pieces) {
  return {pieces->take<double>(count * k), pieces->take<int32_t>(count * k), pieces->take<float>(count)};
}

cudaError_t search_all_pairs(const Rows& queries, const int32_t* map, int64_t count, const Rows& bank, int64_t k, const AllPairsMemory& memory,
                             double* squared_distances, int64_t* indices, int32_t* flags, cudaStream_t stream) {
  const dim3 warps(static_cast<unsigned>(blocks_of(count, kThreads / kWarp))),
      bank_warps(static_cast<unsigned>(blocks_of(bank.count, kThreads / kWarp)));
  PATCHCORE_LAUNCH((finite_rows_kernel), warps, dim3(kThreads), 0, stream, queries, map, count, memory.marks, flags);
  PATCHCORE_CUDA_TRY(cudaGetLastError());
  PATCHCORE_LAUNCH((finite_rows_kernel), bank_warps, dim3(kThreads), 0, stream, bank, nullptr, bank.count, nullptr, flags);
  PATCHCORE_CUDA_TRY(cudaGetLastError());
  PATCHCORE_LAUNCH((all_pairs_kernel), warps, dim3(kThreads), 0, stream, queries, map, count, bank, k, memory.list, memory.list_rows);
  PATCHCORE_CUDA_TRY(cudaGetLastError());
  return merge_lists(count, k, 1, count * k, memory.list, memory.list_rows, memory.marks, squared_distances, indices, stream);
}

}  // namespace patchcore::cuda
