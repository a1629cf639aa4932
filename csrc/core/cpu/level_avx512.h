// The dot products of the AVX-512 level, which are in level_avx512_dots.cpp.
#pragma once

#include <cstdint>

namespace patchcore::avx512 {

void scan_rows(const uint8_t* rows, int64_t stride, int64_t count, const int8_t* tile, const int32_t* start, int64_t words, const int32_t* floors,
               uint64_t* survivors);
void scan_stages(const uint8_t* rows, int64_t stride, int64_t count, const void* row_starts, const int8_t* tiles, const void* starts,
                 int64_t num_tiles, int64_t words, const int32_t* floors, uint64_t* survivors, int64_t mask_stride);
uint64_t scan_tile(const uint8_t* row, const int8_t* tile, const int32_t* start, int64_t words, const int32_t* floors, int32_t offset);
void dots(const uint8_t* row, const int8_t* operands, int64_t stride, const int32_t* which, int64_t count, int64_t words, int64_t coarse,
          int64_t shift, int32_t* out);

}  // namespace patchcore::avx512
