// The batched coreset on the device (coreset.h): choose candidates, find out which of them are near each other, run the greedy loop among them in
// parallel rounds, lower all rows by the picks; again and again, without the host looking at anything.
//
// Candidates are the rows that come first in the order of picks. They need not be of any given number: whatever threshold divides the rows in two,
// the loop among the upper ones gives the sequence's picks as long as the best of them comes before the best of the others, as it stood when the pass
// began. The threshold is found by counting digits of the keys, from the top.
#include "chain.cuh"
#include "filter.cuh"

namespace patchcore::cuda {

namespace {

constexpr int kMostCandidates = 4096, kFewestCandidates = 256;
constexpr int64_t kMostEdges = int64_t{1} << 19;  // 256 candidates have fewer than 2^15; a pass with more takes one pick and the next is smaller
constexpr int kDigitBits = 12, kDigits = 1 << kDigitBits, kLevels = 8;  // 96 bits: the value's 64 and the row's 32
constexpr int kSelectThreads = 256;
constexpr int kMostSelectBlocks = 256;

// ---- The order of picks as a number
// -------------------------------------------------------------------------------------------------------------------

// A larger key is picked before: the bits of a value that is not negative are ordered like the value, and the lower row comes first.
struct Key {
  unsigned long long value;
  uint32_t row;
};

__device__ __forceinline__ Key key_of(double value, int64_t row) {
  return {static_cast<unsigned long long>(__double_as_longlong(value)), ~static_cast<uint32_t>(row)};
}

// Digit `level` from the top; digits 0 .. 4 are of the value, 5 of both, 6 and 7 of the row.
__device__ __forceinline__ int digit_of(const Key& key, int level) {
  if (level < 5) return static_cast<int>(key.value >> (64 - kDigitBits * (level + 1)) & (kDigits - 1));
  if (level == 5) return static_cast<int>((key.value & 15) << 8 | key.row >> 24);
  return static_cast<int>(key.row >> (kDigitBits * (7 - level)) & (kDigits - 1));
}

// The key with all but its first `digits` digits zero.
__device__ __forceinline__ Key first_digits(Key key, int digits) {
  const int bits = kDigitBits * digits;
  if (bits < 64) key.value = bits == 0 ? 0 : key.value >> (64 - bits) << (64 - bits);
  const int row_bits = bits - 64;
  key.row = row_bits <= 0 ? 0 : row_bits >= 32 ? key.row : key.row >> (32 - row_bits) << (32 - row_bits);
  return key;
}

__device__ __forceinline__ bool above(const Key& a, const Key& b) { return a.value > b.value || (a.value == b.value && a.row > b.row); }
__device__ __forceinline__ bool equal(const Key& a, const Key& b) { return a.value == b.value && a.row == b.row; }

// ---- What the device knows of a run
// -------------------------------------------------------------------------------------------------------------------

struct Progress {
  int64_t picked;  // of the run's count
  int64_t done;
};

struct Run {
  int64_t count;        // picks wanted
  int32_t fixed_batch;  // 0: as many candidates as paid off
  int32_t batch;
  // the threshold: candidates are the rows whose first `digits` digits are above it
  Key threshold;
  int32_t digits;
  int32_t candidates_above;  // the threshold
  int32_t found;             // the threshold is where it should be
  int32_t num_candidates;
  double excluded;  // the best of the others
  int32_t excluded_row;
  int32_t num_edges;
  int32_t num_picks;        // of this pass
  uint32_t blocks_counted;  // of the kernel that runs
};

struct CoresetMemory {
  Run* run;
  int32_t* histogram;      // [kDigits]
  double* block_excluded;  // [kMostSelectBlocks]
  int32_t* block_rows;     // [kMostSelectBlocks]
  int32_t* candidates;     // [kMostCandidates] rows
  double* keys;            // [kMostCandidates]
  int32_t* picks;          // [kMostCandidates] rows
  Edge* edges;             // [kMostEdges]
  CodeRows gathered;       // of the candidates, then of the picks
};

CoresetMemory coreset_memory(int64_t dim, Pieces* pieces) {
  CoresetMemory memory;
  memory.run = pieces->take<Run>(1);
  memory.histogram = pieces->take<int32_t>(kDigits);
  memory.block_excluded = pieces->take<double>(kMostSelectBlocks);
  memory.block_rows = pieces->take<int32_t>(kMostSelectBlocks);
  memory.candidates = pieces->take<int32_t>(kMostCandidates);
  memory.keys = pieces->take<double>(kMostCandidates);
  memory.picks = pieces->take<int32_t>(kMostCandidates);
  memory.edges = pieces->take<Edge>(kMostEdges);
  memory.gathered = code_rows_at(kMostCandidates, full_depth(dim), pieces);
  return memory;
}

// True in the last block of a launch to get here, for all its threads: what the others wrote before is then visible.
__device__ __forceinline__ bool is_last_block(uint32_t* blocks_counted, int32_t* shared_flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    // Before the count: what the block's other threads wrote before the barrier. Behind it: what other blocks wrote.
    __threadfence();
    const bool last = atomicAdd(blocks_counted, 1u) == gridDim.x - 1;
    __threadfence();
    if (last) *blocks_counted = 0;  // for the next launch
    *shared_flag = last;
  }
  __syncthreads();
  if (*shared_flag == 0) return false;
  __threadfence();
  return true;
}

// ---- Candidates
// ---------------------------------------------------------------------------------------------------------------------------------------

// Level 0 .. 7: counts the next digit of the rows that agree with the threshold so far; the last block chooses the digit. Ends when at least half a
// batch lies above, or all that is left fits.
__global__ void __launch_bounds__(kSelectThreads)
    count_digits_kernel(const double* values, int64_t count, int level, Run* run, int32_t* histogram, const Progress* progress) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  int32_t* counts = reinterpret_cast<int32_t*>(shared);  // [kDigits]
  int32_t* sums = counts + kDigits;                      // [kSelectThreads]
  int32_t* flag = sums + kSelectThreads;
  if (progress->done != 0 || (level > 0 && run->found != 0)) return;
  const int thread = static_cast<int>(threadIdx.x);
  const Key threshold = level == 0 ? Key{0, 0} : run->threshold;
  for (int i = thread; i < kDigits; i += kSelectThreads) counts[i] = 0;
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kSelectThreads + thread; row < count; row += stride) {
    if (values[row] < 0) continue;  // picked
    const Key key = key_of(values[row], row);
    if (equal(first_digits(key, level), threshold)) atomicAdd(&counts[digit_of(key, level)], 1);
  }
  __syncthreads();
  for (int i = thread; i < kDigits; i += kSelectThreads) {
    if (counts[i] != 0) atomicAdd(&histogram[i], counts[i]);
  }
  if (!is_last_block(&run->blocks_counted, flag)) return;
  constexpr int kEach = kDigits / kSelectThreads;
  int32_t sum = 0;
  for (int i = 0; i < kEach; ++i) {
    counts[thread * kEach + i] = histogram[thread * kEach + i];
    histogram[thread * kEach + i] = 0;  // for the next launch
    sum += counts[thread * kEach + i];
  }
  sums[thread] = sum;
  __syncthreads();
  if (thread != 0) return;
  const int32_t batch = run->batch;
  int32_t higher = level == 0 ? 0 : run->candidates_above;
  int group = kSelectThreads - 1;
  while (group >= 0 && higher + sums[group] <= batch) higher += sums[group--];
  int digit = group < 0 ? -1 : (group + 1) * kEach - 1;
  while (digit >= 0 && higher + counts[digit] <= batch) higher += counts[digit--];
  // digit: the first, from the top, that would be too many; -1: all that agree with the threshold fit.
  run->candidates_above = higher;
  run->digits = level + 1;
  run->found = digit < 0 || 2 * higher >= batch;
  Key next = threshold;
  if (digit < 0) {  // then level is 0: at a later level, those that agree were too many. All rows are candidates.
    run->digits = 0;
  } else if (level < 5) {
    next.value |= static_cast<unsigned long long>(digit) << (64 - kDigitBits * (level + 1));
  } else if (level == 5) {
    next.value |= static_cast<unsigned long long>(digit) >> 8;
    next.row |= static_cast<uint32_t>(digit) << 24;
  } else {
    next.row |= static_cast<uint32_t>(digit) << (kDigitBits * (7 - level));
  }
  run->threshold = next;
}

// Lists the candidates, in any order, and finds the best row that is none.
__global__ void __launch_bounds__(kSelectThreads)
    collect_kernel(const double* values, int64_t count, const CoresetMemory memory, const Progress* progress) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  double* best = reinterpret_cast<double*>(shared);                       // [kSelectThreads]
  int32_t* best_row = reinterpret_cast<int32_t*>(best + kSelectThreads);  // [kSelectThreads]
  int32_t* flag = best_row + kSelectThreads;
  if (progress->done != 0) return;
  Run* run = memory.run;
  const int thread = static_cast<int>(threadIdx.x), digits = run->digits;
  const Key threshold = run->threshold;
  double excluded = kPicked;
  int32_t excluded_row = kNoRow;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kSelectThreads + thread; row < count; row += stride) {
    const double value = values[row];
    if (value < 0) continue;
    if (digits == 0 || above(first_digits(key_of(value, row), digits), threshold)) {
      const int32_t at = atomicAdd(&run->num_candidates, 1);
      memory.candidates[at] = static_cast<int32_t>(row);
      memory.keys[at] = value;
    } else if (picked_before(value, static_cast<int32_t>(row), excluded, excluded_row)) {
      excluded = value;
      excluded_row = static_cast<int32_t>(row);
    }
  }
  const auto reduce = [&] {
    best[thread] = excluded;
    best_row[thread] = excluded_row;
    for (int width = kSelectThreads / 2; width > 0; width /= 2) {
      __syncthreads();
      if (thread < width && picked_before(best[thread + width], best_row[thread + width], best[thread], best_row[thread])) {
        best[thread] = best[thread + width];
        best_row[thread] = best_row[thread + width];
      }
    }
    __syncthreads();
  };
  reduce();
  if (thread == 0) {
    memory.block_excluded[blockIdx.x] = best[0];
    memory.block_rows[blockIdx.x] = best_row[0];
  }
  if (!is_last_block(&run->blocks_counted, flag)) return;
  excluded = kPicked;
  excluded_row = kNoRow;
  for (int i = thread; i < static_cast<int>(gridDim.x); i += kSelectThreads) {
    if (picked_before(memory.block_excluded[i], memory.block_rows[i], excluded, excluded_row)) {
      excluded = memory.block_excluded[i];
      excluded_row = memory.block_rows[i];
    }
  }
  __syncthreads();  // before best is used again
  reduce();
  if (thread != 0) return;
  run->excluded = best[0];
  run->excluded_row = best_row[0];
}

// Copies the codes of listed rows, and pads the last tile. A warp a row.
__global__ void __launch_bounds__(kThreads) gather_kernel(const CodeRows codes, const int32_t* listed, const int32_t* count, const CodeRows out) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_of_thread();
  const int64_t listed_count = *count;
  if (listed_count == 0 || place >= (listed_count + 127) / 128 * 128) return;
  const bool padding = place >= listed_count;
  const int64_t row = padding ? 0 : listed[place];
  for (int64_t j = lane_of_thread() * 16; j < out.depth; j += kWarp * 16) {
    const int4 word = padding ? int4{0, 0, 0, 0} : *reinterpret_cast<const int4*>(codes.codes + row * codes.depth + j);
    *reinterpret_cast<int4*>(out.codes + place * out.depth + j) = word;
  }
  if (lane_of_thread() == 0) store_row(out, place, padding ? 0 : codes.norms[row], padding ? 0.0f : codes.residuals[row], padding);
}

// ---- Edges and the chain
// --------------------------------------------------------------------------------------------------------------------------------

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

// ---- The update
// -----------------------------------------------------------------------------------------------------------------------------------------

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

__global__ void __launch_bounds__(kSelectThreads) check_state_kernel(double* values, int64_t count, unsigned long long* report) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x;
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

// ---- Host side
// ----------------------------------------------------------------------------------------------------------------------------------------

struct CoresetCodes {
  Scales* scales;
  CodeRows rows;
};

CoresetCodes coreset_codes_at(int64_t count, int64_t dim, const void* codes) {
  Pieces pieces(const_cast<void*>(codes));
  Scales* scales = pieces.take<Scales>(1);
  return {scales, code_rows_at(count, full_depth(dim), &pieces)};
}

// Rows as either side of the filter: by all coordinates, at once.
FilterSide side_of(const CodeRows& codes, const Rows& rows, const int32_t* order) { return {codes, CodeRows{}, rows, order}; }

FilterArguments arguments_of(const FilterSide& a, const FilterSide& b, const Scales* scales, int tiles_per_split) {
  FilterArguments arguments = {};
  arguments.a = a;
  arguments.b = b;
  arguments.first_per_unit = arguments.full_per_unit = &scales->full.per_unit;
  arguments.slack = canonical_slack(a.rows.dim);
  arguments.tiles_per_split = tiles_per_split;
  return arguments;
}

cudaError_t gather(const CodeRows& codes, const int32_t* listed, const int32_t* count, const CodeRows& out, cudaStream_t stream) {
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(out.tile_residuals, 0, kMostCandidates / 128 * sizeof(float), stream));
  PATCHCORE_LAUNCH((gather_kernel), dim3(kMostCandidates / (kThreads / kWarp)), dim3(kThreads), 0, stream, codes, listed, count, out);
  return cudaGetLastError();
}

// Calls use(Scan<depth>{}) with the depth at compile time where rows have one that projections usually give.
template <class F>
cudaError_t with_depth(int64_t depth, F&& use) {
  return depth == 64 ? use(Scan<64>{}) : depth == 128 ? use(Scan<128>{}) : use(Scan<0>{});
}

cudaError_t update(const FilterArguments& arguments, double* values, cudaStream_t stream) {
  return with_depth(arguments.a.first.depth, [&](auto scan) {
    using S = decltype(scan);
    constexpr int kBytes = filter_shared_bytes<S>();
    PATCHCORE_CUDA_TRY(cudaFuncSetAttribute(update_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    const dim3 grid(static_cast<unsigned>(blocks_of(arguments.count_a, kTileRows)));
    PATCHCORE_LAUNCH((update_kernel<S>), grid, dim3(kThreads), kBytes, stream, arguments, UpdatePolicy{values});
    return cudaGetLastError();
  });
}

// Lists the pairs of candidates that are near each other.
cudaError_t find_edges(const FilterArguments& arguments, const EdgePolicy& policy, const Progress* progress, cudaStream_t stream) {
  return with_depth(arguments.a.first.depth, [&](auto scan) {
    using S = decltype(scan);
    constexpr int kBytes = filter_shared_bytes<S>(), kTiles = kMostCandidates / kTileRows;
    PATCHCORE_CUDA_TRY(cudaFuncSetAttribute(edges_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    const dim3 grid(kTiles, static_cast<unsigned>(kTiles / arguments.tiles_per_split));
    PATCHCORE_LAUNCH((edges_kernel<S>), grid, dim3(kThreads), kBytes, stream, arguments, policy, progress);
    return cudaGetLastError();
  });
}

// Lowers all rows by the picks of the pass.
cudaError_t lower_by_picks(const Rows& rows, const CoresetCodes& codes, const CoresetMemory& memory, double* values, cudaStream_t stream) {
  PATCHCORE_CUDA_TRY(gather(codes.rows, memory.picks, &memory.run->num_picks, memory.gathered, stream));
  FilterArguments arguments =
      arguments_of(side_of(codes.rows, rows, nullptr), side_of(memory.gathered, rows, memory.picks), codes.scales, kMostCandidates / kTileColumns);
  arguments.count_a = rows.count;
  arguments.device_count_b = &memory.run->num_picks;
  return update(arguments, values, stream);
}

cudaError_t run_pass(const Rows& rows, const CoresetCodes& codes, const CoresetMemory& memory, double* values, int64_t* indices,
                     double* squared_distances, Progress* progress, cudaStream_t stream) {
  const int64_t blocks = blocks_of(rows.count, 4 * kSelectThreads);
  const dim3 grid(static_cast<unsigned>(blocks < kMostSelectBlocks ? blocks : kMostSelectBlocks));
  for (int level = 0; level < kLevels; ++level) {
    PATCHCORE_LAUNCH((count_digits_kernel), grid, dim3(kSelectThreads), (kDigits + kSelectThreads) * 4 + 16, stream, values, rows.count, level,
                     memory.run, memory.histogram, progress);
    PATCHCORE_CUDA_TRY(cudaGetLastError());
  }
  PATCHCORE_LAUNCH((collect_kernel), grid, dim3(kSelectThreads), kSelectThreads * 12 + 16, stream, values, rows.count, memory, progress);
  PATCHCORE_CUDA_TRY(cudaGetLastError());
  PATCHCORE_CUDA_TRY(gather(codes.rows, memory.candidates, &memory.run->num_candidates, memory.gathered, stream));
  const FilterSide side = side_of(memory.gathered, rows, memory.candidates);
  FilterArguments arguments = arguments_of(side, side, codes.scales, 4);
  arguments.device_count_a = arguments.device_count_b = &memory.run->num_candidates;
  PATCHCORE_CUDA_TRY(find_edges(arguments, {memory.keys, memory.candidates, memory.run, memory.edges}, progress, stream));
  PATCHCORE_CUDA_TRY(cudaFuncSetAttribute(chain_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, chain_bytes(kMostCandidates)));
  PATCHCORE_LAUNCH((chain_kernel), dim3(1), dim3(kChainThreads), chain_bytes(kMostCandidates), stream, memory, values, indices, squared_distances,
                   progress);
  PATCHCORE_CUDA_TRY(cudaGetLastError());
  return lower_by_picks(rows, codes, memory, values, stream);
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

cudaError_t update_by_all(const Rows& rows, const Rows& centers, const int32_t* center, double* values, int32_t* flags, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(blocks_of(rows.count, kThreads / kWarp)));
  PATCHCORE_LAUNCH((update_by_all_kernel), grid, dim3(kThreads), 0, stream, rows, centers, center, values, flags);
  return cudaGetLastError();
}

}  // namespace

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
    PATCHCORE_CUDA_TRY(update(arguments, min_squared_distances + begin, stream));
  }
  return cudaSuccess;
}

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
  PATCHCORE_LAUNCH((check_state_kernel), dim3(static_cast<unsigned>(blocks_of(count, kSelectThreads))), dim3(kSelectThreads), 0, stream,
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
