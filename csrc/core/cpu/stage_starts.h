// What sums of a scan in stages start with (stages.h).
#pragma once

#include "cpu/stages.h"

namespace patchcore {

// What a row adds to its sums where stage s begins, modulo 2^16 for T of 16 bits, into starts[s * kTileOperands]: the halves of its squared norms
// and, for an operand, what its dot products are too large by, as `bias` is added to the codes that it is multiplied with (a row's own bias is 0).
// codes: [count], code + zero.
template <class T>
void stage_starts(const uint8_t* codes, int64_t count, int32_t zero, int32_t bias, T* starts) {
  int32_t squared_norm = 0, sum = 0, before = 0;
  for (int64_t stage = 0, k = 0; k < count; ++stage) {
    for (const int64_t end = stage_end(stage, count); k < end; ++k) {
      const int32_t code = codes[k] - zero;
      squared_norm += code * code;
      sum += code;
    }
    const int32_t now = -(squared_norm >> 1) - bias * sum;
    starts[stage * kTileOperands] = static_cast<T>(now - before);
    before = now;
  }
}

// The same for the level in use: entry `at` of starts of its type.
inline void level_stage_starts(const uint8_t* codes, int64_t count, int32_t zero, int32_t bias, void* starts, int64_t at) {
  if (level().stage_bytes == 2) {
    stage_starts(codes, count, zero, bias, static_cast<int16_t*>(starts) + at);
  } else {
    stage_starts(codes, count, zero, bias, static_cast<int32_t*>(starts) + at);
  }
}

}  // namespace patchcore
