// How the arrays of a prepared bank lie in its memory.
#pragma once

#include "cpu/bank.h"

namespace patchcore {

// What the memory begins with.
struct BankHeader {
  int64_t count, dim;
  int64_t short_outputs, long_outputs;
  double step_scale;
  View prefix, second, full;
  double largest_residual;
  int64_t prefix_first;
};

inline int64_t tiles_of(int64_t count) { return (count + kTileOperands - 1) / kTileOperands; }

// What is known of a bank's header before its rows are looked at. staged: whether its prefix is to be scanned in stages.
BankHeader header_of(const Rows& bank, const BankRotation& rotation, bool staged);

// As this level would have it.
BankHeader header_of(const Rows& bank, const BankRotation& rotation);

// The arrays behind a header; with null pieces only their sizes count.
PreparedBank lay_out(const BankHeader& header, Pieces* pieces);

}  // namespace patchcore
