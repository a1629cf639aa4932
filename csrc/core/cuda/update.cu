// Squared distances to the nearest centre: rows lowered by the picks of a pass, or by any centres.
#include "coreset.cuh"

namespace patchcore::cuda {

namespace {

// filter.cuh's policy of the rows: the least distance so far.
struct UpdatePolicy {
  static constexpr bool kStrict = true;
  double* values;

  __device__ double key(int64_t row) const { return values[row]; }
  __device__ bool wants(int64_t, int64_t) const { return true; }
  __device__ double offer(int64_t row, double key, int32_t, int32_t, double distance) const {
    if (!(distance < key)) return key;
    if (lane_of_thread() == 0) values[row] = distance;
    return distance;
  }
};

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    update_kernel(const __grid_constant__ FilterArguments p, const __grid_constant__ UpdatePolicy policy) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  filter_block<S>(p, policy, shared);
}

// Every pair, for few centres and for rows too long for codes. A warp a row, its halves take the centres in turn.
__global__ void __launch_bounds__(kThreads)
    update_by_all_kernel(const Rows rows, const Rows centers, const int32_t* center, double* values, int32_t* flags) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_of_thread();
  if (row >= rows.count) return;
  const int half = lane_of_thread() / kLanes;
  double least = values[row];
  bool finite = true;
  for (int64_t c = 0; c < centers.count; c += 2) {
    const int64_t own = half == 1 && c + 1 < centers.count ? c + 1 : c;
    const double distance = half_warp_distance(rows, row, centers, center == nullptr ? own : *center);
    finite = finite && subtract(distance, distance) == 0;
    least = distance < least ? distance : least;
  }
  const double other = __shfl_xor_sync(kAllLanes, least, kLanes);
  finite = __all_sync(kAllLanes, finite) != 0;
  if (lane_of_thread() != 0) return;
  values[row] = other < least ? other : least;  // a picked row's is below all distances
  if (!finite) atomicOr(flags, kNonFinite);
}

// Memory of an update by centres that are not rows of the same set.
struct UpdateMemory {
  Scales* scales;
  double* center;
  double* sample;
  CodeRows centers, rows;
};

constexpr int64_t kUpdateChunk = 65536;
constexpr int64_t kFewCenters = 8;  // encoding the rows costs about as much as the distances of so many

UpdateMemory update_memory(const Rows& rows, const Rows& centers, Pieces* pieces) {
  UpdateMemory memory = {};
  memory.scales = pieces->take<Scales>(1);
  memory.center = pieces->take<double>(rows.dim);
  memory.sample = pieces->take<double>(kSampleRows);
  memory.centers = code_rows_at(centers.count, full_depth(rows.dim), pieces);
  memory.rows = code_rows_at(rows.count < kUpdateChunk ? rows.count : kUpdateChunk, full_depth(rows.dim), pieces);
  return memory;
}

bool updates_by_all(const Rows& rows, const Rows& centers) { return rows.dim > kMaxFilterDim || centers.count <= kFewCenters; }

}  // namespace

cudaError_t update_by_codes(const FilterArguments& arguments, double* values, cudaStream_t stream) {
  return with_depth(arguments.a.first.depth, [&](auto scan) {
    using S = decltype(scan);
    constexpr int kBytes = filter_shared_bytes<S>();
    PATCHCORE_CUDA_TRY(allow_shared(update_kernel<S>, kBytes));
    const dim3 grid(static_cast<unsigned>(blocks_of(arguments.count_a, kTileRows)));
    PATCHCORE_LAUNCH((update_kernel<S>), grid, dim3(kThreads), kBytes, stream, arguments, UpdatePolicy{values});
    return cudaGetLastError();
  });
}

cudaError_t update_by_all(const Rows& rows, const Rows& centers, const int32_t* center, double* values, int32_t* flags, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(blocks_of(rows.count, kThreads / kWarp)));
  PATCHCORE_LAUNCH((update_by_all_kernel), grid, dim3(kThreads), 0, stream, rows, centers, center, values, flags);
  return cudaGetLastError();
}

int64_t update_min_distances_workspace_bytes(const Rows& rows, const Rows& centers) {
  Pieces pieces(nullptr);
  if (!updates_by_all(rows, centers)) update_memory(rows, centers, &pieces);
  return pieces.used();
}

cudaError_t update_min_distances_cuda(const Rows& rows, const Rows& centers, void* workspace, double* min_squared_distances, int32_t* flags,
                                      cudaStream_t stream) {
  if (rows.count == 0 || centers.count == 0) return cudaSuccess;
  if (updates_by_all(rows, centers)) return update_by_all(rows, centers, nullptr, min_squared_distances, flags, stream);
  Pieces pieces(workspace);
  const UpdateMemory memory = update_memory(rows, centers, &pieces);
  const Encoding encoding = {memory.center, memory.scales, nullptr};
  PATCHCORE_CUDA_TRY(mean_of_sample(rows, memory.center, stream));
  PATCHCORE_CUDA_TRY(choose_scales(rows, encoding, {}, {}, memory.sample, memory.scales, flags, stream));
  PATCHCORE_CUDA_TRY(encode_rows(centers, nullptr, centers.count, encoding, {}, memory.centers, {}, {}, flags, stream));
  for (int64_t begin = 0; begin < rows.count; begin += kUpdateChunk) {
    Rows part = rows;
    part.count = rows.count - begin < kUpdateChunk ? rows.count - begin : kUpdateChunk;
    part.data = static_cast<const char*>(rows.data) + begin * rows.stride * (rows.type == ScalarType::kFloat32 ? 4 : 2);
    PATCHCORE_CUDA_TRY(encode_rows(part, nullptr, part.count, encoding, {}, memory.rows, {}, {}, flags, stream));
    FilterArguments arguments = arguments_of(side_of(memory.rows, part, nullptr), side_of(memory.centers, centers, nullptr), memory.scales,
                                             static_cast<int>(blocks_of(centers.count, kTileColumns)));
    arguments.count_a = part.count;
    arguments.count_b = centers.count;
    PATCHCORE_CUDA_TRY(update_by_codes(arguments, min_squared_distances + begin, stream));
  }
  return cudaSuccess;
}

}  // namespace patchcore::cuda
