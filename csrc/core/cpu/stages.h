// The stages of a scan (filter.h, section 5): the codes that tell rows apart best come first, and where they leave no row of a group, the others are
// not looked at.
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

// What the rows of Level::scan_stages have in common; Sum: of stage_bytes.
template <class Sum>
struct StagedRows {
  const uint8_t* codes;
  int64_t stride;
  const Sum* starts;          // [stages, 64]
  Sum begins[kTileOperands];  // the first stage's starts, minus the floors
  int64_t ends[kMostStages];
  int64_t num_stages;
};

}  // namespace patchcore
