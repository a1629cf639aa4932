// The certified filter: which pairs of rows of A and rows of B can a decision depend on? (filter.h has the proofs of all bounds.)
//
// A block scans the tiles of its share of B for its 128 rows of A (tile_scan.cuh). A pair whose integer product reaches its row's floor survives, as
// a bit in shared memory: a fixed size, so nothing can overflow. Every kGroup tiles, and at the end, the survivors are looked at: a warp owns 16 rows
// and puts their survivors into a queue, to look at many of them at once: memory answers late, and one after the other would wait for it each time.
// Where the first comparison was by a prefix, the codes of all coordinates are compared next; what is left gets its canonical distance, and the
// policy decides. A row's state has one owner at any time, so there are no atomics on distances, and results do not depend on the order of blocks,
// warps or tiles.
//
// A policy is what the survivors are for:
//   kStrict                                   whether only smaller distances count (update_reach) or equal ones too (search_reach)
//   key(row)                                  the squared distance to beat; negative: the row wants nothing; infinity: everything survives
//   wants(row, place)                         whether a pair is worth a look at all
//   offer(row, key, place, other, distance)   takes a pair with its canonical distance, in all 32 lanes; returns the row's new key
#pragma once

#include "codes.cuh"
#include "tile_scan.cuh"

namespace patchcore::cuda {

constexpr int kGroup = 4;                         // tiles between two looks at the survivors
constexpr int kTileWords = kTileColumns / 32;     // words of survivor bits of a row and tile
constexpr int kGroupWords = kGroup * kTileWords;  // at most 32: a lane reads a word
static_assert(kGroupWords <= kWarp && (kGroup & (kGroup - 1)) == 0);

// One side of the comparison: codes that are scanned, and where there are others, those that are looked up.
struct FilterSide {
  CodeRows first;
  CodeRows full;  // depth 0: `first` are all coordinates
  Rows rows;
  const int32_t* order;  // the row of `rows` behind each row of codes; null: the same
  __device__ int32_t row_of(int64_t place) const { return order == nullptr ? static_cast<int32_t>(place) : order[place]; }
};

// A plan is tried before it is used: the kernel of a plan runs only if the evidence speaks for it.
struct Evidence {
  const unsigned long long* survivors;  // null: run
  unsigned long long limit;
  bool below;  // run when survivors <= limit, or when they are more
  __device__ bool speaks_against() const { return survivors != nullptr && (*survivors <= limit) != below; }
};

struct FilterArguments {
  FilterSide a, b;
  const double* first_per_unit;  // S of the first codes
  const double* full_per_unit;   // S of the full codes
  int64_t count_a, count_b;
  const int32_t* device_count_a;  // where the counts are known on the device only; null: as above
  const int32_t* device_count_b;
  double slack;
  int tiles_per_split;
  Evidence evidence;
  unsigned long long* canonical;  // counts canonical distances, for tests and benchmarks; may be null
};

constexpr int kQueue = 64;  // survivors that a warp looks at together

// Shared memory of the filter behind that of the scan.
struct RowState {
  double* keys;         // [kTileRows]
  int32_t* floors;      // [kTileRows]
  uint32_t* survivors;  // [kTileRows, kGroupWords]
  uint16_t* queues;     // [warps, kQueue]
  int32_t* any;
  float* tile_residual;  // the largest residual of the block's share of B
};

constexpr int kRowStateBytes = kTileRows * (8 + 4 + 4 * kGroupWords) + kThreads / kWarp * kQueue * 2 + 16;

__device__ __forceinline__ RowState row_state_at(char* shared) {
  RowState state;
  state.keys = reinterpret_cast<double*>(shared);
  state.floors = reinterpret_cast<int32_t*>(state.keys + kTileRows);
  state.survivors = reinterpret_cast<uint32_t*>(state.floors + kTileRows);
  state.queues = reinterpret_cast<uint16_t*>(state.survivors + kTileRows * kGroupWords);
  state.any = reinterpret_cast<int32_t*>(state.queues + kThreads / kWarp * kQueue);
  state.tile_residual = reinterpret_cast<float*>(state.any + 1);
  return state;
}

template <class S>
constexpr int filter_shared_bytes() {
  return S::kSharedBytes + kRowStateBytes;
}

template <bool kStrict>
__device__ __forceinline__ double reach_of(double key, float residual, double per_unit, double slack) {
  return kStrict ? update_reach(key, 0, residual, per_unit, slack) : search_reach(key, 0, residual, per_unit, slack);
}

template <bool kStrict>
__device__ __forceinline__ int32_t floor_of(double key, float residual, int32_t norm, float tile_residual, double per_unit, double slack) {
  return int8_floor(norm, int8_skip_limit(reach_of<kStrict>(key, residual, per_unit, slack), tile_residual));
}

// The dot product of two rows of codes, of a depth that is a multiple of 64, by four lanes, 16 bytes at a time; all four get it. All 32 lanes call.
constexpr int kLanesOfDot = 4;
__device__ __forceinline__ int32_t quarter_dot(const int8_t* a, const int8_t* b, int64_t depth) {
  int32_t dot = 0;
#pragma unroll 4
  for (int64_t j = lane_of_thread() % kLanesOfDot * 16; j < depth; j += kLanesOfDot * 16) {
    const int4 x = *reinterpret_cast<const int4*>(a + j), y = *reinterpret_cast<const int4*>(b + j);
    dot = __dp4a(x.x, y.x, dot);
    dot = __dp4a(x.y, y.y, dot);
    dot = __dp4a(x.z, y.z, dot);
    dot = __dp4a(x.w, y.w, dot);
  }
  for (int width = kLanesOfDot / 2; width > 0; width /= 2) dot += __shfl_xor_sync(kAllLanes, dot, width, kLanesOfDot);
  return dot;
}

// A survivor on its way through a warp: its row among the warp's, and its place in the group of tiles.
constexpr int kRowsOfWarp = kTileRows / (kThreads / kWarp);
static_assert(kRowsOfWarp * kGroup * kTileColumns <= 1 << 16 && kGroupWords <= kQueue / 2);

struct Survivor {
  int r;          // row of the block
  int64_t row;    // of A
  int64_t place;  // of B
  __device__ Survivor(uint16_t entry, int tile)
      : r(entry / (kGroup * kTileColumns) * (kThreads / kWarp) + warp_of_thread()),
        row(static_cast<int64_t>(blockIdx.x) * kTileRows + r),
        place(static_cast<int64_t>(tile) * kTileColumns + entry % (kGroup * kTileColumns)) {}
};

// Keeps queue[0 .. count) where keep(survivor) says so, in their order; returns how many are left. kWidth lanes ask about the same one; all 32 call.
template <int kWidth, class Keep>
__device__ __forceinline__ int keep_survivors(uint16_t* queue, int count, int tile, Keep&& keep) {
  const int lane = lane_of_thread();
  int kept = 0;
  for (int begin = 0; begin < count; begin += kWarp / kWidth) {
    const int at = begin + lane / kWidth;
    const uint16_t entry = queue[at < count ? at : begin];
    const bool alive = keep(Survivor(entry, tile)) && at < count && lane % kWidth == 0;
    const uint32_t votes = __ballot_sync(kAllLanes, alive);
    __syncwarp();  // all have read
    if (alive) queue[kept + __popc(votes & ((1u << lane) - 1))] = entry;
    kept += __popc(votes);
    __syncwarp();
  }
  return kept;
}

// Looks at queue[0 .. count): first whether the policy wants them, 32 at a time, then at all their codes, eight at a time, then at the distances.
template <class Policy>
__device__ __forceinline__ void look_at_queue(const FilterArguments& p, const Policy& policy, const RowState& state, uint16_t* queue, int count,
                                              int tile) {
  __syncwarp();  // the queue is written
  count = keep_survivors<1>(queue, count, tile, [&](const Survivor& s) { return policy.wants(s.row, s.place); });
  if (p.a.full.depth > 0) {
    count = keep_survivors<kLanesOfDot>(queue, count, tile, [&](const Survivor& s) {
      const int32_t dot = quarter_dot(p.a.full.codes + s.row * p.a.full.depth, p.b.full.codes + s.place * p.b.full.depth, p.a.full.depth);
      const double reach = reach_of<Policy::kStrict>(state.keys[s.r], p.a.full.residuals[s.row], *p.full_per_unit, p.slack);
      return int8_survives(p.a.full.norms[s.row], p.b.full.norms[s.place], dot, int8_skip_limit(reach, p.b.full.residuals[s.place]));
    });
  }
  const int half = lane_of_thread() / kLanes;
  for (int at = 0; at < count; at += 2) {
    const Survivor own(queue[at + half < count ? at + half : at], tile);
    const int32_t other = p.b.row_of(own.place);
    const double distance = half_warp_distance(p.a.rows, p.a.row_of(own.row), p.b.rows, other);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (at + h >= count) continue;
      const Survivor offered(queue[at + h], tile);
      const double key = policy.offer(offered.row, state.keys[offered.r], static_cast<int32_t>(offered.place),
                                      __shfl_sync(kAllLanes, other, h * kLanes), __shfl_sync(kAllLanes, distance, h * kLanes));
      __syncwarp();  // all have read the key
      if (lane_of_thread() == 0) state.keys[offered.r] = key;
      __syncwarp();
    }
  }
  if (p.canonical != nullptr && lane_of_thread() == 0) atomicAdd(p.canonical, static_cast<unsigned long long>(count));
}

// Looks at the survivors of a group of kGroup tiles, which begins at tile `tile` of B. Not inlined: the sums of the scan are
// dead here, so the call costs nothing and keeps the scan free of spills.
template <class Policy>
__device__ __noinline__ void look_at_survivors(const FilterArguments& p, const Policy& policy, char* shared, int tile) {
  const RowState state = row_state_at(shared);
  const int lane = lane_of_thread();
  uint16_t* queue = state.queues + warp_of_thread() * kQueue;
  // Lane l < 16 watches over the warp's row l.
  const int watched = lane % kRowsOfWarp * (kThreads / kWarp) + warp_of_thread();
  const double key_before = state.keys[watched];
  __syncwarp();
  int count = 0;
  for (int i = 0; i < kRowsOfWarp; ++i) {
    uint32_t* words = state.survivors + (i * (kThreads / kWarp) + warp_of_thread()) * kGroupWords;
    uint32_t own = lane < kGroupWords ? words[lane] : 0;
    if (own != 0) words[lane] = 0;
    for (uint32_t votes; (votes = __ballot_sync(kAllLanes, own != 0)) != 0;) {
      if (own != 0) {
        const int bit = __ffs(static_cast<int>(own)) - 1;
        queue[count + __popc(votes & ((1u << lane) - 1))] = static_cast<uint16_t>(i * kGroup * kTileColumns + lane * 32 + bit);
        own &= own - 1;
      }
      count += __popc(votes);
      if (count <= kQueue - kGroupWords) continue;
      look_at_queue(p, policy, state, queue, count, tile);
      count = 0;
    }
  }
  if (count > 0) look_at_queue(p, policy, state, queue, count, tile);
  const double key = state.keys[watched];
  if (lane >= kRowsOfWarp || key == key_before) return;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTileRows + watched;
  state.floors[watched] =
      floor_of<Policy::kStrict>(key, p.a.first.residuals[row], p.a.first.norms[row], *state.tile_residual, *p.first_per_unit, p.slack);
}

// The block's share of B's tiles.
__device__ __forceinline__ TileRange share_of_block(int64_t count_b, int tiles_per_split) {
  const int tiles = static_cast<int>((count_b + kTileColumns - 1) / kTileColumns), first = static_cast<int>(blockIdx.y) * tiles_per_split;
  const int left = tiles - first;
  return {first, left < 0 ? 0 : left < tiles_per_split ? left : tiles_per_split, 1};
}

// The largest residual of the range's tiles, to all threads; NaN if there is one. By a barrier, with one word of shared memory.
inline __device__ __noinline__ float largest_residual(const float* tile_residuals, const TileRange& range, float* shared) {
  unsigned int* most = reinterpret_cast<unsigned int*>(shared);
  if (threadIdx.x == 0) *most = 0;
  __syncthreads();
  unsigned int own = 0;  // floats that are not negative are ordered like their bits
  for (int t = static_cast<int>(threadIdx.x); t < range.count; t += kThreads) {
    const unsigned int bits = __float_as_uint(tile_residuals[range.first + t * range.step]);
    own = bits > own ? bits : own;
  }
  if (own != 0) atomicMax(most, own);
  __syncthreads();
  return *shared;
}

// Sets up the keys and floors of the block's rows. The caller puts a barrier behind it (the scan's first one will do).
template <class Policy>
__device__ __forceinline__ void start_rows(const FilterArguments& p, int64_t count_a, const Policy& policy, const RowState& state, int64_t first_row,
                                           float tile_residual) {
  for (int r = static_cast<int>(threadIdx.x); r < kTileRows; r += kThreads) {
    const int64_t row = first_row + r;
    const double key = row < count_a ? policy.key(row) : -1.0;
    state.keys[r] = key;
    state.floors[r] = row < count_a
                          ? floor_of<Policy::kStrict>(key, p.a.first.residuals[row], p.a.first.norms[row], tile_residual, *p.first_per_unit, p.slack)
                          : INT32_MAX;
  }
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kGroupWords; i += kThreads) state.survivors[i] = 0;
  if (threadIdx.x != 0) return;
  *state.any = 0;
}

// Sets the survivors' bits of one tile; word: where the tile's words begin in a row's.
template <class S>
__device__ __forceinline__ void mark_survivors(const typename S::Sums& sums, const RowState& state, int word) {
#pragma unroll
  for (int m = 0; m < S::kRowSteps; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = S::row_of(m, h), floor = state.floors[row];
      int most = sums[m][0][h * 2];
#pragma unroll
      for (int n = 0; n < S::kColumnSteps; ++n) {
        most = most > sums[m][n][h * 2] ? most : sums[m][n][h * 2];
        most = most > sums[m][n][h * 2 + 1] ? most : sums[m][n][h * 2 + 1];
      }
      if (most < floor) continue;
#pragma unroll
      for (int w = 0; w < S::kWarpColumns / 32; ++w) {
        uint32_t bits = 0;
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) bits |= sums[m][w * 4 + n][h * 2 + e] >= floor ? 1u << (n * 8 + e) : 0u;
        // column_of(4 w + n, e) % 32 is 8 n + e and the lane's own part
        if (bits != 0)
          atomicOr(&state.survivors[row * kGroupWords + word + warp_of_thread() % S::kWarpsAcross * (S::kWarpColumns / 32) + w],
                   bits << (lane_of_thread() % 4 * 2));
      }
      *state.any = 1;  // all who write write the same
    }
}

// The filter of a block; the policy's state is left as the block's share of B leaves it.
template <class S, class Policy>
__device__ __forceinline__ void filter_block(const FilterArguments& p, const Policy& policy, char* shared) {
  const int64_t count_a = p.device_count_a == nullptr ? p.count_a : *p.device_count_a;
  const int64_t count_b = p.device_count_b == nullptr ? p.count_b : *p.device_count_b;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const TileRange range = share_of_block(count_b, p.tiles_per_split);
  if (first_row >= count_a || range.count == 0) return;  // the whole block
  const RowState state = row_state_at(shared + S::kSharedBytes);
  start_rows(p, count_a, policy, state, first_row, largest_residual(p.b.first.tile_residuals, range, state.tile_residual));
  const ScanOperands operands = {p.a.first.codes, p.b.first.codes, p.b.first.starts, p.a.first.depth};
  const int last = range.first + range.count - 1;
  scan_tiles<S>(operands, shared, range, [&](const typename S::Sums& sums, int tile) {
    const int place = tile & (kGroup - 1);  // in the group
    mark_survivors<S>(sums, state, place * kTileWords);
    if (place != kGroup - 1 && tile != last) return;
    __syncthreads();              // all bits of the group are set
    if (*state.any == 0) return;  // in all threads alike
    look_at_survivors(p, policy, shared + S::kSharedBytes, tile - place);
    __syncthreads();                       // floors are lowered and bits cleared; everybody has read `any`
    if (threadIdx.x == 0) *state.any = 0;  // written again after the next chunk's barrier
  });
}

}  // namespace patchcore::cuda
