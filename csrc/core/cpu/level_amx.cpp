// AVX-512 with the tile registers of AMX (Sapphire Rapids and later), by which a scan of many rows takes half the time or less; everything else is
// the AVX-512 level's.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/dispatch.h"
#include "cpu/level_avx2.h"
#include "cpu/level_avx512.h"

// Everything below is compiled for AMX; no function of a header may be instantiated here, or the linker could keep this copy for every processor.
#pragma GCC push_options
#pragma GCC target("avx2,f16c,bmi,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")

namespace patchcore {

namespace {

// The intrinsic of GCC 12 names the first eight bytes alone as what it reads.
#define PATCHCORE_TILE_CONFIGURE(shapes)         \
  do {                                           \
    asm volatile("" : : "r"(shapes) : "memory"); \
    _tile_loadconfig(shapes);                    \
  } while (false)
#define PATCHCORE_TILE_RELEASE() _tile_release()
#define PATCHCORE_TILE_ZERO(tile) _tile_zero(tile)
#define PATCHCORE_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define PATCHCORE_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define PATCHCORE_TILE_DOTS(sums, rows, operands) _tile_dpbusd(sums, rows, operands)
#include "cpu/amx_scan.inc"

// A tile of few rows takes as long as a full one.
constexpr int64_t kFewestTileRows = 8;

void scan_rows(const uint8_t* rows, int64_t stride, int64_t count, const int8_t* tiles, const int32_t* starts, int64_t num_tiles, int64_t words,
               const int32_t* floors, uint64_t* survivors, int64_t mask_stride) {
  const auto scan = count < kFewestTileRows ? avx512::scan_rows : scan_rows_by_tiles;
  scan(rows, stride, count, tiles, starts, num_tiles, words, floors, survivors, mask_stride);
}

}  // namespace

const Level kAmxLevel = {"amx",
                         kMaxCode,
                         avx512::squared_distances,
                         avx512::float16_to_float,
                         avx512::bfloat16_to_float,
                         scan_rows,
                         kStepCodes,
                         kNeverStaged,
                         4,
                         avx512::scan_stages,  // of a bank that was prepared elsewhere
                         avx512::scan_tile,
                         avx512::dots,
                         avx512::int8_floors,
                         avx512::first_largest,
                         avx512::quantize,
                         avx512::multiply_matrix,
                         avx512::multiply_int16,
                         avx512::round_to_steps,
                         avx512::coarsen_steps,
                         avx512::all_finite,
                         avx2::take_marked,
                         avx512::squared_difference,
                         // As AVX-512's, though a word takes less: what a scan of all coordinates leaves takes as long as there.
                         {0.0167, 1.7, 0.05, 0.25}};

}  // namespace patchcore

#pragma GCC pop_options

#endif
