#include "checks.h"

#include <atomic>

namespace patchcore {

namespace {

// A value is not finite exactly when all bits of its exponent are set.
template <class Word>
bool row_is_finite(const Word* row, int64_t dim, Word exponent) {
  bool finite = true;
  for (int64_t j = 0; j < dim; ++j) finite &= (row[j] & exponent) != exponent;
  return finite;
}

bool row_is_finite(const Rows& rows, int64_t r) {
  const int64_t begin = r * rows.stride;
  switch (rows.type) {
    case ScalarType::kFloat16:
      return row_is_finite<uint16_t>(static_cast<const uint16_t*>(rows.data) + begin, rows.dim, 0x7c00);
    case ScalarType::kBFloat16:
      return row_is_finite<uint16_t>(static_cast<const uint16_t*>(rows.data) + begin, rows.dim, 0x7f80);
    case ScalarType::kFloat32:
      break;
  }
  return row_is_finite<uint32_t>(static_cast<const uint32_t*>(rows.data) + begin, rows.dim, 0x7f800000);
}

}  // namespace

int64_t first_nonfinite_row_cpu(const Rows& rows, const Parallel& parallel) {
  std::atomic<int64_t> first{rows.count};
  parallel([&](int64_t slot) {
    const Share share = share_of(rows.count, slot, parallel.num_slots);
    for (int64_t r = share.begin; r < share.end; ++r) {
      if (row_is_finite(rows, r)) continue;
      int64_t seen = first.load();
      while (r < seen && !first.compare_exchange_weak(seen, r)) {
      }
      return;
    }
  });
  return first.load() == rows.count ? -1 : first.load();
}

}  // namespace patchcore
