// The integer matrix product behind every filter: 128 rows of A against tiles of 128 rows of B, int8 codes, exact int32 sums, never written to
// memory.
//
//                B: a tile of 128 rows                A block of 8 warps owns 128 rows of A and walks over its share of B's tiles. A warp computes
//              +------+------+------+------+          32 x 64 of a tile with mma m16n8k32. Codes come in chunks of 64 bytes,
//   A: 128     |   32x64     |             |          kStages of them in flight (cp.async). A of a depth known at compile time stays in
//   rows       +------+                    |          shared memory; else it is streamed with B, through the caches.
//              +------+------+------+------+
//
// Accumulators start at -floor(n_y / 2), filter.h: a pair survives iff its sum reaches the row's floor, which costs one maximum a pair. For depth 64
// the first product takes them as its C operand, from quads in shared memory that are registers as they lie: no accumulator is ever set.
//
// Shared memory: chunks are rows of 64 bytes, four units of 16, swizzled (unit ^ row / 2 % 4) so that the eight rows that ldmatrix reads at once lie
// in different banks.
#pragma once

#include "common.cuh"
#include "mma.cuh"

namespace patchcore::cuda {

constexpr int kTileRows = 128;     // of A, a block's
constexpr int kTileColumns = 128;  // rows of B in a tile
constexpr int kChunk = 64;         // bytes of a row that are loaded together; depths are multiples of it
constexpr int kThreads = 256;
// Blocks that shall fit a multiprocessor at once: two have 128 registers a thread. sm_75 has shared memory for one, and its copies pass through
// registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocks = 1;
#else
constexpr int kBlocks = 2;
#endif

// The shape of a scan. kDepth: bytes of a row, 0 when known at run time only.
template <int kDepth_>
struct Scan {
  static constexpr int kDepth = kDepth_;
  static constexpr bool kStartsAsOperand = kDepth == kChunk;  // one chunk a tile
  static constexpr int kWarpRows = 32, kWarpColumns = 64;
  static constexpr int kRowSteps = kWarpRows / 16, kColumnSteps = kWarpColumns / 8;
  static constexpr int kWarpsAcross = kTileColumns / kWarpColumns;
  static constexpr int kStages = 3;
  static constexpr int kBytesA = kDepth > 0 ? kTileRows * kDepth : kStages * kTileRows * kChunk;
  static constexpr int kBytesB = kStages * kTileColumns * kChunk;
  static constexpr int kBytesStarts = kStages * kTileColumns * 2 * 4;
  static constexpr int kSharedBytes = kBytesA + kBytesB + kBytesStarts;
  static_assert(kDepth % kChunk == 0 && kTileRows / kWarpRows * kWarpsAcross * kWarp == kThreads);

  using Sums = int[kRowSteps][kColumnSteps][4];

  // Where this thread's sums lie in the tile: sums[m][n][2 h + e] is that of row row_of(m, h) and column column_of(n, e).
  __device__ static int row_of(int m, int h) { return warp_of_thread() / kWarpsAcross * kWarpRows + m * 16 + h * 8 + lane_of_thread() / 4; }
  __device__ static int column_of(int n, int e) { return warp_of_thread() % kWarpsAcross * kWarpColumns + n * 8 + lane_of_thread() % 4 * 2 + e; }
};

struct ScanOperands {
  const int8_t* a;          // [rows of A, padded to tiles; depth], 16-byte aligned
  const int8_t* b;          // [rows of B, padded to tiles; depth], 16-byte aligned
  const int32_t* b_starts;  // [half the padded rows of B][4]: the starts of rows 2i, 2i + 1, 2i, 2i + 1
  int64_t depth;
};

// Tiles first, first + step, ...: `count` of them.
struct TileRange {
  int first, count, step;
};

__device__ __forceinline__ int swizzled(int row, int unit) { return row * kChunk + ((unit ^ (row >> 1 & 3)) << 4); }

// Calls finish(sums, tile) for every tile of the range, in all threads together; it may use barriers. Block x has the rows of A from 128 x on.
template <class S, class Finish>
__device__ __forceinline__ void scan_tiles(const ScanOperands& p, char* shared, const TileRange& range, Finish&& finish) {
  constexpr int kStages = S::kStages;
  char* const shared_a = shared;
  char* const shared_b = shared + S::kBytesA;
  int32_t* const starts = reinterpret_cast<int32_t*>(shared_b + S::kBytesB);
  const int depth = S::kDepth > 0 ? S::kDepth : static_cast<int>(p.depth), chunks = depth / kChunk;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread();

  // Chunks are loaded in the order they are used in, kStages - 1 ahead. A thread copies units of 16 bytes: unit thread % 4 of row
  // thread / 4 and of the row 64 behind it, which has the same swizzle.
  const int8_t* next_b = p.b + (static_cast<int64_t>(range.first) * kTileColumns + thread / 4) * depth + thread % 4 * 16;
  const int own = swizzled(thread / 4, thread % 4);
  int left = range.count, loaded_chunk = 0;  // tiles still to be loaded, the current one included
  const auto load = [&](int stage) {
    if (left > 0) {
      char* to_b = shared_b + stage * kTileColumns * kChunk + own;
      cp_async16(to_b, next_b);
      cp_async16(to_b + 64 * kChunk, next_b + 64 * depth);
      if (S::kDepth == 0 || left == range.count) {
        const int8_t* from_a = p.a + (static_cast<int64_t>(blockIdx.x) * kTileRows + thread / 4) * depth + thread % 4 * 16 + loaded_chunk * kChunk;
        char* to_a = shared_a + (S::kDepth == 0 ? stage : loaded_chunk) * kTileRows * kChunk + own;
        cp_async16(to_a, from_a);
        cp_async16(to_a + 64 * kChunk, from_a + 64 * depth);
      }
      // A tile's starts lie in the stage of its first chunk, and are read before that stage is loaded again.
      if (loaded_chunk == 0 && thread < kTileColumns / 2) {
        const int64_t tile = range.first + (range.count - left) * range.step;
        cp_async16(starts + (stage * kTileColumns + thread * 2) * 2, p.b_starts + (tile * kTileColumns + thread * 2) * 2);
      }
      next_b += kChunk;
      if (++loaded_chunk == chunks) {
        loaded_chunk = 0;
        --left;
        next_b += static_cast<int64_t>(range.step * kTileColumns - 1) * depth;
      }
    }
    cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) load(s);

  // Where this lane reads in a chunk, for k = 0 and the warp's first fragment. The others lie 16 rows on, with the same swizzle; the second half of
  // the chunk is two units on, which in a swizzled row is bit 5 of the address flipped.
  const int own_a = swizzled(warp_of_thread() / S::kWarpsAcross * S::kWarpRows + lane % 16, lane / 16);
  const int own_b = swizzled(warp_of_thread() % S::kWarpsAcross * S::kWarpColumns + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  int stage = 0;
  const auto next_chunk = [&] {
    cp_async_wait<kStages - 2>();  // this thread's part of the chunk has landed,
    __syncthreads();               // so have the others', and nobody reads the stage any more that is loaded next
    load(stage == 0 ? kStages - 1 : stage - 1);
  };
  for (int index = 0; index < range.count; ++index) {
    const int32_t* tile_starts = starts + stage * kTileColumns * 2;
    typename S::Sums sums;  // set before they are added to, dead behind finish, which may therefore call what it likes
    next_chunk();
    if constexpr (!S::kStartsAsOperand) {
#pragma unroll
      for (int n = 0; n < S::kColumnSteps; ++n) {
        const int4 start = *reinterpret_cast<const int4*>(tile_starts + S::column_of(n, 0) * 2);
#pragma unroll
        for (int m = 0; m < S::kRowSteps; ++m) {
          sums[m][n][0] = sums[m][n][2] = start.x;
          sums[m][n][1] = sums[m][n][3] = start.y;
        }
      }
    }
#pragma unroll 1  // unrolled, it needs more registers than there are
    for (int chunk = 0;;) {
      const char* chunk_a = shared_a + (S::kDepth == 0 ? stage : chunk) * kTileRows * kChunk;
      const char* chunk_b = shared_b + stage * kTileColumns * kChunk;
      stage = stage + 1 == kStages ? 0 : stage + 1;
#pragma unroll
      for (int k = 0; k < kChunk / 32; ++k) {
        uint32_t a[S::kRowSteps][4];
#pragma unroll
        for (int m = 0; m < S::kRowSteps; ++m) ldmatrix_x4(a[m], chunk_a + (own_a ^ k * 32) + m * 16 * kChunk);
#pragma unroll
        for (int n = 0; n < S::kColumnSteps; n += 2) {
          uint32_t b[4];  // b0, b1 of eight columns, b0, b1 of the next eight
          ldmatrix_x4(b, chunk_b + (own_b ^ k * 32) + n * 8 * kChunk);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (S::kStartsAsOperand && k == 0) {
              const int4 start = *reinterpret_cast<const int4*>(tile_starts + S::column_of(n + e, 0) * 2);
              const int quad[4] = {start.x, start.y, start.z, start.w};
#pragma unroll
              for (int m = 0; m < S::kRowSteps; ++m) mma_s8(sums[m][n + e], a[m], b[2 * e], b[2 * e + 1], quad);
            } else {
#pragma unroll
              for (int m = 0; m < S::kRowSteps; ++m) mma_s8(sums[m][n + e], a[m], b[2 * e], b[2 * e + 1], sums[m][n + e]);
            }
          }
        }
      }
      if (S::kStartsAsOperand || ++chunk == chunks) break;
      next_chunk();
    }
    finish(sums, range.first + index * range.step);
  }
  cp_async_wait<0>();
}

}  // namespace patchcore::cuda
