// The integer matrix product behind every filter: 128 rows of A against tiles of 128 rows of B, int8 codes, exact int32 sums, never written to
// memory.
//
//                B: a tile of 128 rows                A block of 8 warps owns 128 rows of A and walks over its share of B's tiles. A warp computes
//              +------+------+------+------+          64 x 32 (depth 64: 32 x 64) of a tile with mma m16n8k32. Codes come in chunks of 64 bytes,
//   A: 128     | 64x32                     |          kStages of them in flight (cp.async). A of a depth known at compile time stays: in shared
//   rows       +------+                    |          memory, or for depth 64 in registers; else it is streamed with B, through the caches.
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

// The shape of a scan. kDepth: bytes of a row, 0 when known at run time only.
template <int kDepth_>
struct Scan {
  static constexpr int kDepth = kDepth_;
  static constexpr bool kRegisters = kDepth == kChunk;  // A in registers
  static constexpr int kWarpRows = kRegisters ? 32 : 64, kWarpColumns = kRegisters ? 64 : 32;
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

// Calls finish(sums, tile) for every tile of the range, in all threads together; it may use barriers. row: the block's first row of A.
template <class S, class Finish>
__device__ __forceinline__ void scan_tiles(const ScanOperands& p, char* shared, int64_t row, const TileRange& range, Finish&& finish) {
  constexpr int kStages = S::kStages;
  char* const shared_a = shared;
  char* const shared_b = shared + S::kBytesA;
  int32_t* const starts = reinterpret_cast<int32_t*>(shared_b + S::kBytesB);
  const int64_t depth = S::kDepth > 0 ? S::kDepth : p.depth;
  const int chunks = static_cast<int>(depth / kChunk), steps = range.count * chunks;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread();
  const int warp_row = warp_of_thread() / S::kWarpsAcross * S::kWarpRows, warp_column = warp_of_thread() % S::kWarpsAcross * S::kWarpColumns;

  // Step i loads chunk i % chunks of the range's tile i / chunks. A thread copies units of 16 bytes: unit thread % 4 of rows thread / 4 and 64 more.
  int loaded_tile = 0, loaded_chunk = 0, load_stage = 0;
  const auto load = [&] {
    if (loaded_tile < range.count) {
      const int64_t tile = range.first + static_cast<int64_t>(loaded_tile) * range.step;
      const int8_t* from_b = p.b + (tile * kTileColumns + thread / 4) * depth + loaded_chunk * kChunk + thread % 4 * 16;
      char* to_b = shared_b + load_stage * kTileColumns * kChunk + swizzled(thread / 4, thread % 4);  // 64 rows on: the same swizzle
      cp_async16(to_b, from_b);
      cp_async16(to_b + 64 * kChunk, from_b + 64 * depth);
      if (S::kDepth == 0 || loaded_tile == 0) {
        const int8_t* from_a = p.a + (row + thread / 4) * depth + loaded_chunk * kChunk + thread % 4 * 16;
        char* to_a = shared_a + (S::kDepth == 0 ? load_stage : loaded_chunk) * kTileRows * kChunk + swizzled(thread / 4, thread % 4);
        cp_async16(to_a, from_a);
        cp_async16(to_a + 64 * kChunk, from_a + 64 * depth);
      }
      if (loaded_chunk == 0 && thread < kTileColumns / 2)
        cp_async16(starts + (loaded_tile % kStages * kTileColumns + thread * 2) * 2, p.b_starts + (tile * kTileColumns + thread * 2) * 2);
      if (++loaded_chunk == chunks) {
        loaded_chunk = 0;
        ++loaded_tile;
      }
      load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    }
    cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) load();

  typename S::Sums sums;
  uint32_t kept_a[S::kRegisters ? S::kRowSteps : 1][kChunk / 32][4];
  int tile_index = 0, chunk = 0, stage = 0;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();  // this thread's part of the chunk has landed,
    __syncthreads();               // so have the others', and nobody reads the stage any more that is loaded next
    load();
    const char* chunk_a = shared_a + (S::kDepth == 0 ? stage : chunk) * kTileRows * kChunk;
    const char* chunk_b = shared_b + stage * kTileColumns * kChunk;
    const int32_t* tile_starts = starts + tile_index % kStages * kTileColumns * 2;
    if (S::kRegisters && step == 0) {
#pragma unroll
      for (int m = 0; m < S::kRowSteps; ++m)
#pragma unroll
        for (int k = 0; k < kChunk / 32; ++k)
          ldmatrix_x4(kept_a[S::kRegisters ? m : 0][k], chunk_a + swizzled(warp_row + m * 16 + lane % 16, k * 2 + lane / 16));
    }
    if (!S::kRegisters && chunk == 0) {
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
#pragma unroll
    for (int k = 0; k < kChunk / 32; ++k) {
      uint32_t b[S::kColumnSteps / 2][4];
#pragma unroll
      for (int n = 0; n < S::kColumnSteps / 2; ++n)  // two steps of columns at a time: b0, b1 of the one, b0, b1 of the other
        ldmatrix_x4(b[n], chunk_b + swizzled(warp_column + n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < S::kRowSteps; ++m) {
        uint32_t streamed[4];
        if constexpr (!S::kRegisters) ldmatrix_x4(streamed, chunk_a + swizzled(warp_row + m * 16 + lane % 16, k * 2 + lane / 16));
        const uint32_t (&a)[4] = S::kRegisters ? kept_a[S::kRegisters ? m : 0][k] : streamed;
#pragma unroll
        for (int n = 0; n < S::kColumnSteps; ++n) {
          const uint32_t b0 = b[n / 2][n % 2 * 2], b1 = b[n / 2][n % 2 * 2 + 1];
          if (S::kRegisters && k == 0) {
            const int4 start = *reinterpret_cast<const int4*>(tile_starts + S::column_of(n, 0) * 2);
            const int quad[4] = {start.x, start.y, start.z, start.w};
            mma_s8(sums[m][n], a, b0, b1, quad);
          } else {
            mma_s8(sums[m][n], a, b0, b1, sums[m][n]);
          }
        }
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (++chunk < chunks) continue;
    chunk = 0;
    finish(sums, range.first + tile_index * range.step);
    ++tile_index;
  }
  cp_async_wait<0>();
}

}  // namespace patchcore::cuda
