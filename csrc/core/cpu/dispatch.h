// The inner loops that exist once per instruction set, and the choice between them.
//
// A level is a table of functions. All levels give the same bits (distance.h); they differ in speed alone. The best level that the processor has is
// chosen once, at the first call; the environment variable PATCHCORE_EXT_CPU_LEVEL (scalar, avx2, avxvnni, avx512 or amx) forces a lower one.
#pragma once

#include <cstdint>

#include "filter.h"

namespace patchcore {

// Operands of the int8 scan lie in tiles: tile[w][o][b] is code 4 w + b of operand o, so that one register holds the same four codes of 16 operands.
constexpr int64_t kTileOperands = 64;

// What steps of a search take, in nanoseconds: what plans are made by, and no result depends on. Measured on Zen 3 (scalar, AVX2) and Zen 4
// (AVX-512); AVX-VNNI's lie between, as they do on Sapphire Rapids.
struct Costs {
  double word;            // a pair's word of codes in scan_rows
  double look_up;         // an operand in dots,
  double look_up_word;    // and each of its words
  double difference_dim;  // a dimension in squared_difference, of a row from memory
};

struct Level {
  const char* name;

  // The largest code of scan_rows and scan_tile: smaller ones are multiplied faster by some processors, and leave a little more.
  int32_t scanned_code;

  // squared_distances[i] = canonical d2(query, row i), i < count. query: [dim]; rows: [count] rows, `stride` elements apart.
  void (*squared_distances)(const float* query, const float* rows, int64_t stride, int64_t count, int64_t dim, double* squared_distances);

  // Exact widening of `count` scalars.
  void (*float16_to_float)(const uint16_t* in, int64_t count, float* out);
  void (*bfloat16_to_float)(const uint16_t* in, int64_t count, float* out);

  // Integer dot products for the filters (filter.h), exact. Codes come in groups of four ("words"); one side is stored as code + most + 1 in uint8,
  // as the dot-product instructions want it, and the caller subtracts (most + 1) * (sum of the other side's codes). Codes lie within +-most:
  // scanned_code in the scans, kMaxCode in dots.

  // Bit o of survivors[r * mask_stride + t] is set iff starts[t][o] + dot(row r, operand o of tile t) >= floors[r]. rows: [count] rows, `stride`
  // bytes apart; tiles: [num_tiles, words, 64, 4]; starts: [num_tiles, 64].
  void (*scan_rows)(const uint8_t* rows, int64_t stride, int64_t count, const int8_t* tiles, const int32_t* starts, int64_t num_tiles, int64_t words,
                    const int32_t* floors, uint64_t* survivors, int64_t mask_stride);

  // Codes that scan_rows takes at once: other numbers of them take as long as the next multiple.
  int64_t scan_step;

  // The search's scan in stages (stages.h), for banks of at least `fewest_staged_rows`; smaller ones are left to scan_rows. Sums are of `stage_bytes`
  // = 2 or 4 bytes, so are the starts, and so many codes of an operand lie side by side: tiles are [num_tiles, 4 * words / stage_bytes, 64,
  // stage_bytes]. starts: [num_tiles, stages, 64] and row_starts: [stages, 64] as stage_starts makes them. Bit o of survivors[r * mask_stride + t] is
  // set where row r and operand o of tile t survive every stage: the sum of their starts and the dot product of their codes so far is at least
  // floors[r] = int8_floor(0, limit of row r). Sums of 16 bits are kept modulo 2^16 as signed numbers, and a row whose floor is below -kMostRoom
  // keeps everything. count <= 64; padding may survive.
  int64_t fewest_staged_rows;
  int64_t stage_bytes;
  void (*scan_stages)(const uint8_t* rows, int64_t stride, int64_t count, const void* row_starts, const int8_t* tiles, const void* starts,
                      int64_t num_tiles, int64_t words, const int32_t* floors, uint64_t* survivors, int64_t mask_stride);

  // Bit o of the result is set iff start[o] + dot(row, operand o) >= floors[o] + offset (which must not overflow).
  uint64_t (*scan_tile)(const uint8_t* row, const int8_t* tile, const int32_t* start, int64_t words, const int32_t* floors, int32_t offset);

  // dots[i] = dot(row, codes of operand which[i]), operands `stride` bytes apart; the first `coarse` words, a multiple of 4, count 2^shift times.
  void (*dots)(const uint8_t* row, const int8_t* operands, int64_t stride, const int32_t* which, int64_t count, int64_t words, int64_t coarse,
               int64_t shift, int32_t* dots);

  // floors[r] = int8_floor(squared_norms[r], int8_skip_limit(reach[r], residual)), count a multiple of 8.
  void (*int8_floors)(const double* reach, const int32_t* squared_norms, int64_t count, double residual, int32_t* floors);

  // The index of the first of the largest of `count` values (a positive multiple of 8, none NaN).
  int64_t (*first_largest)(const double* values, int64_t count);

  // codes[k] = most + 1 + int8_code(scale * coordinates[k], most), most <= kMaxCode (filter.h); returns the sum of the squared codes, and the sum of
  // the squared errors (in any order: filter.h, residual_bound). Coordinates are finite.
  int32_t (*quantize)(const double* coordinates, int64_t count, double scale, int32_t most, uint8_t* codes, double* error_squares);

  // products[o] = sum_k x[k] * matrix[k][o], float64, o < outputs (a multiple of 8); k ascending, so the same bits at every level.
  void (*multiply_matrix)(const double* x, const double* matrix, int64_t dim, int64_t outputs, double* products);

  // products[r * products_stride + o] = dot(row r, operand o) modulo 2^32, o < outputs = 32 or kTileOperands, int16 by int16. rows: [count] rows of
  // 2 * pairs elements, `stride` elements apart; tile[w][o][b] is element 2 w + b of operand o, o < kTileOperands.
  void (*multiply_int16)(const int16_t* rows, int64_t stride, int64_t count, const int16_t* tile, int64_t pairs, int64_t outputs, int32_t* products,
                         int64_t products_stride);

  // steps[j] = rounded_code(scale * (x[j] - center[j]), most); returns the sum of the squared steps (exact below 2^53) and the sum of the squared
  // errors (in any order: filter.h, residual_bound).
  double (*round_to_steps)(const float* x, const double* center, int64_t count, double scale, double most, int16_t* steps, double* error_squares);

  // codes[j] = 128 + step_code(steps[j], bits), bits <= kMostStepBits (filter.h); returns the sum of the squared codes, and the sum of the squared
  // errors, both exact.
  int32_t (*coarsen_steps)(const int16_t* steps, int64_t count, int64_t bits, uint8_t* codes, int32_t* error_squares);

  // Whether no value is NaN or infinite.
  bool (*all_finite)(const float* values, int64_t count);

  // first + 64 m + b for every set bit b of every word m, in order; returns their number. found: room for four more than that.
  int64_t (*take_marked)(const uint64_t* words, int64_t count, int32_t first, int32_t* found);

  // sum_j (a[j] - b[j])^2 in float32, in any order, fused or not: for difference_skip_limit (filter.h).
  float (*squared_difference)(const float* a, const float* b, int64_t dim);

  Costs costs;
};

// Of fewest_staged_rows: any bank is scanned in stages, or none is.
constexpr int64_t kAlwaysStaged = 0, kNeverStaged = INT64_MAX;

// The level in use.
const Level& level();

// The level of that name, or nullptr when it is unknown, was not compiled for this machine, the processor lacks it, or the system does not lend it.
const Level* find_level(const char* name);

constexpr int kMostLevels = 5;

// Names [kMostLevels] of the levels this processor can run, slowest first; returns their number.
int available_levels(const char** names);

// One table per source file.
extern const Level kScalarLevel;
#if defined(__x86_64__)
extern const Level kAvx2Level;
extern const Level kAvxVnniLevel;
extern const Level kAvx512Level;
extern const Level kAmxLevel;
#endif

}  // namespace patchcore
