// AVX-512 level. The 16 canonical lanes lie in two registers of eight doubles, so the additions happen in the order of distance.h.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/dispatch.h"

// Everything below is compiled for AVX-512; no function of a header may be instantiated here, or the linker could keep this copy for every processor.
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (GCC bug 105593)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC push_options
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq")

namespace patchcore {

namespace {

inline __m512d add_square(__m512d lane, __m256 a, __m256 b) {
  const __m512d difference = _mm512_sub_pd(_mm512_cvtps_pd(a), _mm512_cvtps_pd(b));
  return _mm512_add_pd(lane, _mm512_mul_pd(difference, difference));
}

inline double squared_distance(const float* a, const float* b, int64_t dim) {
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

}  // namespace

const Level kAvx512Level = {"avx512", squared_distances, float16_to_float, bfloat16_to_float};

}  // namespace patchcore

#pragma GCC pop_options

#endif
