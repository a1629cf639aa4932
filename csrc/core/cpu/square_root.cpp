#include "square_root.h"

#include <cmath>

namespace patchcore {

void square_root_cpu(const double* values, int64_t count, const Parallel& parallel, double* roots) {
  parallel([&](int64_t slot) {
    const Share share = share_of(count, slot, parallel.num_slots);
    for (int64_t i = share.begin; i < share.end; ++i) roots[i] = std::sqrt(values[i]);
  });
}

}  // namespace patchcore
