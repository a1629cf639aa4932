// The prepared bank: int8 copies of a memory bank, laid out for the search (knn.h). Built once, then only read.
//
// Tiles hold 64 bank rows each, in `order`. The order is best one that puts rows together that lie together: then what the scan leaves of a query
// comes in runs, and the second codes of a run lie side by side.
#pragma once

#include "cpu/encoder.h"
#include "knn.h"

namespace patchcore {

// Codes that are scanned: tile by tile, all queries of a block against 64 bank rows.
struct TileFilter {
  View view;
  int64_t words = 0;
  int8_t* tiles = nullptr;           // [num_tiles, words, 64, 4], signed codes, or as Level::scan_stages wants them
  int32_t* start = nullptr;          // [num_tiles * 64], what an accumulator starts at, or
  char* stage_starts = nullptr;      // [num_tiles, stages, 64] of Level::stage_bytes bytes
  double* tile_residuals = nullptr;  // [num_tiles]: the largest residual of each tile
};

// Codes that are looked up row by row: of the long prefix, which begins with the short one in coarser steps, or of all coordinates. What is projected
// for the scan, or rounded for the projection, serves here as well.
struct RowFilter {
  View view;
  int64_t words = 0;
  int8_t* codes = nullptr;      // [count, 4 * words], signed, by place
  int32_t* offsets = nullptr;   // [count]: n_y + 2 * 128 * (sum of a_y), so that ||a_x - a_y||^2 = n_x + offset - 2 * dot
  float* residuals = nullptr;   // [count]
  double largest_residual = 0;  // of all rows
};

struct PreparedBank {
  int64_t count = 0;
  int64_t dim = 0;
  bool prefix_first = false;  // the plan: scan the prefix, or scan all coordinates at once
  IntegerProjection projection;
  int32_t* order = nullptr;   // [num_tiles * 64], the bank row of each place in the tiles; places beyond the last row repeat the first place's
  int32_t* places = nullptr;  // [count], the place of each bank row; only with a prefix
  TileFilter prefix, full;    // no projection: prefix.words = 0
  RowFilter second;
};

// The prepared bank that lies in `prepared` (see knn.h).
PreparedBank prepared_bank_at(const void* prepared);

}  // namespace patchcore
