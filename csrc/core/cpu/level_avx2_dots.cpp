// The integer dot products of the AVX2 level: the scans, and codes looked up row by row.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/level_avx2.h"
#include "cpu/stages.h"

// Everything below is compiled for AVX2; no function of a header may be instantiated here, or the linker could keep this copy for every processor.
#pragma GCC push_options
#pragma GCC target("avx2")

namespace patchcore::avx2 {

static inline uint64_t at_least(__m256i value, __m256i floor) {
  return 0xffu & ~static_cast<unsigned int>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(floor, value))));
}

// Codes of this level's scans lie within +-kScannedCode = 63, and those of a row are stored as code + 64: two products are at most 2 * 127 * 63 =
// 16002 and their sum in vpmaddubsw does not saturate; two such sums still fit int16. So vpmaddwd, which makes one int32 of two int16, is needed for
// every other word only.
static inline __m256i row_word(const uint8_t* word) {
  int32_t codes;
  __builtin_memcpy(&codes, word, 4);
  return _mm256_set1_epi32(codes);
}

static inline __m256i operands_at(const int8_t* operands, int64_t word) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(operands + word * 4 * kTileOperands));
}

// Adds the dot products of some rows with eight operands of a tile to sums[r].
template <int kRows>
static inline void add_eight_dots(const uint8_t* rows, int64_t stride, const int8_t* operands, int64_t words, __m256i* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  int64_t w = 0;
  for (; w + 4 <= words; w += 4, operands += 4 * 4 * kTileOperands) {
    const __m256i operands0 = operands_at(operands, 0), operands1 = operands_at(operands, 1);
    const __m256i operands2 = operands_at(operands, 2), operands3 = operands_at(operands, 3);
    for (int64_t ahead = 0; ahead < 4; ++ahead) __builtin_prefetch(operands + (words + ahead) * 4 * kTileOperands);  // the next tile
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* row = rows + r * stride + 4 * w;
      const __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(row_word(row), operands0), _mm256_maddubs_epi16(row_word(row + 4), operands1));
      const __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(row_word(row + 8), operands2), _mm256_maddubs_epi16(row_word(row + 12), operands3));
      sums[r] = _mm256_add_epi32(sums[r], _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones)));
    }
  }
  for (; w < words; ++w, operands += 4 * kTileOperands) {
    const __m256i operands0 = operands_at(operands, 0);
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r) {
      const __m256i pairs = _mm256_maddubs_epi16(row_word(rows + r * stride + 4 * w), operands0);
      sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs, ones));
    }
  }
}

template <int kRows>
static inline void scan_some_rows(const uint8_t* rows, int64_t stride, const int8_t* tile, const int32_t* start, int64_t words, const int32_t* floors,
                                  uint64_t* survivors, int64_t mask_stride) {
  for (int64_t o = 0; o < kTileOperands; o += 8) {
    __m256i sums[kRows];
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r) sums[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + o));
    add_eight_dots<kRows>(rows, stride, tile + 4 * o, words, sums);
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r)
      reinterpret_cast<uint8_t*>(survivors + r * mask_stride)[o / 8] = static_cast<uint8_t>(at_least(sums[r], _mm256_set1_epi32(floors[r])));
  }
}

// Seven rows at a time: their sums, four operands and what is in between fill the sixteen registers. A line of 28 patches is four times seven.
void scan_rows(const uint8_t* rows, int64_t stride, int64_t count, const int8_t* tiles, const int32_t* starts, int64_t num_tiles, int64_t words,
               const int32_t* floors, uint64_t* survivors, int64_t mask_stride) {
  for (int64_t t = 0; t < num_tiles; ++t, tiles += 4 * words * kTileOperands, starts += kTileOperands, ++survivors) {
    int64_t r = 0;
    for (; r + 7 <= count; r += 7)
      scan_some_rows<7>(rows + r * stride, stride, tiles, starts, words, floors + r, survivors + r * mask_stride, mask_stride);
    for (; r + 3 <= count; r += 3)
      scan_some_rows<3>(rows + r * stride, stride, tiles, starts, words, floors + r, survivors + r * mask_stride, mask_stride);
    for (; r < count; ++r) scan_some_rows<1>(rows + r * stride, stride, tiles, starts, words, floors + r, survivors + r * mask_stride, mask_stride);
  }
}

uint64_t scan_tile(const uint8_t* row, const int8_t* tile, const int32_t* start, int64_t words, const int32_t* floors, int32_t offset) {
  uint64_t survivors = 0;
  for (int64_t o = 0; o < kTileOperands; o += 8) {
    __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + o));
    add_eight_dots<1>(row, 0, tile + 4 * o, words, &sum);
    const __m256i floor = _mm256_add_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(floors + o)), _mm256_set1_epi32(offset));
    survivors |= at_least(sum, floor) << o;
  }
  return survivors;
}

// ---- Sums of 16 bits, in stages -------------------------------------------------------------------------------------------------------------------

static inline __m256i broadcast_pair(const void* pair) { return _mm256_broadcastw_epi16(_mm_loadu_si16(pair)); }

// Rows first .. first + kRows with 32 operands: two codes of a row times those of sixteen operands are one vpmaddubsw and one vpaddw. tile, starts:
// where the codes of the first operand are. A survivor's sum has its sign bit clear.
template <int kRows>
static inline void scan_some_stages(const StagedRows<int16_t>& rows, int64_t first, const int8_t* tile, const int16_t* starts, uint32_t* survivors,
                                    int64_t mask_stride) {
  const uint8_t* codes = rows.codes + first * rows.stride;
  const int64_t stride = rows.stride;
  const int16_t* row_starts = rows.starts + first;
  __m256i sums[kRows][2];
#pragma GCC unroll 5
  for (int r = 0; r < kRows; ++r) {
    const __m256i begin = broadcast_pair(rows.begins + first + r);
    sums[r][0] = _mm256_add_epi16(begin, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(starts)));
    sums[r][1] = _mm256_add_epi16(begin, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(starts + 16)));
  }
  for (int64_t stage = 0, k = 0; stage < rows.num_stages; ++stage) {
    if (stage > 0) {
      starts += kTileOperands;
      row_starts += kTileOperands;
      const __m256i starts0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(starts));
      const __m256i starts1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(starts + 16));
#pragma GCC unroll 5
      for (int r = 0; r < kRows; ++r) {
        const __m256i row_start = broadcast_pair(row_starts + r);
        sums[r][0] = _mm256_add_epi16(sums[r][0], _mm256_add_epi16(row_start, starts0));
        sums[r][1] = _mm256_add_epi16(sums[r][1], _mm256_add_epi16(row_start, starts1));
      }
    }
    for (const int64_t end = rows.ends[stage]; k < end; k += 2, tile += 2 * kTileOperands) {
      __m256i operands0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile));
      __m256i operands1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 32));
      asm("" : "+x"(operands0), "+x"(operands1));  // stays in its register: otherwise the compiler reads it from memory again for every row
#pragma GCC unroll 5
      for (int r = 0; r < kRows; ++r) {
        __m256i pair = broadcast_pair(codes + r * stride + k);
        asm("" : "+x"(pair));
        sums[r][0] = _mm256_add_epi16(sums[r][0], _mm256_maddubs_epi16(pair, operands0));
        sums[r][1] = _mm256_add_epi16(sums[r][1], _mm256_maddubs_epi16(pair, operands1));
      }
    }
    __m256i signs = _mm256_and_si256(sums[0][0], sums[0][1]);
#pragma GCC unroll 5
    for (int r = 1; r < kRows; ++r) signs = _mm256_and_si256(signs, _mm256_and_si256(sums[r][0], sums[r][1]));
    const bool none_left = (~_mm256_movemask_epi8(signs) & 0xaaaaaaaa) == 0;
    if (none_left) {
      for (int r = 0; r < kRows; ++r) survivors[2 * r * mask_stride] = 0;
      return;
    }
  }
#pragma GCC unroll 5
  for (int r = 0; r < kRows; ++r) {
    const __m256i negative = _mm256_permute4x64_epi64(_mm256_packs_epi16(sums[r][0], sums[r][1]), 0xd8);
    survivors[2 * r * mask_stride] = ~static_cast<uint32_t>(_mm256_movemask_epi8(negative));
  }
}

// Five rows at a time: their sums, four operands and what is in between fill the registers. Fours make up for what five does not divide.
void scan_stages(const uint8_t* rows, int64_t stride, int64_t count, const void* row_starts, const int8_t* tiles, const void* starts,
                 int64_t num_tiles, int64_t words, const int32_t* floors, uint64_t* survivors, int64_t mask_stride) {
  const int16_t* operand_starts = static_cast<const int16_t*>(starts);
  StagedRows<int16_t> staged = {rows, stride, static_cast<const int16_t*>(row_starts), {}, {}, num_stages(4 * words)};
  for (int64_t r = 0; r < count; ++r) staged.begins[r] = static_cast<int16_t>(staged.starts[r] - floors[r]);
  for (int64_t stage = 0; stage < staged.num_stages; ++stage) staged.ends[stage] = stage_end(stage, 4 * words);
  const int64_t fours = (5 - count % 5) % 5;
  for (int64_t t = 0; t < num_tiles; ++t, tiles += 4 * words * kTileOperands, operand_starts += staged.num_stages * kTileOperands, ++survivors) {
    for (int64_t half = 0; half < 2; ++half) {
      const int8_t* tile = tiles + 64 * half;
      const int16_t* tile_starts = operand_starts + 32 * half;
      uint32_t* found = reinterpret_cast<uint32_t*>(survivors) + half;
      int64_t r = 0;
      for (; r + 5 + 4 * fours <= count; r += 5) scan_some_stages<5>(staged, r, tile, tile_starts, found + 2 * r * mask_stride, mask_stride);
      for (; r + 4 <= count; r += 4) scan_some_stages<4>(staged, r, tile, tile_starts, found + 2 * r * mask_stride, mask_stride);
      for (; r < count; ++r) scan_some_stages<1>(staged, r, tile, tile_starts, found + 2 * r * mask_stride, mask_stride);
    }
  }
  survivors -= num_tiles;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t t = 0; floors[r] < -kMostRoom && t < num_tiles; ++t) survivors[r * mask_stride + t] = ~uint64_t{0};
  }
}

// ---- Single dot products --------------------------------------------------------------------------------------------------------------------------

// Sixteen codes of a row times those of each of some operands: here codes need all of int8, so both sides are widened.
template <int kOperands>
static inline void add_sixteen(const uint8_t* row, const int8_t* const* operands, int64_t at, __m256i* sums) {
  const __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + at)));
#pragma GCC unroll 4
  for (int q = 0; q < kOperands; ++q) {
    const __m256i operand = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(operands[q] + at)));
    sums[q] = _mm256_add_epi32(sums[q], _mm256_madd_epi16(codes, operand));
  }
}

// Thirty-two at a time without widening: a row's code is 2 h + l with h <= 127 and l <= 1, so that two products of h, 2 * 127 * 127 at most, do not
// saturate in vpmaddubsw. Sums of products of l grow by 254 at most and stay in 16 bits for 128 times as many codes.
template <int kOperands>
static inline void add_thirty_two(const uint8_t* row, const int8_t* const* operands, int64_t at, __m256i* sums, __m256i* low_sums) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + at));
  const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi8(1));
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 1), _mm256_set1_epi8(127));
#pragma GCC unroll 4
  for (int q = 0; q < kOperands; ++q) {
    const __m256i operand = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(operands[q] + at));
    sums[q] = _mm256_add_epi32(sums[q], _mm256_madd_epi16(_mm256_maddubs_epi16(high, operand), _mm256_set1_epi16(2)));
    low_sums[q] = _mm256_add_epi16(low_sums[q], _mm256_maddubs_epi16(low, operand));
  }
}

template <int kOperands>
static inline void some_dots(const uint8_t* row, const int8_t* const* operands, int64_t words, int64_t coarse, int64_t shift, int32_t* out) {
  constexpr int64_t kMostLow = 128 * 32;
  const int64_t length = 4 * words;
  __m256i sums[kOperands];
#pragma GCC unroll 4
  for (int q = 0; q < kOperands; ++q) sums[q] = _mm256_setzero_si256();
  int64_t b = 0;
  for (; b < 4 * coarse; b += 16) add_sixteen<kOperands>(row, operands, b, sums);
#pragma GCC unroll 4
  for (int q = 0; q < kOperands; ++q) sums[q] = _mm256_sll_epi32(sums[q], _mm_cvtsi64_si128(shift));
  while (b + 32 <= length) {
    __m256i low_sums[kOperands];
#pragma GCC unroll 4
    for (int q = 0; q < kOperands; ++q) low_sums[q] = _mm256_setzero_si256();
    for (const int64_t end = b + kMostLow < length ? b + kMostLow : length; b + 32 <= end; b += 32) {
      add_thirty_two<kOperands>(row, operands, b, sums, low_sums);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kOperands; ++q) sums[q] = _mm256_add_epi32(sums[q], _mm256_madd_epi16(low_sums[q], _mm256_set1_epi16(1)));
  }
  if (b + 16 <= length) {
    add_sixteen<kOperands>(row, operands, b, sums);
    b += 16;
  }
#pragma GCC unroll 4
  for (int q = 0; q < kOperands; ++q) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums[q]), _mm256_extracti128_si256(sums[q], 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    out[q] = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    for (int64_t rest = b; rest < length; ++rest) out[q] += row[rest] * operands[q][rest];
  }
}

static inline void prefetch_codes(const int8_t* codes, int64_t length) {
  for (int64_t b = 0; b < length; b += 64) __builtin_prefetch(codes + b);
}

void dots(const uint8_t* row, const int8_t* operands, int64_t stride, const int32_t* which, int64_t count, int64_t words, int64_t coarse,
          int64_t shift, int32_t* out) {
  constexpr int64_t kAhead = 16;  // operands that are asked for early; measured: 4 and 32 are slower
  for (int64_t i = 0; i < count && i < kAhead; ++i) prefetch_codes(operands + which[i] * stride, 4 * words);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const int8_t* four[4];
    for (int q = 0; q < 4; ++q) four[q] = operands + which[i + q] * stride;
    for (int64_t q = i + kAhead; q < i + kAhead + 4 && q < count; ++q) prefetch_codes(operands + which[q] * stride, 4 * words);
    some_dots<4>(row, four, words, coarse, shift, out + i);
  }
  for (; i < count; ++i) {
    const int8_t* one = operands + which[i] * stride;
    some_dots<1>(row, &one, words, coarse, shift, out + i);
  }
}

}  // namespace patchcore::avx2

#pragma GCC pop_options

#endif
