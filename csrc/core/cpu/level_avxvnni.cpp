// AVX2 with the dot-product instruction of AVX-VNNI (Alder Lake and later without AVX-512); everything but the dot products is the AVX2 level's.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/dispatch.h"
#include "cpu/level_avx2.h"
#include "cpu/stages.h"

// Everything below is compiled for AVX-VNNI; no function of a header may be instantiated here, or the linker could keep this copy for every
// processor.
#pragma GCC push_options
#pragma GCC target("avx2,avxvnni")

namespace patchcore {

namespace {

#define PATCHCORE_DPBUSD _mm256_dpbusd_avx_epi32
#include "cpu/vnni256.inc"
#undef PATCHCORE_DPBUSD

}  // namespace

const Level kAvxVnniLevel = {"avxvnni",
                             kMaxCode,
                             avx2::squared_distances,
                             avx2::float16_to_float,
                             avx2::bfloat16_to_float,
                             scan_rows,
                             4,
                             kAlwaysStaged,
                             4,
                             scan_stages,
                             scan_tile,
                             dots,
                             avx2::int8_floors,
                             avx2::first_largest,
                             avx2::quantize,
                             avx2::multiply_matrix,
                             avx2::multiply_int16,
                             avx2::round_to_steps,
                             avx2::coarsen_steps,
                             avx2::all_finite,
                             avx2::take_marked,
                             avx2::squared_difference,
                             {0.033, 2.5, 0.09, 0.25}};

}  // namespace patchcore

#pragma GCC pop_options

#endif
