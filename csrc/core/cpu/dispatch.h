// The inner loops that exist once per instruction set, and the choice between them.
//
// A level is a table of functions. All levels give the same bits (distance.h); they differ in speed alone. The best level that the processor has is
// chosen once, at the first call; the environment variable PATCHCORE_EXT_CPU_LEVEL (scalar, avx2 or avx512) forces a lower one.
#pragma once

#include <cstdint>

namespace patchcore {

struct Level {
  const char* name;

  // squared_distances[i] = canonical d2(query, row i), i < count. query: [dim]; rows: [count] rows, `stride` elements apart.
  void (*squared_distances)(const float* query, const float* rows, int64_t stride, int64_t count, int64_t dim, double* squared_distances);

  // Exact widening of `count` scalars.
  void (*float16_to_float)(const uint16_t* in, int64_t count, float* out);
  void (*bfloat16_to_float)(const uint16_t* in, int64_t count, float* out);
};

// The level in use.
const Level& level();

// The level of that name, or nullptr when it is unknown, was not compiled for this machine, or the processor lacks it.
const Level* find_level(const char* name);

// Names of the levels this processor can run, slowest first; returns their number (at most 3).
int available_levels(const char** names);

// One table per source file.
extern const Level kScalarLevel;
#if defined(__x86_64__)
extern const Level kAvx2Level;
extern const Level kAvx512Level;
#endif

}  // namespace patchcore
