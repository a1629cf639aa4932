// AVX2 level. The 16 canonical lanes lie in four registers of four doubles, so the additions happen in the order of distance.h.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/dispatch.h"
#include "cpu/level_avx2.h"

// Everything below is compiled for AVX2; no function of a header may be instantiated here, or the linker could keep this copy for every processor.
#pragma GCC push_options
#pragma GCC target("avx2,f16c,bmi,popcnt")

namespace patchcore {

namespace avx2 {

static inline __m256d add_square(__m256d lane, const float* a, const float* b) {
  const __m256d difference = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(a)), _mm256_cvtps_pd(_mm_loadu_ps(b)));
  return _mm256_add_pd(lane, _mm256_mul_pd(difference, difference));
}

static inline double squared_distance(const float* a, const float* b, int64_t dim) {
  __m256d lane0 = _mm256_setzero_pd(), lane4 = lane0, lane8 = lane0, lane12 = lane0;
  int64_t j = 0;
  for (; j + 16 <= dim; j += 16) {
    lane0 = add_square(lane0, a + j, b + j);
    lane4 = add_square(lane4, a + j + 4, b + j + 4);
    lane8 = add_square(lane8, a + j + 8, b + j + 8);
    lane12 = add_square(lane12, a + j + 12, b + j + 12);
  }
  if (j < dim) {  // the last terms, padded with zeros
    float tail_a[16] = {}, tail_b[16] = {};
    for (int64_t l = 0; j + l < dim; ++l) {
      tail_a[l] = a[j + l];
      tail_b[l] = b[j + l];
    }
    lane0 = add_square(lane0, tail_a, tail_b);
    lane4 = add_square(lane4, tail_a + 4, tail_b + 4);
    lane8 = add_square(lane8, tail_a + 8, tail_b + 8);
    lane12 = add_square(lane12, tail_a + 12, tail_b + 12);
  }
  const __m256d four = _mm256_add_pd(_mm256_add_pd(lane0, lane8), _mm256_add_pd(lane4, lane12));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

void squared_distances(const float* query, const float* rows, int64_t stride, int64_t count, int64_t dim, double* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = squared_distance(query, rows + i * stride, dim);
}

void float16_to_float(const uint16_t* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < count; ++i) out[i] = _cvtsh_ss(in[i]);
}

void bfloat16_to_float(const uint16_t* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_slli_epi32(wide, 16));
  }
  for (; i < count; ++i) out[i] = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(static_cast<uint32_t>(in[i]) << 16))));
}

// filter.h, section 5, four rows at a time and operation by operation: the same integers.
void int8_floors(const double* reach, const int32_t* squared_norms, int64_t count, double residual, int32_t* floors) {
  const __m256d inflation = _mm256_set1_pd(1.0 + 4 * 0x1p-52), most = _mm256_set1_pd(2147483646.0), zero = _mm256_setzero_pd();
  for (int64_t r = 0; r < count; r += 4) {
    const __m256d wish = _mm256_loadu_pd(reach + r);
    const __m256d radius = _mm256_add_pd(wish, _mm256_set1_pd(residual));
    const __m256d bound = _mm256_mul_pd(_mm256_mul_pd(radius, radius), inflation);
    const __m128i limit = _mm_add_epi32(_mm256_cvttpd_epi32(_mm256_min_pd(bound, most)), _mm_set1_epi32(1));  // NaN: the second operand, never skip
    const __m128i norms = _mm_loadu_si128(reinterpret_cast<const __m128i*>(squared_norms + r));
    const __m128i floor = _mm_srai_epi32(_mm_add_epi32(_mm_sub_epi32(norms, limit), _mm_set1_epi32(2)), 1);
    // reach < 0: the limit is INT32_MIN and the difference does not fit 32 bits; (n + 2^31 + 2) >> 1 is (n + 2) >> 1 plus 2^30.
    const __m128i always = _mm_add_epi32(_mm_srai_epi32(_mm_add_epi32(norms, _mm_set1_epi32(2)), 1), _mm_set1_epi32(1 << 30));
    const __m256i skip = _mm256_castpd_si256(_mm256_cmp_pd(wish, zero, _CMP_LT_OQ));
    const __m128i skip32 = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(skip, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(floors + r), _mm_blendv_epi8(floor, always, skip32));
  }
}

int64_t first_largest(const double* values, int64_t count) {
  __m256d low = _mm256_loadu_pd(values), high = _mm256_loadu_pd(values + 4);
  for (int64_t i = 8; i < count; i += 8) {
    low = _mm256_max_pd(low, _mm256_loadu_pd(values + i));
    high = _mm256_max_pd(high, _mm256_loadu_pd(values + i + 4));
  }
  const __m256d four = _mm256_max_pd(low, high);
  const __m128d two = _mm_max_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  const __m256d best = _mm256_set1_pd(_mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two))));
  for (int64_t i = 0;; i += 4) {
    const int equal = _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(values + i), best, _CMP_EQ_OQ));
    if (equal != 0) return i + __builtin_ctz(static_cast<unsigned int>(equal));
  }
}

// filter.h, int8_code, four coordinates at a time.
namespace {

struct QuantizeSums {
  __m256d errors;
  __m128i squares;
};

}  // namespace

static inline __m128i quantize_four(__m256d coordinates, __m256d scale, __m256d most, QuantizeSums* sums) {
  const __m256d magic = _mm256_set1_pd(0x1.8p52);
  const __m256d least = _mm256_sub_pd(_mm256_setzero_pd(), most);
  const __m256d clipped = _mm256_max_pd(_mm256_min_pd(_mm256_mul_pd(scale, coordinates), most), least);
  const __m256d code = _mm256_sub_pd(_mm256_add_pd(clipped, magic), magic);
  const __m256d error = _mm256_sub_pd(clipped, code);
  sums->errors = _mm256_add_pd(sums->errors, _mm256_mul_pd(error, error));
  const __m128i integers = _mm256_cvtpd_epi32(code);
  sums->squares = _mm_add_epi32(sums->squares, _mm_mullo_epi32(integers, integers));
  return integers;
}

int32_t quantize(const double* coordinates, int64_t count, double scale, int32_t most, uint8_t* codes, double* error_squares) {
  const __m256d factor = _mm256_set1_pd(scale), limit = _mm256_set1_pd(most);
  QuantizeSums sums = {_mm256_setzero_pd(), _mm_setzero_si128()};
  for (int64_t k = 0; k < count; k += 8) {
    double eight[8] = {};
    const int64_t taken = count - k < 8 ? count - k : 8;
    const double* from = coordinates + k;
    if (taken < 8) {
      for (int64_t i = 0; i < taken; ++i) eight[i] = from[i];
      from = eight;
    }
    const __m128i low = quantize_four(_mm256_loadu_pd(from), factor, limit, &sums);
    const __m128i high = quantize_four(_mm256_loadu_pd(from + 4), factor, limit, &sums);
    const __m128i words = _mm_packs_epi32(low, high);
    const __m128i bytes = _mm_add_epi8(_mm_packs_epi16(words, words), _mm_set1_epi8(static_cast<char>(most + 1)));
    if (taken == 8) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + k), bytes);
    } else {
      uint8_t some[16];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(some), bytes);
      __builtin_memcpy(codes + k, some, static_cast<unsigned long>(taken));
    }
  }
  double errors[4];
  int32_t squares[4];
  _mm256_storeu_pd(errors, sums.errors);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(squares), sums.squares);
  *error_squares = (errors[0] + errors[1]) + (errors[2] + errors[3]);
  return (squares[0] + squares[1]) + (squares[2] + squares[3]);
}

void multiply_matrix(const double* x, const double* matrix, int64_t dim, int64_t outputs, double* products) {
  for (int64_t o = 0; o < outputs; o += 8) {
    __m256d low = _mm256_setzero_pd(), high = low;
    for (int64_t k = 0; k < dim; ++k) {
      const __m256d value = _mm256_set1_pd(x[k]);
      low = _mm256_add_pd(low, _mm256_mul_pd(value, _mm256_loadu_pd(matrix + k * outputs + o)));
      high = _mm256_add_pd(high, _mm256_mul_pd(value, _mm256_loadu_pd(matrix + k * outputs + o + 4)));
    }
    _mm256_storeu_pd(products + o, low);
    _mm256_storeu_pd(products + o + 4, high);
  }
}

// Part by part of the tile, which then stays in the first-level cache for all rows. Two rows and 32 outputs at a time: their sums stay in registers.
void multiply_int16(const int16_t* rows, int64_t stride, int64_t count, const int16_t* tile, int64_t pairs, int64_t outputs, int32_t* products,
                    int64_t products_stride) {
  constexpr int64_t kPart = 64;  // pairs: 16 KiB
  for (int64_t begin = 0; begin < pairs; begin += kPart) {
    const int64_t end = begin + kPart < pairs ? begin + kPart : pairs;
    for (int64_t r = 0; r < count; r += 2) {
      const int16_t *first = rows + r * stride, *second = r + 1 < count ? first + stride : first;
      for (int64_t o = 0; o < outputs; o += 32) {
        __m256i* out[2] = {reinterpret_cast<__m256i*>(products + r * products_stride + o),
                           reinterpret_cast<__m256i*>(products + (r + (r + 1 < count)) * products_stride + o)};
        __m256i sums[2][4];
        for (int q = 0; q < 4; ++q) {
          for (int l = 0; l < 2; ++l) sums[l][q] = begin == 0 ? _mm256_setzero_si256() : _mm256_loadu_si256(out[l] + q);
        }
        for (int64_t w = begin; w < end; ++w) {
          int32_t a, b;
          __builtin_memcpy(&a, first + 2 * w, 4);
          __builtin_memcpy(&b, second + 2 * w, 4);
          const __m256i pair0 = _mm256_set1_epi32(a), pair1 = _mm256_set1_epi32(b);
          for (int q = 0; q < 4; ++q) {
            const __m256i operands = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + (w * kTileOperands + o + 8 * q) * 2));
            sums[0][q] = _mm256_add_epi32(sums[0][q], _mm256_madd_epi16(pair0, operands));
            sums[1][q] = _mm256_add_epi32(sums[1][q], _mm256_madd_epi16(pair1, operands));
          }
        }
        for (int q = 0; q < 4; ++q) {
          for (int l = 0; l < 2; ++l) _mm256_storeu_si256(out[l] + q, sums[l][q]);
        }
      }
    }
  }
}

// filter.h, rounded_code, four coordinates at a time.
double round_to_steps(const float* x, const double* center, int64_t count, double scale, double most, int16_t* steps, double* error_squares) {
  const __m256d high = _mm256_set1_pd(most), low = _mm256_set1_pd(-most), magic = _mm256_set1_pd(0x1.8p52), factor = _mm256_set1_pd(scale);
  __m256d errors = _mm256_setzero_pd(), squares = errors;
  for (int64_t j = 0; j < count; j += 4) {
    float few[4] = {};
    double few_centers[4] = {};
    const int64_t taken = count - j < 4 ? count - j : 4;
    const float* values = x + j;
    const double* centers = center + j;
    if (taken < 4) {
      __builtin_memcpy(few, values, static_cast<unsigned long>(taken) * 4);
      __builtin_memcpy(few_centers, centers, static_cast<unsigned long>(taken) * 8);
      values = few;
      centers = few_centers;
    }
    const __m256d scaled = _mm256_mul_pd(factor, _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(values)), _mm256_loadu_pd(centers)));
    const __m256d clipped = _mm256_max_pd(low, _mm256_min_pd(high, scaled));  // NaN: the second operand
    const __m256d code = _mm256_sub_pd(_mm256_add_pd(clipped, magic), magic);
    const __m256d error = _mm256_sub_pd(clipped, code);
    errors = _mm256_add_pd(errors, _mm256_mul_pd(error, error));
    squares = _mm256_add_pd(squares, _mm256_mul_pd(code, code));
    const __m128i integers = _mm256_cvtpd_epi32(code), narrow = _mm_packs_epi32(integers, integers);
    if (taken == 4) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(steps + j), narrow);
    } else {
      int16_t some[8];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(some), narrow);
      __builtin_memcpy(steps + j, some, static_cast<unsigned long>(taken) * 2);
    }
  }
  double sums[4], norms[4];
  _mm256_storeu_pd(sums, errors);
  _mm256_storeu_pd(norms, squares);
  *error_squares = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return (norms[0] + norms[1]) + (norms[2] + norms[3]);
}

// Bit m of the result is set iff word m is not zero; count <= 64.
static inline uint64_t words_not_zero(const uint64_t* words, int64_t count) {
  uint64_t zero = 0;
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) {
    const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + m));
    const int equal = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(four, _mm256_setzero_si256())));
    zero |= static_cast<uint64_t>(equal) << m;
  }
  for (; m < count; ++m) zero |= static_cast<uint64_t>(words[m] == 0) << m;
  return ~zero & ~uint64_t{0} >> (64 - count);
}

// Straight to the words that are not zero; and of a word four at a time without asking how many are left. A mispredicted branch costs more than a
// store too many.
// filter.h, step_code, sixteen steps at a time.
int32_t coarsen_steps(const int16_t* steps, int64_t count, int64_t bits, uint8_t* codes, int32_t* error_squares) {
  const __m128i shift = _mm_cvtsi64_si128(bits);
  const __m256i half = _mm256_set1_epi16(static_cast<int16_t>((1 << bits) >> 1));
  const __m256i high = _mm256_set1_epi16(127), low = _mm256_set1_epi16(-127);
  const __m256i most = _mm256_sll_epi16(high, shift), least = _mm256_sll_epi16(low, shift);
  __m256i norms = _mm256_setzero_si256(), errors = norms;
  for (int64_t j = 0; j < count; j += 16) {
    int16_t some[16] = {};
    const int64_t taken = count - j < 16 ? count - j : 16;
    const int16_t* from = steps + j;
    if (taken < 16) {
      __builtin_memcpy(some, from, static_cast<unsigned long>(taken) * 2);
      from = some;
    }
    const __m256i step = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i nearest = _mm256_sra_epi16(_mm256_add_epi16(step, half), shift);
    const __m256i code = _mm256_max_epi16(_mm256_min_epi16(nearest, high), low);
    const __m256i clipped = _mm256_max_epi16(_mm256_min_epi16(step, most), least);
    const __m256i error = _mm256_sub_epi16(clipped, _mm256_sll_epi16(code, shift));
    norms = _mm256_add_epi32(norms, _mm256_madd_epi16(code, code));
    errors = _mm256_add_epi32(errors, _mm256_madd_epi16(error, error));
    const __m256i stored = _mm256_add_epi16(code, _mm256_set1_epi16(128));
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(stored), _mm256_extracti128_si256(stored, 1));
    if (taken == 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + j), bytes);
    } else {
      uint8_t last[16];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(last), bytes);
      __builtin_memcpy(codes + j, last, static_cast<unsigned long>(taken));
    }
  }
  int32_t sums[8], squares[8], total = 0;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), errors);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(squares), norms);
  *error_squares = 0;
  for (int l = 0; l < 8; ++l) {
    *error_squares += sums[l];
    total += squares[l];
  }
  return total;
}

// A value is finite if its bits without the sign are below those of infinity.
bool all_finite(const float* values, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256(), other = most;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    most = _mm256_max_epi32(most, _mm256_and_si256(magnitude, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i))));
    other = _mm256_max_epi32(other, _mm256_and_si256(magnitude, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i + 8))));
  }
  int32_t rest = 0;
  for (; i < count; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, values + i, 4);
    bits &= 0x7fffffff;
    rest = bits > rest ? bits : rest;
  }
  const __m256i infinite = _mm256_cmpgt_epi32(_mm256_max_epi32(most, other), _mm256_set1_epi32(0x7f7fffff));
  return _mm256_testz_si256(infinite, infinite) != 0 && rest < 0x7f800000;
}

int64_t take_marked(const uint64_t* words, int64_t count, int32_t first, int32_t* found) {
  int64_t taken = 0;
  for (int64_t begin = 0; begin < count; begin += 64) {
    const int64_t some = count - begin < 64 ? count - begin : 64;
    for (uint64_t live = words_not_zero(words + begin, some); live != 0; live = _blsr_u64(live)) {
      const int64_t m = begin + static_cast<int64_t>(_tzcnt_u64(live));
      uint64_t left = words[m];
      const int64_t marked = __builtin_popcountll(left);
      for (int64_t i = 0; i < marked; i += 4) {
        for (int64_t l = 0; l < 4; ++l) {
          found[taken + i + l] = first + static_cast<int32_t>(64 * m + static_cast<int64_t>(_tzcnt_u64(left)));
          left = _blsr_u64(left);
        }
      }
      taken += marked;
    }
  }
  return taken;
}

float squared_difference(const float* a, const float* b, int64_t dim) {
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t j = 0;
  for (; j + 16 <= dim; j += 16) {
    for (int q = 0; q < 2; ++q) {
      const __m256 difference = _mm256_sub_ps(_mm256_loadu_ps(a + j + 8 * q), _mm256_loadu_ps(b + j + 8 * q));
      sums[q] = _mm256_add_ps(sums[q], _mm256_mul_ps(difference, difference));
    }
  }
  float lanes[8], rest = 0;
  _mm256_storeu_ps(lanes, _mm256_add_ps(sums[0], sums[1]));
  for (; j < dim; ++j) rest += (a[j] - b[j]) * (a[j] - b[j]);
  for (int l = 0; l < 8; ++l) rest += lanes[l];
  return rest;
}

}  // namespace avx2

using namespace avx2;

const Level kAvx2Level = {"avx2",
                          kScannedCode,
                          squared_distances,
                          float16_to_float,
                          bfloat16_to_float,
                          scan_rows,
                          4,
                          kAlwaysStaged,
                          2,
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
                          take_marked,
                          squared_difference,
                          {0.037, 3, 0.18, 0.25}};

}  // namespace patchcore

#pragma GCC pop_options

#endif
