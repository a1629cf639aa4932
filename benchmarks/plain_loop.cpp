// The strongest plain competitor: greedy k-center in float32, one pass over all rows a pick, vectorised, on huge pages. Memory-bound.
// Built with -O3 -march=native -mprefer-vector-width=512 -ffast-math by benchmarks/coreset_methods.py.
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

// rows [count, dim]; writes `picks` indices, starting from row `first`. dim must be a compile-time constant for the compiler to unroll: 128 is.
constexpr int64_t kLanes = 64;

template <int kDim>
static void select(const float* rows, int64_t count, int64_t dim, int64_t first, int64_t picks, float* smallest, int64_t* indices) {
  const int64_t d = kDim > 0 ? kDim : dim;
  int64_t current = first;
  for (int64_t p = 0; p < picks; ++p) {
    indices[p] = current;
    const float* center = rows + current * d;
    float best = -1;
    int64_t index = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float* row = rows + i * d;
      float sums[kLanes] = {};  // several chains of additions: one alone would wait for itself, not for memory
      int64_t j = 0;
      for (; j + kLanes <= d; j += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) {
          const float difference = row[j + l] - center[j + l];
          sums[l] += difference * difference;
        }
      }
      for (int64_t l = 0; j + l < d; ++l) sums[l] += (row[j + l] - center[j + l]) * (row[j + l] - center[j + l]);
      float sum = 0;
      for (int64_t l = 0; l < kLanes; ++l) sum += sums[l];
      if (sum < smallest[i]) smallest[i] = sum;
      if (smallest[i] > best) {
        best = smallest[i];
        index = i;
      }
    }
    current = index;
  }
}

extern "C" void plain_loop(const float* features, int64_t count, int64_t dim, int64_t first, int64_t picks, int64_t* indices) {
  const size_t page = size_t{2} << 20, bytes = (static_cast<size_t>(count * dim) * sizeof(float) + page - 1) / page * page;
  float* rows = static_cast<float*>(std::aligned_alloc(page, bytes));
  madvise(rows, bytes, MADV_HUGEPAGE);
  std::memcpy(rows, features, static_cast<size_t>(count * dim) * sizeof(float));
  float* smallest = static_cast<float*>(std::malloc(static_cast<size_t>(count) * sizeof(float)));
  for (int64_t i = 0; i < count; ++i) smallest[i] = std::numeric_limits<float>::max();
  if (dim == 128) {
    select<128>(rows, count, dim, first, picks, smallest, indices);
  } else {
    select<0>(rows, count, dim, first, picks, smallest, indices);
  }
  std::free(smallest);
  std::free(rows);
}
