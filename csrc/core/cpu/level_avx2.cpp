// AVX2 level. The 16 canonical lanes lie in four registers of four doubles, so the additions happen in the order of distance.h.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/dispatch.h"

// Everything below is compiled for AVX2; no function of a header may be instantiated here, or the linker could keep this copy for every processor.
#pragma GCC push_options
#pragma GCC target("avx2,f16c")

namespace patchcore {

namespace {

inline __m256d add_square(__m256d lane, const float* a, const float* b) {
  const __m256d difference = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(a)), _mm256_cvtps_pd(_mm_loadu_ps(b)));
  return _mm256_add_pd(lane, _mm256_mul_pd(difference, difference));
}

inline double squared_distance(const float* a, const float* b, int64_t dim) {
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

}  // namespace

const Level kAvx2Level = {"avx2", squared_distances, float16_to_float, bfloat16_to_float};

}  // namespace patchcore

#pragma GCC pop_options

#endif
