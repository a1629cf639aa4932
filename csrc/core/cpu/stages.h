// The stages of a scan (filter.h, section 5): the codes that tell rows apart best come first, and where they leave no row of a
// group, the others are not looked at.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace patchcore {

// Codes behind which stages end; the last one ends with the last code. Measured on ResNet18 features at D = 384, AVX2: of groups of 5 queries and 32
// bank rows 64% are left after 16 codes, 43% after 32, 24% after 64. More stages, or others, take the same time, with AVX-512 as well.
constexpr int64_t kStageCodes[] = {16, 32, 64};
constexpr int64_t kMostStages = 1 + sizeof(kStageCodes) / sizeof(kStageCodes[0]);

inline int64_t num_stages(int64_t codes) {
  int64_t stages = 1;
  for (const int64_t end : kStageCodes) stages += end < codes ? 1 : 0;
  return stages;
}

inline int64_t stage_end(int64_t stage, int64_t codes) { return stage < num_stages(codes) - 1 ? kStageCodes[stage] : codes; }

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
