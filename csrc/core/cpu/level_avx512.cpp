// AVX-512 level. The 16 canonical lanes lie in two registers of eight doubles, so the additions happen in the order of distance.h.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/dispatch.h"
#include "cpu/level_avx2.h"
#include "cpu/level_avx512.h"

// Everything below is compiled for AVX-512; no function of a header may be instantiated here, or the linker could keep this copy for every processor.
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (GCC bug 105593)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC push_options
#pragma GCC target("avx2,f16c,bmi,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

namespace patchcore {

namespace avx512 {

static inline __m512d add_square(__m512d lane, __m256 a, __m256 b) {
  const __m512d difference = _mm512_sub_pd(_mm512_cvtps_pd(a), _mm512_cvtps_pd(b));
  return _mm512_add_pd(lane, _mm512_mul_pd(difference, difference));
}

static inline double squared_distance(const float* a, const float* b, int64_t dim) {
  __m512d lane0 = _mm512_setzero_pd(), lane8 = lane0;
  int64_t j = 0;
  for (; j + 16 <= dim; j += 16) {
    lane0 = add_square(lane0, _mm256_loadu_ps(a + j), _mm256_loadu_ps(b + j));
    lane8 = add_square(lane8, _mm256_loadu_ps(a + j + 8), _mm256_loadu_ps(b + j + 8));
  }
  if (j < dim) {  // the last terms, padded with zeros by the mask
    const unsigned int mask = (1u << (dim - j)) - 1;
    const __mmask8 low = static_cast<__mmask8>(mask), high = static_cast<__mmask8>(mask >> 8);
    lane0 = add_square(lane0, _mm256_maskz_loadu_ps(low, a + j), _mm256_maskz_loadu_ps(low, b + j));
    lane8 = add_square(lane8, _mm256_maskz_loadu_ps(high, a + j + 8), _mm256_maskz_loadu_ps(high, b + j + 8));
  }
  const __m512d eight = _mm512_add_pd(lane0, lane8);
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

void squared_distances(const float* query, const float* rows, int64_t stride, int64_t count, int64_t dim, double* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = squared_distance(query, rows + i * stride, dim);
}

void float16_to_float(const uint16_t* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
  const __mmask16 rest = static_cast<__mmask16>((1u << (count - i)) - 1);
  _mm512_mask_storeu_ps(out + i, rest, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(rest, in + i)));
}

void bfloat16_to_float(const uint16_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = count - i >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << (count - i)) - 1);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, in + i));
    _mm512_mask_storeu_epi32(out + i, mask, _mm512_slli_epi32(wide, 16));
  }
}

// filter.h, section 5, eight rows at a time and operation by operation: the same integers.
void int8_floors(const double* reach, const int32_t* squared_norms, int64_t count, double residual, int32_t* floors) {
  const __m512d inflation = _mm512_set1_pd(1.0 + 4 * 0x1p-52), most = _mm512_set1_pd(2147483646.0);
  for (int64_t r = 0; r < count; r += 8) {
    const __m512d wish = _mm512_loadu_pd(reach + r);
    const __m512d radius = _mm512_add_pd(wish, _mm512_set1_pd(residual));
    const __m512d bound = _mm512_mul_pd(_mm512_mul_pd(radius, radius), inflation);
    const __m256i limit =
        _mm256_add_epi32(_mm512_cvttpd_epi32(_mm512_min_pd(bound, most)), _mm256_set1_epi32(1));  // NaN: the second operand, never skip
    const __m256i norms = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(squared_norms + r));
    const __m256i floor = _mm256_srai_epi32(_mm256_add_epi32(_mm256_sub_epi32(norms, limit), _mm256_set1_epi32(2)), 1);
    // reach < 0: the limit is INT32_MIN and the difference does not fit 32 bits; (n + 2^31 + 2) >> 1 is (n + 2) >> 1 plus 2^30.
    const __m256i always = _mm256_add_epi32(_mm256_srai_epi32(_mm256_add_epi32(norms, _mm256_set1_epi32(2)), 1), _mm256_set1_epi32(1 << 30));
    const __mmask8 skip = _mm512_cmp_pd_mask(wish, _mm512_setzero_pd(), _CMP_LT_OQ);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(floors + r), _mm256_mask_mov_epi32(floor, skip, always));
  }
}

int64_t first_largest(const double* values, int64_t count) {
  __m512d most = _mm512_loadu_pd(values);
  for (int64_t i = 8; i < count; i += 8) most = _mm512_max_pd(most, _mm512_loadu_pd(values + i));
  const __m512d best = _mm512_set1_pd(_mm512_reduce_max_pd(most));
  for (int64_t i = 0;; i += 8) {
    const __mmask8 equal = _mm512_cmp_pd_mask(_mm512_loadu_pd(values + i), best, _CMP_EQ_OQ);
    if (equal != 0) return i + __builtin_ctz(equal);
  }
}

// filter.h, int8_code, eight coordinates at a time.
int32_t quantize(const double* coordinates, int64_t count, double scale, int32_t most, uint8_t* codes, double* error_squares) {
  const __m512d high = _mm512_set1_pd(most), low = _mm512_set1_pd(-most), magic = _mm512_set1_pd(0x1.8p52);
  __m512d errors = _mm512_setzero_pd();
  __m256i squares = _mm256_setzero_si256();
  for (int64_t k = 0; k < count; k += 8) {
    const __mmask8 mask = count - k >= 8 ? static_cast<__mmask8>(0xff) : static_cast<__mmask8>((1u << (count - k)) - 1);
    const __m512d scaled = _mm512_mul_pd(_mm512_set1_pd(scale), _mm512_maskz_loadu_pd(mask, coordinates + k));
    const __m512d clipped = _mm512_max_pd(_mm512_min_pd(scaled, high), low);
    const __m512d code = _mm512_sub_pd(_mm512_add_pd(clipped, magic), magic);
    const __m512d error = _mm512_sub_pd(clipped, code);
    errors = _mm512_add_pd(errors, _mm512_mul_pd(error, error));
    const __m256i integers = _mm512_cvtpd_epi32(code);
    squares = _mm256_add_epi32(squares, _mm256_mullo_epi32(integers, integers));
    _mm256_mask_cvtepi32_storeu_epi8(codes + k, mask, _mm256_add_epi32(integers, _mm256_set1_epi32(most + 1)));
  }
  *error_squares = _mm512_reduce_add_pd(errors);
  return _mm512_reduce_add_epi32(_mm512_zextsi256_si512(squares));
}

// kGroups * 8 outputs at a time, each group's sum in a register.
template <int kGroups>
static inline void multiply_groups(const double* x, const double* matrix, int64_t dim, int64_t outputs, double* products) {
  __m512d sums[kGroups];
  for (int g = 0; g < kGroups; ++g) sums[g] = _mm512_setzero_pd();
  for (int64_t k = 0; k < dim; ++k) {
    const __m512d value = _mm512_set1_pd(x[k]);
    for (int g = 0; g < kGroups; ++g) sums[g] = _mm512_add_pd(sums[g], _mm512_mul_pd(value, _mm512_loadu_pd(matrix + k * outputs + 8 * g)));
  }
  for (int g = 0; g < kGroups; ++g) _mm512_storeu_pd(products + 8 * g, sums[g]);
}

void multiply_matrix(const double* x, const double* matrix, int64_t dim, int64_t outputs, double* products) {
  int64_t o = 0;
  for (; o + 48 <= outputs; o += 48) multiply_groups<6>(x, matrix + o, dim, outputs, products + o);
  for (; o < outputs; o += 8) multiply_groups<1>(x, matrix + o, dim, outputs, products + o);
}

static inline __m512i add_pair_products(__m512i sum, __m512i pair, __m512i operands) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(pair), "v"(operands));
  return sum;
}

// kRows rows and 16 * kParts outputs: kRows * kParts accumulators stay in registers.
template <int kRows, int kParts>
static inline void multiply_some_rows(const int16_t* rows, int64_t stride, const int16_t* tile, int64_t pairs, int32_t* products,
                                      int64_t products_stride) {
  __m512i sums[kRows][kParts];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < kParts; ++q) sums[r][q] = _mm512_setzero_si512();
  }
  for (int64_t w = 0; w < pairs; ++w, tile += 2 * kTileOperands) {
    __m512i operands[kParts];
#pragma GCC unroll 4
    for (int q = 0; q < kParts; ++q) operands[q] = _mm512_loadu_si512(tile + 32 * q);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      int32_t two;
      __builtin_memcpy(&two, rows + r * stride + 2 * w, 4);
      const __m512i pair = _mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int q = 0; q < kParts; ++q) sums[r][q] = add_pair_products(sums[r][q], pair, operands[q]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < kParts; ++q) _mm512_storeu_si512(products + r * products_stride + 16 * q, sums[r][q]);
  }
}

template <int kParts>
static inline void multiply_rows(const int16_t* rows, int64_t stride, int64_t count, const int16_t* tile, int64_t pairs, int32_t* products,
                                 int64_t products_stride) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4)
    multiply_some_rows<4, kParts>(rows + r * stride, stride, tile, pairs, products + r * products_stride, products_stride);
  for (; r < count; ++r) multiply_some_rows<1, kParts>(rows + r * stride, stride, tile, pairs, products + r * products_stride, products_stride);
}

void multiply_int16(const int16_t* rows, int64_t stride, int64_t count, const int16_t* tile, int64_t pairs, int64_t outputs, int32_t* products,
                    int64_t products_stride) {
  if (outputs <= 32) {
    multiply_rows<2>(rows, stride, count, tile, pairs, products, products_stride);
  } else {
    multiply_rows<4>(rows, stride, count, tile, pairs, products, products_stride);
  }
}

// filter.h, rounded_code, eight coordinates at a time.
double round_to_steps(const float* x, const double* center, int64_t count, double scale, double most, int16_t* steps, double* error_squares) {
  const __m512d high = _mm512_set1_pd(most), low = _mm512_set1_pd(-most), magic = _mm512_set1_pd(0x1.8p52), factor = _mm512_set1_pd(scale);
  __m512d errors = _mm512_setzero_pd(), squares = errors;
  const auto eight = [&](__m512d value, __m512d centers) {
    const __m512d scaled = _mm512_mul_pd(factor, _mm512_sub_pd(value, centers));
    const __m512d clipped = _mm512_max_pd(low, _mm512_min_pd(high, scaled));  // NaN: the second operand
    const __m512d code = _mm512_sub_pd(_mm512_add_pd(clipped, magic), magic);
    const __m512d error = _mm512_sub_pd(clipped, code);
    errors = _mm512_fmadd_pd(error, error, errors);
    squares = _mm512_fmadd_pd(code, code, squares);
    return _mm512_cvtpd_epi32(code);
  };
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    const __m256i codes = eight(_mm512_cvtps_pd(_mm256_loadu_ps(x + j)), _mm512_loadu_pd(center + j));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(steps + j), _mm256_cvtepi32_epi16(codes));
  }
  if (j < count) {
    const __mmask8 mask = static_cast<__mmask8>((1u << (count - j)) - 1);
    const __m256i codes = eight(_mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, x + j)), _mm512_maskz_loadu_pd(mask, center + j));
    _mm256_mask_cvtepi32_storeu_epi16(steps + j, mask, codes);
  }
  *error_squares = _mm512_reduce_add_pd(errors);
  return _mm512_reduce_add_pd(squares);
}

// filter.h, step_code, thirty-two steps at a time.
int32_t coarsen_steps(const int16_t* steps, int64_t count, int64_t bits, uint8_t* codes, int32_t* error_squares) {
  const __m128i shift = _mm_cvtsi64_si128(bits);
  const __m512i half = _mm512_set1_epi16(static_cast<int16_t>((1 << bits) >> 1));
  const __m512i high = _mm512_set1_epi16(kMaxCode), low = _mm512_set1_epi16(-kMaxCode);
  const __m512i most = _mm512_sll_epi16(high, shift), least = _mm512_sll_epi16(low, shift);
  __m512i norms = _mm512_setzero_si512(), errors = norms;
  for (int64_t j = 0; j < count; j += 32) {
    const __mmask32 mask = count - j >= 32 ? ~uint32_t{0} : (uint32_t{1} << (count - j)) - 1;
    const __m512i step = _mm512_maskz_loadu_epi16(mask, steps + j);
    const __m512i nearest = _mm512_sra_epi16(_mm512_add_epi16(step, half), shift);
    const __m512i code = _mm512_max_epi16(_mm512_min_epi16(nearest, high), low);
    const __m512i clipped = _mm512_max_epi16(_mm512_min_epi16(step, most), least);
    const __m512i error = _mm512_sub_epi16(clipped, _mm512_sll_epi16(code, shift));
    norms = _mm512_add_epi32(norms, _mm512_madd_epi16(code, code));
    errors = _mm512_add_epi32(errors, _mm512_madd_epi16(error, error));
    _mm512_mask_cvtepi16_storeu_epi8(codes + j, mask, _mm512_add_epi16(code, _mm512_set1_epi16(kMaxCode + 1)));
  }
  *error_squares = _mm512_reduce_add_epi32(errors);
  return _mm512_reduce_add_epi32(norms);
}

bool all_finite(const float* values, int64_t count) {
  constexpr int kInfinitiesAndNans = 0x99;
  __mmask16 found = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) found |= _mm512_fpclass_ps_mask(_mm512_loadu_ps(values + i), kInfinitiesAndNans);
  const __mmask16 rest = static_cast<__mmask16>((1u << (count - i)) - 1);
  found |= _mm512_fpclass_ps_mask(_mm512_maskz_loadu_ps(rest, values + i), kInfinitiesAndNans);
  return found == 0;
}

float squared_difference(const float* a, const float* b, int64_t dim) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t j = 0;
  for (; j + 64 <= dim; j += 64) {
    for (int q = 0; q < 4; ++q) {
      const __m512 difference = _mm512_sub_ps(_mm512_loadu_ps(a + j + 16 * q), _mm512_loadu_ps(b + j + 16 * q));
      sums[q] = _mm512_fmadd_ps(difference, difference, sums[q]);
    }
  }
  for (; j < dim; j += 16) {
    const __mmask16 mask = dim - j >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << (dim - j)) - 1);
    const __m512 difference = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, a + j), _mm512_maskz_loadu_ps(mask, b + j));
    sums[0] = _mm512_fmadd_ps(difference, difference, sums[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

}  // namespace avx512

using namespace avx512;

// Of D = 384: fewer rows take 0.9 (Sapphire Rapids) to 0.97 (Zen 4) of the time without stages, 15,680 rows 1.03.
constexpr int64_t kFewestStagedRows = 4096;

const Level kAvx512Level = {"avx512",
                            kMaxCode,
                            squared_distances,
                            float16_to_float,
                            bfloat16_to_float,
                            scan_rows,
                            4,
                            kFewestStagedRows,
                            4,
                            scan_stages,
                            scan_tile,
                            dots,
                            int8_floors,
                            first_largest,
                            quantize,
                            multiply_matrix,
                            multiply_int16,
                            round_to_steps,
                            coarsen_steps,
                            all_finite,
                            avx2::take_marked,
                            squared_difference,
                            {0.0167, 1.7, 0.05, 0.25}};

}  // namespace patchcore

#pragma GCC pop_options

#endif
