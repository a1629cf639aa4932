// The functions of the AVX2 level, for a level that differs from it in the dot products alone.
#pragma once

#include <cstdint>

namespace patchcore::avx2 {

void squared_distances(const float* query, const float* rows, int64_t stride, int64_t count, int64_t dim, double* out);
void float16_to_float(const uint16_t* in, int64_t count, float* out);
void bfloat16_to_float(const uint16_t* in, int64_t count, float* out);
void int8_floors(const double* reach, const int32_t* squared_norms, int64_t count, double residual, int32_t* floors);
int64_t first_largest(const double* values, int64_t count);
int32_t quantize(const double* coordinates, int64_t count, double scale, uint8_t* codes, double* error_squares);
void multiply_matrix(const double* x, const double* matrix, int64_t dim, int64_t outputs, double* products);

}  // namespace patchcore::avx2
