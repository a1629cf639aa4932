// Where a search begins: a near bank row of each query by codes, and the distances of the run of k places around it, whose largest is a bound.
#include "nearest.cuh"
#include "sorted_list.cuh"

namespace patchcore::cuda {

namespace {

constexpr int kSparseSeeds = 4;  // without seed codes, one tile in so many is scanned for a near row

__device__ __forceinline__ unsigned long long near_code(int sum, int64_t place) {
  return static_cast<unsigned long long>(static_cast<uint32_t>(sum) ^ 0x80000000u) << 32 | static_cast<uint32_t>(place);
}

// The bank row with the largest a . b - n_b / 2 by codes, that is the nearest one, in each share of the bank; nearly so: of a sum its last four bits
// give way to the number of the thread's column, so that one maximum a pair finds both.
template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    near_codes_kernel(const ScanOperands operands, int64_t num_places, int64_t chunk, int tiles_per_split, int tile_step, const Evidence evidence,
                      unsigned long long* near_codes) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  static_assert(S::kColumnSteps * 2 == 16);
  if (evidence.speaks_against()) return;
  auto* best = reinterpret_cast<unsigned long long*>(shared + S::kSharedBytes);  // [kTileRows]
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows;
  TileRange range = share_of_block(num_places, tiles_per_split);
  range = {range.first, (range.count + tile_step - 1) / tile_step, tile_step};
  if (threadIdx.x < kTileRows) best[threadIdx.x] = 0;
  int most[S::kRowSteps][2], tile_of_most[S::kRowSteps][2];
#pragma unroll
  for (int m = 0; m < S::kRowSteps; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      most[m][h] = INT32_MIN;
      tile_of_most[m][h] = range.first;
    }
  scan_tiles<S>(operands, shared, range, [&](const typename S::Sums& sums, int tile) {
#pragma unroll
    for (int m = 0; m < S::kRowSteps; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int largest = INT32_MIN;
#pragma unroll
        for (int n = 0; n < S::kColumnSteps; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int sum = (sums[m][n][h * 2 + e] & ~15) | (n * 2 + e);
            largest = sum > largest ? sum : largest;
          }
        tile_of_most[m][h] = largest > most[m][h] ? tile : tile_of_most[m][h];
        most[m][h] = largest > most[m][h] ? largest : most[m][h];
      }
  });
  __syncthreads();  // best is zero, whether or not there was a tile
#pragma unroll
  for (int m = 0; m < S::kRowSteps; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = S::column_of((most[m][h] & 15) / 2, most[m][h] & 1);
      atomicMax(&best[S::row_of(m, h)], near_code(most[m][h] & ~15, static_cast<int64_t>(tile_of_most[m][h]) * kTileColumns + column));
    }
  __syncthreads();
  if (threadIdx.x < kTileRows) near_codes[blockIdx.y * chunk + first_row + threadIdx.x] = best[threadIdx.x];
}

// The distances of the k places around each query's seed, sorted. A warp a query.
__global__ void __launch_bounds__(kThreads)
    seed_runs_kernel(const Rows queries, const int32_t* map, int64_t count, const Rows bank, const int32_t* order, int64_t k, int64_t splits,
                     const Evidence evidence, const SearchMemory memory) {
  if (evidence.speaks_against()) return;
  const int64_t query = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_of_thread();
  if (query >= count) return;  // a whole warp
  const int lane = lane_of_thread(), half = lane / kLanes;
  unsigned long long best = lane < splits ? memory.near_codes[lane * memory.chunk + query] : 0;
  for (int width = kWarp / 2; width > 0; width /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAllLanes, best, width);
    best = other > best ? other : best;
  }
  int64_t begin = static_cast<int64_t>(best & 0xffffffffu) - k / 2;
  begin = begin + k > bank.count ? bank.count - k : begin;
  begin = begin < 0 ? 0 : begin;
  double* distances = memory.list_distances + query * k;
  int32_t* rows = memory.list_rows + query * k;
  for (int64_t i = lane; i < k; i += kWarp) {
    distances[i] = INFINITY;
    rows[i] = kNoRow;
  }
  __syncwarp();
  const int64_t row = map == nullptr ? query : map[query];
  for (int64_t i = 0; i < k; i += 2) {
    const int64_t place = begin + (half == 1 && i + 1 < k ? i + 1 : i);
    const int32_t bank_row = order == nullptr ? static_cast<int32_t>(place) : order[place];
    const double distance = half_warp_distance(queries, row, bank, bank_row);
    for (int h = 0; h < 2 && i + h < k; ++h) {
      const double offered = __shfl_sync(kAllLanes, distance, h * kLanes);
      const int32_t offered_row = __shfl_sync(kAllLanes, bank_row, h * kLanes);
      if (nearer(offered, offered_row, distances[k - 1], rows[k - 1])) {
        __syncwarp();  // all have read the last one
        insert(distances, rows, k, offered, offered_row);
      }
    }
  }
  if (lane != 0) return;
  memory.seed_begin[query] = static_cast<int32_t>(begin);
  memory.seed_keys[query] = distances[k - 1];
  memory.seed_rows[query] = rows[k - 1];
}

template <class S>
cudaError_t find_near_codes(const CodeRows& queries, const CodeRows& bank, int64_t count, int64_t places, int tile_step, const Evidence& evidence,
                            const Split& split, const SearchMemory& memory, cudaStream_t stream) {
  constexpr int kBytes = S::kSharedBytes + kTileRows * 8;
  PATCHCORE_CUDA_TRY(allow_shared(near_codes_kernel<S>, kBytes));
  const ScanOperands operands = {queries.codes, bank.codes, bank.starts, bank.depth};
  const dim3 grid(static_cast<unsigned>(blocks_of(count, kTileRows)), static_cast<unsigned>(split.splits));
  PATCHCORE_LAUNCH((near_codes_kernel<S>), grid, dim3(kThreads), kBytes, stream, operands, places, memory.chunk, split.tiles_per_split, tile_step,
                   evidence, memory.near_codes);
  return cudaGetLastError();
}

}  // namespace

cudaError_t find_seeds(const Rows& queries, const int32_t* map, int64_t count, const Bank& bank, int64_t k, const Split& split, bool by_seed_codes,
                       const Evidence& evidence, const SearchMemory& memory, cudaStream_t stream) {
  const int64_t places = bank.rows.count;
  PATCHCORE_CUDA_TRY(by_seed_codes ? find_near_codes<Scan<kSeedDepth>>(memory.seed, bank.seed, count, places, 1, evidence, split, memory, stream)
                     : bank.full.depth == 64
                         ? find_near_codes<Scan<64>>(memory.full, bank.full, count, places, kSparseSeeds, evidence, split, memory, stream)
                         : find_near_codes<Scan<0>>(memory.full, bank.full, count, places, kSparseSeeds, evidence, split, memory, stream));
  PATCHCORE_LAUNCH((seed_runs_kernel), dim3(static_cast<unsigned>(blocks_of(count, kThreads / kWarp))), dim3(kThreads), 0, stream, queries, map,
                   count, bank.rows, bank.order, k, split.splits, evidence, memory);
  return cudaGetLastError();
}

}  // namespace patchcore::cuda
