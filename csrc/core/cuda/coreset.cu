// The batched coreset on the device (coreset.h): choose candidates (candidates.cu), find out which of them are near each other, run the greedy loop
// among them in parallel rounds (chain.cuh), lower all rows by the picks (update.cu); again and again, without the host looking at anything. And what
// goes beside: the check of a state, picks that are given, picks one by one.
#include "coreset.cuh"

namespace patchcore::cuda {

namespace {

constexpr int kStateThreads = 256;

// ---- Edges and the chain --------------------------------------------------------------------------------------------------------------------------

// filter.cuh's policy among candidates: a pair is found from the one that comes last and has the smaller key (chain.cuh, 6).
struct EdgePolicy {
  static constexpr bool kStrict = true;
  const double* keys;
  const int32_t* rows;
  Run* run;
  Edge* edges;

  __device__ double key(int64_t i) const { return keys[i]; }
  __device__ bool wants(int64_t i, int64_t j) const { return picked_before(keys[j], rows[j], keys[i], rows[i]); }
  __device__ double offer(int64_t i, double key, int32_t j, int32_t, double distance) const {
    if (distance < key && lane_of_thread() == 0) {
      const int32_t at = atomicAdd(&run->num_edges, 1);
      if (at < kMostEdges) edges[at] = {static_cast<int32_t>(i), j, distance};
    }
    return key;
  }
};

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    edges_kernel(const __grid_constant__ FilterArguments p, const __grid_constant__ EdgePolicy policy, const Progress* progress) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  if (progress->done != 0) return;
  filter_block<S>(p, policy, shared);
}

__global__ void __launch_bounds__(kChainThreads)
    chain_kernel(const CoresetMemory memory, double* values, int64_t* indices, double* squared_distances, Progress* progress) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  if (progress->done != 0) {  // the update of this pass has nothing to do
    if (threadIdx.x == 0) memory.run->num_picks = 0;
    return;
  }
  Run* run = memory.run;
  const int thread = static_cast<int>(threadIdx.x);
  const int num_candidates = run->num_candidates, num_edges = run->num_edges;
  const Chain chain = chain_at(shared, kMostCandidates);
  load_chain(chain, memory.keys, memory.candidates, num_candidates);
  int accepted = 0;
  if (num_edges <= kMostEdges)
    accepted = run_chain(chain, num_candidates, run->excluded, run->excluded_row, memory.edges, num_edges);
  else
    accepted = accept_first(chain, num_candidates);
  const int64_t left = run->count - progress->picked, before = progress->picked;
  const int taken = accepted < left ? accepted : static_cast<int>(left);
  rank_accepted(chain, accepted, [&](int rank, double value, int32_t row) {
    if (rank >= taken) return;
    indices[before + rank] = row;
    squared_distances[before + rank] = value;
    memory.picks[rank] = row;
    values[row] = kPicked;
  });
  __syncthreads();  // all have read the run
  if (thread != 0) return;
  progress->picked = before + taken;
  progress->done = before + taken == run->count || taken == 0;  // nothing taken: no row is left
  run->num_picks = taken;
  run->num_candidates = run->num_edges = 0;  // for the next pass
  if (run->fixed_batch != 0) return;
  const int32_t next = num_edges > kMostEdges ? run->batch / 4 : 4 * accepted;
  run->batch = next < kFewestCandidates ? kFewestCandidates : next > kMostCandidates ? kMostCandidates : next;
}

// The next pick of a run that goes one by one; one block.
__global__ void __launch_bounds__(1024) pick_kernel(double* values, int64_t count, int64_t* index, double* squared_distance, int32_t* picked) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  double* best = reinterpret_cast<double*>(shared);
  int32_t* best_row = reinterpret_cast<int32_t*>(best + 1024);
  const int thread = static_cast<int>(threadIdx.x);
  double most = kPicked;
  int32_t row = kNoRow;
  for (int64_t i = thread; i < count; i += 1024) {
    if (picked_before(values[i], static_cast<int32_t>(i), most, row)) {
      most = values[i];
      row = static_cast<int32_t>(i);
    }
  }
  best[thread] = most;
  best_row[thread] = row;
  for (int width = 512; width > 0; width /= 2) {
    __syncthreads();
    if (thread < width && picked_before(best[thread + width], best_row[thread + width], best[thread], best_row[thread])) {
      best[thread] = best[thread + width];
      best_row[thread] = best_row[thread + width];
    }
  }
  if (thread != 0) return;
  if (best_row[0] == kNoRow) return;  // all are picked; the callers see to it that there is one
  *index = *picked = best_row[0];
  *squared_distance = best[0];
  values[best_row[0]] = kPicked;
}

__global__ void __launch_bounds__(kStateThreads) check_state_kernel(double* values, int64_t count, unsigned long long* report) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kStateThreads + threadIdx.x;
  const double value = row < count ? values[row] : kPicked;
  if (row < count && !(value >= 0 || value == kPicked)) atomicMin(&report[1], static_cast<unsigned long long>(row));
  if (value == 0) values[row] = 0.0;
  const int open = warp_sum(value != kPicked ? 1 : 0);
  if (lane_of_thread() == 0 && open > 0) atomicAdd(&report[0], static_cast<unsigned long long>(open));
}

__global__ void list_picks_kernel(const int64_t* picks, int count, int32_t* listed, Run* run) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) listed[i] = static_cast<int32_t>(picks[i]);
  if (threadIdx.x == 0) run->num_picks = count;
}

__global__ void mark_picks_kernel(const int64_t* picks, int64_t count, double* values) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) values[picks[i]] = kPicked;
}

__global__ void start_kernel(int64_t count, int32_t batch, Run* run, Progress* progress) {
  *run = Run{};
  run->count = count;
  run->fixed_batch = batch;
  run->batch = batch != 0 ? batch : kFewestCandidates;
  progress->picked = 0;
  progress->done = count == 0;
}

// ---- Host side ------------------------------------------------------------------------------------------------------------------------------------

// Lists the pairs of candidates that are near each other.
cudaError_t find_edges(const FilterArguments& arguments, const EdgePolicy& policy, const Progress* progress, cudaStream_t stream) {
  return with_depth(arguments.a.first.depth, [&](auto scan) {
    using S = decltype(scan);
    constexpr int kBytes = filter_shared_bytes<S>(), kTiles = kMostCandidates / kTileRows;
    PATCHCORE_CUDA_TRY(allow_shared(edges_kernel<S>, kBytes));
    const dim3 grid(kTiles, static_cast<unsigned>(kTiles / arguments.tiles_per_split));
    PATCHCORE_LAUNCH((edges_kernel<S>), grid, dim3(kThreads), kBytes, stream, arguments, policy, progress);
    return cudaGetLastError();
  });
}

// Lowers all rows by the picks of the pass.
cudaError_t lower_by_picks(const Rows& rows, const CoresetCodes& codes, const CoresetMemory& memory, double* values, cudaStream_t stream) {
  PATCHCORE_CUDA_TRY(gather_codes(codes.rows, memory.picks, &memory.run->num_picks, memory.gathered, stream));
  FilterArguments arguments =
      arguments_of(side_of(codes.rows, rows, nullptr), side_of(memory.gathered, rows, memory.picks), codes.scales, kMostCandidates / kTileColumns);
  arguments.count_a = rows.count;
  arguments.device_count_b = &memory.run->num_picks;
  return update_by_codes(arguments, values, stream);
}

cudaError_t run_pass(const Rows& rows, const CoresetCodes& codes, const CoresetMemory& memory, double* values, int64_t* indices,
                     double* squared_distances, Progress* progress, cudaStream_t stream) {
  PATCHCORE_CUDA_TRY(choose_candidates(codes.rows, values, rows.count, memory, progress, stream));
  const FilterSide side = side_of(memory.gathered, rows, memory.candidates);
  FilterArguments arguments = arguments_of(side, side, codes.scales, 4);
  arguments.device_count_a = arguments.device_count_b = &memory.run->num_candidates;
  PATCHCORE_CUDA_TRY(find_edges(arguments, {memory.keys, memory.candidates, memory.run, memory.edges}, progress, stream));
  PATCHCORE_CUDA_TRY(allow_shared(chain_kernel, chain_bytes(kMostCandidates)));
  PATCHCORE_LAUNCH((chain_kernel), dim3(1), dim3(kChainThreads), chain_bytes(kMostCandidates), stream, memory, values, indices, squared_distances,
                   progress);
  PATCHCORE_CUDA_TRY(cudaGetLastError());
  return lower_by_picks(rows, codes, memory, values, stream);
}

}  // namespace

int64_t coreset_codes_bytes(int64_t count, int64_t dim) {
  Pieces pieces(nullptr);
  pieces.take<Scales>(1);
  code_rows_at(count, full_depth(dim), &pieces);
  return pieces.used();
}

int64_t coreset_codes_workspace_bytes(int64_t dim) {
  Pieces pieces(nullptr);
  pieces.take<double>(kSampleRows);
  pieces.take<double>(dim);
  return pieces.used();
}

cudaError_t coreset_codes_cuda(const Rows& rows, const double* center, void* workspace, void* codes, int32_t* flags, cudaStream_t stream) {
  Pieces pieces(workspace);
  double* sample = pieces.take<double>(kSampleRows);
  double* mean = pieces.take<double>(rows.dim);
  const CoresetCodes at = coreset_codes_at(rows.count, rows.dim, codes);
  const Encoding encoding = {center == nullptr ? mean : center, at.scales, nullptr};
  if (center == nullptr) PATCHCORE_CUDA_TRY(mean_of_sample(rows, mean, stream));
  PATCHCORE_CUDA_TRY(choose_scales(rows, encoding, {}, {}, sample, at.scales, flags, stream));
  return encode_rows(rows, nullptr, rows.count, encoding, {}, at.rows, {}, {}, flags, stream);
}

cudaError_t check_state_cuda(double* min_squared_distances, int64_t count, int64_t* report, cudaStream_t stream) {
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(report, 0, sizeof(int64_t), stream));
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(report + 1, 0xff, sizeof(int64_t), stream));  // -1, the largest of unsigned numbers
  if (count == 0) return cudaSuccess;
  PATCHCORE_LAUNCH((check_state_kernel), dim3(static_cast<unsigned>(blocks_of(count, kStateThreads))), dim3(kStateThreads), 0, stream,
                   min_squared_distances, count, reinterpret_cast<unsigned long long*>(report));
  return cudaGetLastError();
}

int64_t coreset_workspace_bytes(const Rows& rows) {
  Pieces pieces(nullptr);
  coreset_memory(rows.dim, &pieces);
  return pieces.used();
}

cudaError_t add_picks_cuda(const Rows& rows, const void* codes, const int64_t* picks, int64_t count, void* workspace, double* min_squared_distances,
                           cudaStream_t stream) {
  Pieces pieces(workspace);
  const CoresetMemory memory = coreset_memory(rows.dim, &pieces);
  for (int64_t done = 0; done < count; done += kMostCandidates) {
    const int now = static_cast<int>(count - done < kMostCandidates ? count - done : kMostCandidates);
    PATCHCORE_LAUNCH((list_picks_kernel), dim3(1), dim3(1024), 0, stream, picks + done, now, memory.picks, memory.run);
    PATCHCORE_CUDA_TRY(cudaGetLastError());
    PATCHCORE_CUDA_TRY(lower_by_picks(rows, coreset_codes_at(rows.count, rows.dim, codes), memory, min_squared_distances, stream));
  }
  if (count == 0) return cudaSuccess;
  PATCHCORE_LAUNCH((mark_picks_kernel), dim3(static_cast<unsigned>(blocks_of(count, 256))), dim3(256), 0, stream, picks, count,
                   min_squared_distances);
  return cudaGetLastError();
}

cudaError_t start_coreset_cuda(const Rows& rows, int64_t count, int64_t batch, void* workspace, int64_t* progress, cudaStream_t stream) {
  Pieces pieces(workspace);
  const CoresetMemory memory = coreset_memory(rows.dim, &pieces);
  const auto fixed = static_cast<int32_t>(batch < kMostCandidates ? batch : kMostCandidates);
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(memory.histogram, 0, kDigits * sizeof(int32_t), stream));
  PATCHCORE_LAUNCH((start_kernel), dim3(1), dim3(1), 0, stream, count, fixed, memory.run, reinterpret_cast<Progress*>(progress));
  return cudaGetLastError();
}

cudaError_t coreset_passes_cuda(const Rows& rows, const void* codes, int64_t passes, void* workspace, double* min_squared_distances, int64_t* indices,
                                double* squared_distances, int64_t* progress, cudaStream_t stream) {
  Pieces pieces(workspace);
  const CoresetMemory memory = coreset_memory(rows.dim, &pieces);
  const CoresetCodes at = coreset_codes_at(rows.count, rows.dim, codes);
  for (int64_t pass = 0; pass < passes; ++pass) {
    PATCHCORE_CUDA_TRY(run_pass(rows, at, memory, min_squared_distances, indices, squared_distances, reinterpret_cast<Progress*>(progress), stream));
  }
  return cudaSuccess;
}

cudaError_t greedy_by_all_cuda(const Rows& rows, int64_t count, int32_t* picked, double* min_squared_distances, int64_t* indices,
                               double* squared_distances, int32_t* flags, cudaStream_t stream) {
  Rows one = rows;
  one.count = 1;
  for (int64_t i = 0; i < count; ++i) {
    PATCHCORE_LAUNCH((pick_kernel), dim3(1), dim3(1024), 1024 * 12, stream, min_squared_distances, rows.count, indices + i, squared_distances + i,
                     picked);
    PATCHCORE_CUDA_TRY(cudaGetLastError());
    PATCHCORE_CUDA_TRY(update_by_all(rows, one, picked, min_squared_distances, flags, stream));
  }
  return cudaSuccess;
}

}  // namespace patchcore::cuda
