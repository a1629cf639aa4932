// The functions of the AVX2 level, for a level that differs from it in the dot products alone.
#pragma once

#include <cstdint>

namespace patchcore::avx2 {

void squared_distances(const float* query, const float* rows, int64_t stride, int64_t count, int64_t dim, double* out);
void float16_to_float(const uint16_t* in, int64_t count, float* out);
void bfloat16_to_float(const uint16_t* in, int64_t count, float* out);
void int8_floors(const double* reach, const int32_t* squared_norms, int64_t count, double residual, int32_t* floors);
int64_t first_largest(const double* values, int64_t count);
int32_t quantize(const double* coordinates, int64_t count, double scale, int32_t most, uint8_t* codes, double* error_squares);
void multiply_matrix(const double* x, const double* matrix, int64_t dim, int64_t outputs, double* products);
void multiply_int16(const int16_t* rows, int64_t stride, int64_t count, const int16_t* tile, int64_t pairs, int32_t* products,
                    int64_t products_stride);
double round_to_steps(const float* x, const double* center, int64_t count, double scale, double most, int16_t* steps, double* error_squares);
int64_t take_marked(const uint64_t* words, int64_t count, int32_t first, int32_t* found);
float squared_difference(const float* a, const float* b, int64_t dim);

}  // namespace patchcore::avx2
