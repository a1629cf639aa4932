// The integer dot products of the AVX-512 level: the scans, and codes looked up row by row.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/level_avx512.h"
#include "cpu/stages.h"

// Everything below is compiled for AVX-512; no function of a header may be instantiated here, or the linker could keep this copy for every processor.
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (GCC bug 105593)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC push_options
#pragma GCC target("avx2,f16c,bmi,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

namespace patchcore::avx512 {

static inline __m512i row_word(const uint8_t* word) {
  int32_t codes;
  __builtin_memcpy(&codes, word, 4);
  return _mm512_set1_epi32(codes);
}

// sum + dot products of four codes, in place. As an intrinsic GCC 12 copies the accumulators about and spills from five rows on.
static inline __m512i add_dots(__m512i sum, __m512i codes, __m512i operands) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(operands));
  return sum;
}

// kRows rows against the 64 operands of a tile: 4 * kRows accumulators stay in registers.
template <int kRows>
static inline void scan_some_rows(const uint8_t* rows, int64_t stride, const int8_t* tile, const int32_t* start, int64_t words, const int32_t* floors,
                                  uint64_t* survivors, int64_t mask_stride) {
  __m512i sums[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) sums[r][q] = _mm512_loadu_si512(start + 16 * q);
  }
  for (int64_t w = 0; w < words; ++w, tile += 4 * kTileOperands) {
    const __m512i operand0 = _mm512_loadu_si512(tile), operand1 = _mm512_loadu_si512(tile + 64);
    const __m512i operand2 = _mm512_loadu_si512(tile + 128), operand3 = _mm512_loadu_si512(tile + 192);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i codes = row_word(rows + r * stride + 4 * w);
      sums[r][0] = add_dots(sums[r][0], codes, operand0);
      sums[r][1] = add_dots(sums[r][1], codes, operand1);
      sums[r][2] = add_dots(sums[r][2], codes, operand2);
      sums[r][3] = add_dots(sums[r][3], codes, operand3);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m512i floor = _mm512_set1_epi32(floors[r]);
    const uint64_t low = _mm512_cmpge_epi32_mask(sums[r][0], floor) | static_cast<uint32_t>(_mm512_cmpge_epi32_mask(sums[r][1], floor)) << 16;
    const uint64_t high = _mm512_cmpge_epi32_mask(sums[r][2], floor) | static_cast<uint32_t>(_mm512_cmpge_epi32_mask(sums[r][3], floor)) << 16;
    survivors[r * mask_stride] = low | high << 32;
  }
}

void scan_rows(const uint8_t* rows, int64_t stride, int64_t count, const int8_t* tiles, const int32_t* starts, int64_t num_tiles, int64_t words,
               const int32_t* floors, uint64_t* survivors, int64_t mask_stride) {
  for (int64_t t = 0; t < num_tiles; ++t, tiles += 4 * words * kTileOperands, starts += kTileOperands, ++survivors) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4)
      scan_some_rows<4>(rows + r * stride, stride, tiles, starts, words, floors + r, survivors + r * mask_stride, mask_stride);
    for (; r < count; ++r) scan_some_rows<1>(rows + r * stride, stride, tiles, starts, words, floors + r, survivors + r * mask_stride, mask_stride);
  }
}

uint64_t scan_tile(const uint8_t* row, const int8_t* tile, const int32_t* start, int64_t words, const int32_t* floors, int32_t offset) {
  __m512i sums[4], other[4];  // two sums an operand: the latency of one instruction behind the other would show
  for (int q = 0; q < 4; ++q) {
    sums[q] = _mm512_loadu_si512(start + 16 * q);
    other[q] = _mm512_setzero_si512();
  }
  int64_t w = 0;
  for (; w + 2 <= words; w += 2, tile += 8 * kTileOperands) {
    const __m512i codes = row_word(row + 4 * w), next = row_word(row + 4 * w + 4);
    for (int q = 0; q < 4; ++q) {
      sums[q] = _mm512_dpbusd_epi32(sums[q], codes, _mm512_loadu_si512(tile + 64 * q));
      other[q] = _mm512_dpbusd_epi32(other[q], next, _mm512_loadu_si512(tile + 4 * kTileOperands + 64 * q));
    }
  }
  if (w < words) {
    for (int q = 0; q < 4; ++q) sums[q] = _mm512_dpbusd_epi32(sums[q], row_word(row + 4 * w), _mm512_loadu_si512(tile + 64 * q));
  }
  uint64_t survivors = 0;
  for (int q = 0; q < 4; ++q) {
    const __m512i floor = _mm512_add_epi32(_mm512_loadu_si512(floors + 16 * q), _mm512_set1_epi32(offset));
    survivors |= static_cast<uint64_t>(_mm512_cmpge_epi32_mask(_mm512_add_epi32(sums[q], other[q]), floor)) << (16 * q);
  }
  return survivors;
}

// Rows first .. first + kRows with the 64 operands of a tile. Sums start at minus the floor, so a survivor's is not negative.
template <int kRows>
[[gnu::always_inline]] static inline void scan_some_stages(const StagedRows<int32_t>& rows, int64_t first, const int8_t* tile, const int32_t* starts,
                                                           uint64_t* survivors, int64_t mask_stride) {
  const uint8_t* codes = rows.codes + first * rows.stride;
  const int64_t stride = rows.stride;
  const int32_t* row_starts = rows.starts + first;
  __m512i sums[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) sums[r][q] = _mm512_add_epi32(_mm512_set1_epi32(rows.begins[first + r]), _mm512_loadu_si512(starts + 16 * q));
  }
  for (int64_t stage = 0, k = 0;;) {
    for (const int64_t end = rows.ends[stage]; k < end; k += 4, tile += 4 * kTileOperands) {
      const __m512i operand0 = _mm512_loadu_si512(tile), operand1 = _mm512_loadu_si512(tile + 64);
      const __m512i operand2 = _mm512_loadu_si512(tile + 128), operand3 = _mm512_loadu_si512(tile + 192);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512i word = row_word(codes + r * stride + k);
        sums[r][0] = add_dots(sums[r][0], word, operand0);
        sums[r][1] = add_dots(sums[r][1], word, operand1);
        sums[r][2] = add_dots(sums[r][2], word, operand2);
        sums[r][3] = add_dots(sums[r][3], word, operand3);
      }
    }
    __m512i signs[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) signs[r] = _mm512_and_si512(_mm512_ternarylogic_epi32(sums[r][0], sums[r][1], sums[r][2], 0x80), sums[r][3]);
    for (int r = 1; r < kRows; ++r) signs[0] = _mm512_and_si512(signs[0], signs[r]);
    const __mmask16 negative = _mm512_movepi32_mask(signs[0]);
    if (_kortestc_mask16_u8(negative, negative)) {
      for (int r = 0; r < kRows; ++r) survivors[r * mask_stride] = 0;
      return;
    }
    if (++stage == rows.num_stages) break;
    starts += kTileOperands;
    row_starts += kTileOperands;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const __m512i start = _mm512_add_epi32(_mm512_set1_epi32(row_starts[r]), _mm512_loadu_si512(starts + 16 * q));
        sums[r][q] = _mm512_add_epi32(sums[r][q], start);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const uint64_t low = _mm512_movepi32_mask(sums[r][0]) | static_cast<uint32_t>(_mm512_movepi32_mask(sums[r][1])) << 16;
    const uint64_t high = _mm512_movepi32_mask(sums[r][2]) | static_cast<uint32_t>(_mm512_movepi32_mask(sums[r][3])) << 16;
    survivors[r * mask_stride] = ~(low | high << 32);
  }
}

// Four rows at a time, in line: a call and what it saves and restores take a tenth of the time. Smaller groups discard more, as does going on with
// single rows and 16 operands, but take as long: each end that is not foreseen costs about as much as a stage.
void scan_stages(const uint8_t* rows, int64_t stride, int64_t count, const void* row_starts, const int8_t* tiles, const void* starts,
                 int64_t num_tiles, int64_t words, const int32_t* floors, uint64_t* survivors, int64_t mask_stride) {
  const int32_t* tile_starts = static_cast<const int32_t*>(starts);
  StagedRows<int32_t> staged = {rows, stride, static_cast<const int32_t*>(row_starts), {}, {}, num_stages(4 * words)};
  for (int64_t r = 0; r < count; ++r) staged.begins[r] = staged.starts[r] - floors[r];
  for (int64_t stage = 0; stage < staged.num_stages; ++stage) staged.ends[stage] = stage_end(stage, 4 * words);
  for (int64_t t = 0; t < num_tiles; ++t, tiles += 4 * words * kTileOperands, tile_starts += staged.num_stages * kTileOperands, ++survivors) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) scan_some_stages<4>(staged, r, tiles, tile_starts, survivors + r * mask_stride, mask_stride);
    for (; r < count; ++r) scan_some_stages<1>(staged, r, tiles, tile_starts, survivors + r * mask_stride, mask_stride);
  }
}

// Dot products of a row with kCount operands: 64 codes at a time, those up to `coarse`, a multiple of 16, 2^shift times. rest: of the last 64 codes.
template <int kCount>
[[gnu::always_inline]] static inline void row_times_operands(const uint8_t* row, const int8_t* const* operands, int64_t length, int64_t coarse,
                                                             __m128i shift, __mmask64 rest, __m512i* sums) {
#pragma GCC unroll 4
  for (int q = 0; q < kCount; ++q) sums[q] = _mm512_setzero_si512();
  int64_t b = 0;
  const auto add = [&](__mmask64 mask) {
    const __m512i codes = _mm512_maskz_loadu_epi8(mask, row + b);
#pragma GCC unroll 4
    for (int q = 0; q < kCount; ++q) sums[q] = add_dots(sums[q], codes, _mm512_maskz_loadu_epi8(mask, operands[q] + b));
  };
  if (coarse > 0) {
    for (; b + 64 <= coarse; b += 64) add(~uint64_t{0});
    const __mmask64 large = (uint64_t{1} << (coarse - b)) - 1;
    if (b < coarse) add(large);
#pragma GCC unroll 4
    for (int q = 0; q < kCount; ++q) sums[q] = _mm512_sll_epi32(sums[q], shift);
    if (b < coarse) {
      add(b + 64 < length ? ~large : rest & ~large);
      b += 64;
    }
  }
  for (; b + 64 < length; b += 64) {
    const __m512i codes = _mm512_loadu_si512(row + b);
#pragma GCC unroll 4
    for (int q = 0; q < kCount; ++q) sums[q] = add_dots(sums[q], codes, _mm512_loadu_si512(operands[q] + b));
  }
  if (b < length) add(rest);
}

// Four operands at a time, whose sums are added up together.
void dots(const uint8_t* row, const int8_t* operands, int64_t stride, const int32_t* which, int64_t count, int64_t words, int64_t coarse,
          int64_t shift, int32_t* out) {
  const int64_t length = 4 * words;
  const __m128i bits = _mm_cvtsi64_si128(shift);
  const __mmask64 rest = ~uint64_t{0} >> (63 - (length - 1) % 64);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const int8_t* four[4] = {operands + which[i] * stride, operands + which[i + 1] * stride, operands + which[i + 2] * stride,
                             operands + which[i + 3] * stride};
    __m512i sums[4];
    row_times_operands<4>(row, four, length, 4 * coarse, bits, rest, sums);
    const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0], sums[1]), _mm512_unpackhi_epi32(sums[0], sums[1]));
    const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2], sums[3]), _mm512_unpackhi_epi32(sums[2], sums[3]));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
  for (; i < count; ++i) {
    const int8_t* one = operands + which[i] * stride;
    __m512i sum;
    row_times_operands<1>(row, &one, length, 4 * coarse, bits, rest, &sum);
    out[i] = _mm512_reduce_add_epi32(sum);
  }
}

}  // namespace patchcore::avx512

#pragma GCC pop_options

#endif
