// Exact nearest neighbours. A search is: encode the queries; find a near bank row of each by the seed codes; know the distances of the k places
// around it, whose largest is a bound; filter the bank by the prefix, or where the prefix is of no use by all coordinates; merge.
#include "nearest.cuh"
#include "sorted_list.cuh"

namespace patchcore::cuda {

namespace {

constexpr int kMostSplits = kWarp - 1;  // a lane of the merge takes a list, one is the seeds'
constexpr int64_t kMostListBytes = int64_t{256} << 20;
constexpr int64_t kMostQueries = 32768;  // at a time
constexpr int kTrialBlocks = 8, kTrialTiles = 8;
constexpr int kPrefixPays = 32;  // the prefix is used when it leaves at most one pair in so many: a survivor costs about as much as so many products

// ---- The filter -----------------------------------------------------------------------------------------------------------------------------------

// filter.cuh's policy of a search. The list of a query and share begins empty; the seeds' run is a list of its own, whose last entry bounds them all.
struct NearestPolicy {
  static constexpr bool kStrict = false;  // a row as near as the last one comes first if its index is lower
  int64_t k;
  const int32_t* seed_begin;
  const double* seed_keys;
  const int32_t* seed_rows;
  double* distances;  // [shares, chunk, k]
  int32_t* rows;
  int64_t share_stride;  // chunk * k

  __device__ double key(int64_t query) const { return seed_keys[query]; }
  __device__ bool wants(int64_t query, int64_t place) const { return place < seed_begin[query] || place >= seed_begin[query] + k; }
  __device__ double offer(int64_t query, double, int32_t, int32_t row, double distance) const {
    double* list = distances + blockIdx.y * share_stride + query * k;
    int32_t* list_rows = rows + blockIdx.y * share_stride + query * k;
    double last = list[k - 1], bound = seed_keys[query];
    int32_t last_row = list_rows[k - 1];
    const int32_t bound_row = seed_rows[query];
    if (nearer(distance, row, last, last_row) && nearer(distance, row, bound, bound_row)) {
      __syncwarp();  // all have read the last one
      insert(list, list_rows, k, distance, row);
      last = list[k - 1];
    }
    return last < bound ? last : bound;
  }
};

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    nearest_kernel(const __grid_constant__ FilterArguments p, const __grid_constant__ NearestPolicy policy) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  if (p.evidence.speaks_against()) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileRows * policy.k, all = p.count_a * policy.k;
  const int64_t end = first + kTileRows * policy.k < all ? first + kTileRows * policy.k : all;
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    policy.distances[blockIdx.y * policy.share_stride + i] = INFINITY;
    policy.rows[blockIdx.y * policy.share_stride + i] = kNoRow;
  }
  filter_block<S>(p, policy, shared);
}

// Tries the prefix on a few tiles: *survivors += the pairs that it leaves.
template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    trial_kernel(const __grid_constant__ FilterArguments p, const __grid_constant__ NearestPolicy policy, const TileRange range,
                 unsigned long long* survivors) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  const RowState state = row_state_at(shared + S::kSharedBytes);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows;
  start_rows(p, p.count_a, policy, state, first_row, largest_residual(p.b.first.tile_residuals, range, state.tile_residual));
  unsigned long long found = 0;
  const ScanOperands operands = {p.a.first.codes, p.b.first.codes, p.b.first.starts, p.a.first.depth};
  scan_tiles<S>(operands, shared, range, [&](const typename S::Sums& sums, int) {
    mark_survivors<S>(sums, state, 0);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kTileWords; i += kThreads) {
      uint32_t& word = state.survivors[i / kTileWords * kGroupWords + i % kTileWords];
      found += static_cast<unsigned long long>(__popc(word));
      word = 0;
    }  // marked again after the next chunk's barrier
  });
  found = warp_sum(found);
  if (lane_of_thread() == 0) atomicAdd(survivors, found);
}

// ---- The merge ------------------------------------------------------------------------------------------------------------------------------------

// Merges the sorted lists of each query: a warp a query, lane l holds the head of list l.
__global__ void __launch_bounds__(kThreads)
    merge_kernel(int64_t count, int64_t k, int64_t lists, int64_t list_stride, const double* list_distances, const int32_t* list_rows,
                 const float* residuals, double* squared_distances, int64_t* indices) {
  const int64_t query = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_of_thread();
  if (query >= count) return;
  const int lane = lane_of_thread();
  const bool finite = residuals[query] == residuals[query];
  const double* distances = list_distances + lane * list_stride + query * k;
  const int32_t* rows = list_rows + lane * list_stride + query * k;
  int64_t head = 0;
  const auto read = [&](double* distance, int32_t* row) {
    const bool left = lane < lists && head < k;
    *distance = left ? distances[head] : INFINITY;
    *row = left ? rows[head] : kNoRow;
  };
  double distance;
  int32_t row;
  read(&distance, &row);
  for (int64_t i = 0; i < k; ++i) {
    double best = distance;
    int32_t best_row = row;
    for (int width = kWarp / 2; width > 0; width /= 2) {
      const double other = __shfl_xor_sync(kAllLanes, best, width);
      const int32_t other_row = __shfl_xor_sync(kAllLanes, best_row, width);
      if (nearer(other, other_row, best, best_row)) {
        best = other;
        best_row = other_row;
      }
    }
    const bool found = finite && best_row != kNoRow;
    if (lane == 0) {
      squared_distances[query * k + i] = found ? best : not_a_number();
      indices[query * k + i] = found ? best_row : 0;
    }
    if (found && row == best_row) {  // a bank row is in one list only
      ++head;
      read(&distance, &row);
    }
  }
}

// ---- Host side ------------------------------------------------------------------------------------------------------------------------------------

int64_t multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count;
}

// Shares of the bank: enough that all blocks together fill the device's places, two a multiprocessor, and no more than make the last of their waves
// full.
Split split_bank(int64_t count_a, int64_t places, int64_t most) {
  const int64_t blocks = blocks_of(count_a, kTileRows), tiles = blocks_of(places, kTileColumns);
  const int64_t slots = 2 * multiprocessors();
  most = most < tiles ? most : tiles;
  int64_t wanted = blocks_of(slots, blocks) < most ? blocks_of(slots, blocks) : most;
  for (int64_t splits = wanted + 1; splits <= most && splits <= 8; ++splits) {
    if (blocks_of(blocks * splits, slots) * wanted < blocks_of(blocks * wanted, slots) * splits) wanted = splits;  // waves a share
  }
  const int64_t each = blocks_of(tiles, wanted);
  return {blocks_of(tiles, each), static_cast<int>(each)};
}

template <class S>
cudaError_t filter(const FilterArguments& arguments, const NearestPolicy& policy, const Split& split, cudaStream_t stream) {
  PATCHCORE_CUDA_TRY(allow_shared(nearest_kernel<S>, filter_shared_bytes<S>()));
  const dim3 grid(static_cast<unsigned>(blocks_of(arguments.count_a, kTileRows)), static_cast<unsigned>(split.splits));
  PATCHCORE_LAUNCH((nearest_kernel<S>), grid, dim3(kThreads), filter_shared_bytes<S>(), stream, arguments, policy);
  return cudaGetLastError();
}

cudaError_t filter_by_all(const FilterArguments& arguments, const NearestPolicy& policy, const Split& split, cudaStream_t stream) {
  return arguments.a.first.depth == 64 ? filter<Scan<64>>(arguments, policy, split, stream) : filter<Scan<0>>(arguments, policy, split, stream);
}

// Both filters of a search.
struct Filters {
  FilterArguments by_prefix, by_all;
  NearestPolicy policy;
  Split split;
};

// Tries the prefix: *limit is what it may leave of the pairs tried, memory.survivors what it did.
cudaError_t try_prefix(const Filters& filters, const SearchMemory& memory, unsigned long long* limit, cudaStream_t stream) {
  using S = Scan<kPrefixDepth>;
  const FilterArguments& p = filters.by_prefix;
  const int tiles = static_cast<int>(blocks_of(p.count_b, kTileColumns)), tried = tiles < kTrialTiles ? tiles : kTrialTiles;
  const int64_t all_blocks = blocks_of(p.count_a, kTileRows), blocks = all_blocks < kTrialBlocks ? all_blocks : kTrialBlocks;
  const int64_t rows = p.count_a < blocks * kTileRows ? p.count_a : blocks * kTileRows;
  *limit = static_cast<unsigned long long>(rows * tried * kTileColumns / kPrefixPays);
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(memory.survivors, 0, sizeof(unsigned long long), stream));
  PATCHCORE_CUDA_TRY(allow_shared(trial_kernel<S>, filter_shared_bytes<S>()));
  PATCHCORE_LAUNCH((trial_kernel<S>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), filter_shared_bytes<S>(), stream, p, filters.policy,
                   TileRange{0, tried, tiles / tried}, memory.survivors);
  return cudaGetLastError();
}

// Filters the bank by the prefix, by all coordinates, or by whichever a trial speaks for.
cudaError_t filter_bank(Filters filters, const Rows& queries, const int32_t* map, const Bank& bank, int prefix, const SearchMemory& memory,
                        cudaStream_t stream) {
  const Split& split = filters.split;
  const int64_t count = filters.by_all.count_a, k = filters.policy.k;
  if (!bank.with_prefixes() || prefix < 0) {
    PATCHCORE_CUDA_TRY(find_seeds(queries, map, count, bank, k, split, false, {}, memory, stream));
    return filter_by_all(filters.by_all, filters.policy, split, stream);
  }
  PATCHCORE_CUDA_TRY(find_seeds(queries, map, count, bank, k, split, true, {}, memory, stream));
  if (prefix > 0) return filter<Scan<kPrefixDepth>>(filters.by_prefix, filters.policy, split, stream);
  unsigned long long limit = 0;
  PATCHCORE_CUDA_TRY(try_prefix(filters, memory, &limit, stream));
  filters.by_prefix.evidence = {memory.survivors, limit, true};
  filters.by_all.evidence = {memory.survivors, limit, false};
  PATCHCORE_CUDA_TRY(filter<Scan<kPrefixDepth>>(filters.by_prefix, filters.policy, split, stream));
  // Where the prefix says little, so did the seed codes.
  PATCHCORE_CUDA_TRY(find_seeds(queries, map, count, bank, k, split, false, filters.by_all.evidence, memory, stream));
  return filter_by_all(filters.by_all, filters.policy, split, stream);
}

cudaError_t search_chunk(const Rows& queries, const int32_t* map, int64_t count, const Bank& bank, int64_t k, int prefix, const SearchMemory& memory,
                         double* squared_distances, int64_t* indices, SearchCounters* counters, int32_t* flags, cudaStream_t stream) {
  PATCHCORE_CUDA_TRY(encode_rows(queries, map, count, bank.encoding, memory.steps, memory.full, memory.seed, memory.prefix, flags, stream));
  const int64_t places = bank.rows.count, stride = memory.chunk * k;
  Filters filters = {};
  filters.split = split_bank(count, places, memory.splits);
  filters.policy = {k, memory.seed_begin, memory.seed_keys, memory.seed_rows, memory.list_distances + stride, memory.list_rows + stride, stride};
  FilterArguments& by_all = filters.by_all;
  by_all.a = {memory.full, CodeRows{}, queries, map};
  by_all.b = {bank.full, CodeRows{}, bank.rows, bank.order};
  by_all.first_per_unit = by_all.full_per_unit = &bank.encoding.scales->full.per_unit;
  by_all.count_a = count;
  by_all.count_b = places;
  by_all.slack = canonical_slack(bank.rows.dim);
  by_all.tiles_per_split = filters.split.tiles_per_split;
  by_all.canonical = counters == nullptr ? nullptr : &counters->canonical;
  FilterArguments& by_prefix = filters.by_prefix;
  by_prefix = by_all;
  by_prefix.a.first = memory.prefix;
  by_prefix.a.full = memory.full;
  by_prefix.b.first = bank.prefix;
  by_prefix.b.full = bank.full;
  by_prefix.first_per_unit = &bank.encoding.scales->prefix.per_unit;
  PATCHCORE_CUDA_TRY(filter_bank(filters, queries, map, bank, prefix, memory, stream));
  return merge_lists(count, k, 1 + filters.split.splits, stride, memory.list_distances, memory.list_rows, memory.full.residuals, squared_distances,
                     indices, stream);
}

}  // namespace

cudaError_t merge_lists(int64_t count, int64_t k, int64_t lists, int64_t list_stride, const double* list_distances, const int32_t* list_rows,
                        const float* residuals, double* squared_distances, int64_t* indices, cudaStream_t stream) {
  PATCHCORE_LAUNCH((merge_kernel), dim3(static_cast<unsigned>(blocks_of(count, kThreads / kWarp))), dim3(kThreads), 0, stream, count, k, lists,
                   list_stride, list_distances, list_rows, residuals, squared_distances, indices);
  return cudaGetLastError();
}

SearchMemory search_memory(int64_t num_queries, const Rows& bank, bool with_prefixes, int64_t k, Pieces* pieces) {
  SearchMemory memory = {};
  const int64_t fitting = kMostListBytes / (12 * 2 * k) / kTileRows * kTileRows;  // queries whose lists fit, the seeds' and one share's
  int64_t limit = kMostQueries < fitting ? kMostQueries : fitting;
  limit = limit < kTileRows ? kTileRows : limit;
  const int64_t parts = num_queries > 0 ? blocks_of(num_queries, limit) : 1;
  memory.chunk = padded_rows(blocks_of(num_queries, parts));  // parts of like size: a small last one would leave most of the device idle
  const int64_t most = kMostListBytes / (12 * k * memory.chunk) - 1;
  memory.splits = split_bank(memory.chunk, bank.count, most < 1 ? 1 : most < kMostSplits ? most : kMostSplits).splits;
  memory.full = code_rows_at(memory.chunk, full_depth(bank.dim), pieces);
  if (with_prefixes) {
    memory.steps = step_rows_at(memory.chunk, bank.dim, pieces);
    memory.seed = code_rows_at(memory.chunk, kSeedDepth, pieces);
    memory.prefix = code_rows_at(memory.chunk, kPrefixDepth, pieces);
  }
  memory.near_codes = pieces->take<unsigned long long>(kMostSplits * memory.chunk);
  memory.seed_begin = pieces->take<int32_t>(memory.chunk);
  memory.seed_keys = pieces->take<double>(memory.chunk);
  memory.seed_rows = pieces->take<int32_t>(memory.chunk);
  memory.list_distances = pieces->take<double>((1 + memory.splits) * memory.chunk * k);
  memory.list_rows = pieces->take<int32_t>((1 + memory.splits) * memory.chunk * k);
  memory.survivors = pieces->take<unsigned long long>(1);
  return memory;
}

cudaError_t search(const Rows& queries, const int32_t* map, int64_t count, const Bank& bank, int64_t k, int prefix, const SearchMemory& memory,
                   double* squared_distances, int64_t* indices, SearchCounters* counters, int32_t* flags, cudaStream_t stream) {
  for (int64_t begin = 0; begin < count; begin += memory.chunk) {
    const int64_t now = count - begin < memory.chunk ? count - begin : memory.chunk;
    Rows part = queries;
    if (map == nullptr) {
      const int64_t bytes = queries.type == ScalarType::kFloat32 ? 4 : 2;
      part.data = static_cast<const char*>(queries.data) + begin * queries.stride * bytes;
      part.count = now;
    }
    PATCHCORE_CUDA_TRY(search_chunk(part, map == nullptr ? nullptr : map + begin, now, bank, k, prefix, memory, squared_distances + begin * k,
                                    indices + begin * k, counters, flags, stream));
  }
  return cudaSuccess;
}

int64_t nearest_neighbors_workspace_bytes(const Rows& queries, const Rows& bank, bool is_prepared, bool with_prefixes, int64_t k) {
  Pieces pieces(nullptr);
  if (bank.dim > kMaxFilterDim) {
    all_pairs_memory(queries.count, k, &pieces);
    return pieces.used();
  }
  if (!is_prepared) one_off_at(bank, &pieces);
  search_memory(queries.count, bank, is_prepared && with_prefixes, k, &pieces);
  return pieces.used();
}

cudaError_t nearest_neighbors_cuda(const Rows& queries, const Rows& bank, const void* prepared, bool with_prefixes, int64_t k, int prefix,
                                   void* workspace, double* squared_distances, int64_t* indices, SearchCounters* counters, int32_t* flags,
                                   cudaStream_t stream) {
  if (queries.count == 0) return cudaSuccess;
  Pieces pieces(workspace);
  if (bank.dim > kMaxFilterDim)
    return search_all_pairs(queries, nullptr, queries.count, bank, k, all_pairs_memory(queries.count, k, &pieces), squared_distances, indices, flags,
                            stream);
  Bank known = {};
  if (prepared != nullptr) {
    known = prepared_bank_at(bank, with_prefixes, prepared);
  } else {
    const OneOff memory = one_off_at(bank, &pieces);
    PATCHCORE_CUDA_TRY(encode_one_off(bank, memory, flags, stream));
    known = memory.bank;
  }
  const SearchMemory memory = search_memory(queries.count, bank, known.with_prefixes(), k, &pieces);
  return search(queries, nullptr, queries.count, known, k, prefix, memory, squared_distances, indices, counters, flags, stream);
}

}  // namespace patchcore::cuda
