// A row that may be picked next, and the total order of picks.
#pragma once

#include <cstdint>

#include "coreset.h"

namespace patchcore {

struct Candidate {
  double squared_distance;
  int64_t index;

  // The larger distance first, then the lower index. Merging shares of rows in any order gives the same winner.
  bool before(const Candidate& other) const {
    return squared_distance > other.squared_distance || (squared_distance == other.squared_distance && index < other.index);
  }
};

constexpr Candidate kNoCandidate = {kPicked, INT64_MAX};

}  // namespace patchcore
