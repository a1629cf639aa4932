// The functions of the AVX2 level: those of level_avx2.cpp serve a level that differs from it in the dot products alone as well, and the dot products
// are in level_avx2_dots.cpp.
#pragma once

#include <cstdint>

namespace patchcore::avx2 {

constexpr int32_t kScannedCode = 63;

void squared_distances(const float* query, const float* rows, int64_t stride, int64_t count, int64_t dim, double* out);
void float16_to_float(const uint16_t* in, int64_t count, float* out);
void bfloat16_to_float(const uint16_t* in, int64_t count, float* out);
void int8_floors(const double* reach, const int32_t* squared_norms, int64_t count, double residual, int32_t* floors);
int64_t first_largest(const double* values, int64_t count);
int32_t quantize(const double* coordinates, int64_t count, double scale, int32_t most, uint8_t* codes, double* error_squares);
void multiply_matrix(const double* x, const double* matrix, int64_t dim, int64_t outputs, double* products);
void multiply_int16(const int16_t* rows, int64_t stride, int64_t count, const int16_t* tile, int64_t pairs, int64_t outputs, int32_t* products,
                    int64_t products_stride);
double round_to_steps(const float* x, const double* center, int64_t count, double scale, double most, int16_t* steps, double* error_squares);
int32_t coarsen_steps(const int16_t* steps, int64_t count, int64_t bits, uint8_t* codes, int32_t* error_squares);
bool all_finite(const float* values, int64_t count);
int64_t take_marked(const uint64_t* words, int64_t count, int32_t first, int32_t* found);
float squared_difference(const float* a, const float* b, int64_t dim);

void scan_rows(const uint8_t* rows, int64_t stride, int64_t count, const int8_t* tiles, const int32_t* starts, int64_t num_tiles, int64_t words,
               const int32_t* floors, uint64_t* survivors, int64_t mask_stride);
void scan_stages(const uint8_t* rows, int64_t stride, int64_t count, const void* row_starts, const int8_t* tiles, const void* starts,
                 int64_t num_tiles, int64_t words, const int32_t* floors, uint64_t* survivors, int64_t mask_stride);
uint64_t scan_tile(const uint8_t* row, const int8_t* tile, const int32_t* start, int64_t words, const int32_t* floors, int32_t offset);
void dots(const uint8_t* row, const int8_t* operands, int64_t stride, const int32_t* which, int64_t count, int64_t words, int64_t coarse,
          int64_t shift, int32_t* out);

}  // namespace patchcore::avx2
