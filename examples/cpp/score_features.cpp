// Scores images by their patch features with the core alone: coreset of the good patches, search of the nearest kept ones, image score of Eq. (7).
//
//   score_features GOOD.npy TEST.npy KEPT PATCHES [THREADS]
//
// GOOD: float32 [N, D], patches of good images. TEST: float32 [images * PATCHES, D]. KEPT: rows that the memory bank keeps. Prints the kept rows and
// a score for each image, with digits enough to read the same float32 back. The same bits as in Python:
//   kept = CoresetSampler(num_samples=KEPT, projection_dim=None, start=0).select(good).indices
//   PatchScorer(good[kept])(test.view(-1, PATCHES, D)).image_scores
#include <patchcore/checks.h>
#include <patchcore/coreset.h>
#include <patchcore/image_score.h>
#include <patchcore/knn.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "npy.h"

using patchcore::Parallel;
using patchcore::Rows;

namespace {

// The core starts no threads and allocates nothing: the caller hands both in.
Parallel threads(int64_t count) {
  if (count <= 1) return patchcore::serial();
  return {[](void*, int64_t slots, Parallel::Body body, void* context) {
            std::vector<std::thread> pool;
            for (int64_t slot = 1; slot < slots; ++slot) pool.emplace_back(body, context, slot);
            body(context, 0);
            for (std::thread& thread : pool) thread.join();
          },
          nullptr, count};
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

// Workspace, or codes, which want 64 bytes of alignment.
Memory allocate(int64_t bytes) {
  Memory memory(std::aligned_alloc(64, (static_cast<size_t>(bytes) + 64) / 64 * 64));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

Rows rows_of(const std::string& path, const Matrix& matrix, const Parallel& parallel) {
  const Rows rows = {matrix.values.data(), patchcore::ScalarType::kFloat32, matrix.rows, matrix.columns, matrix.columns};
  if (rows.count < 1 || rows.dim < 1) throw std::runtime_error(path + ": expected at least one row and one dimension");
  const int64_t bad = patchcore::first_nonfinite_row_cpu(rows, parallel);
  if (bad >= 0) throw std::runtime_error(path + ": expected finite features, got NaN or infinity in row " + std::to_string(bad));
  return rows;
}

// A point amid the rows, coordinate by coordinate. It decides how fast the filters are, not what they give.
std::vector<double> median(const Rows& rows) {
  const float* data = static_cast<const float*>(rows.data);
  const int64_t step = std::max<int64_t>(1, rows.count / 512);
  std::vector<double> center, column;
  for (int64_t j = 0; j < rows.dim; ++j) {
    column.clear();
    for (int64_t r = 0; r < rows.count; r += step) column.push_back(data[r * rows.stride + j]);
    std::nth_element(column.begin(), column.begin() + static_cast<std::ptrdiff_t>(column.size() / 2), column.end());
    center.push_back(column[column.size() / 2]);
  }
  return center;
}

// Greedy k-center: row 0, then always the row that is farthest from those picked so far.
std::vector<int64_t> select_coreset(const Rows& rows, int64_t count, const Parallel& parallel) {
  const std::vector<double> center = median(rows);
  const patchcore::CoresetRotation rotation = {center.data(), 0, 0, nullptr};
  const Memory codes = allocate(patchcore::coreset_codes_bytes(rows, rotation));
  {
    const Memory workspace = allocate(patchcore::coreset_codes_workspace_bytes(rows, rotation, parallel));
    patchcore::pack_coreset_codes_cpu(rows, rotation, parallel, workspace.get(), codes.get());
  }
  std::vector<double> state(static_cast<size_t>(rows.count), std::numeric_limits<double>::infinity());
  std::vector<int64_t> picks(static_cast<size_t>(count), 0);
  std::vector<double> squared_distances(static_cast<size_t>(count));
  const Memory workspace = allocate(patchcore::batched_coreset_workspace_bytes(rows, codes.get(), parallel));
  patchcore::batched_add_picks_cpu(rows, codes.get(), picks.data(), 1, parallel, workspace.get(), state.data(), nullptr);
  patchcore::batched_greedy_coreset_cpu(rows, codes.get(), count - 1, {}, parallel, workspace.get(), state.data(), nullptr, picks.data() + 1,
                                        squared_distances.data(), nullptr);
  return picks;
}

// int8 codes of the bank, with which most distances need not be computed; null where it is too small for that.
Memory prepare(const Rows& bank, const Parallel& parallel) {
  if (bank.count < patchcore::kFewestPreparedRows || bank.dim < patchcore::kFewestPreparedDims) return nullptr;
  const std::vector<double> center = median(bank);
  std::vector<int32_t> order(static_cast<size_t>(bank.count));
  std::iota(order.begin(), order.end(), 0);
  const patchcore::BankRotation rotation = {center.data(), 0, 0, nullptr, order.data()};
  Memory prepared = allocate(patchcore::prepared_bank_bytes(bank, rotation));
  const Memory workspace = allocate(patchcore::prepare_bank_workspace_bytes(bank, rotation, parallel));
  patchcore::prepare_bank_cpu(bank, rotation, parallel, workspace.get(), prepared.get());
  return prepared;
}

std::vector<float> score(const Rows& patches, int64_t num_patches, const Rows& bank, int64_t num_neighbors, const Parallel& parallel) {
  const Memory prepared = prepare(bank, parallel);
  std::vector<double> squared_distances(static_cast<size_t>(patches.count));
  std::vector<int64_t> nearest(static_cast<size_t>(patches.count));
  if (prepared != nullptr) {
    const Memory workspace = allocate(patchcore::filtered_neighbors_workspace_bytes(patches, bank, prepared.get(), 1, parallel));
    patchcore::filtered_neighbors_cpu(patches, bank, prepared.get(), 1, {}, parallel, workspace.get(), squared_distances.data(), nearest.data(),
                                      nullptr);
  } else {
    const Memory workspace = allocate(patchcore::nearest_neighbors_workspace_bytes(patches, bank, 1, parallel));
    patchcore::nearest_neighbors_cpu(patches, bank, 1, parallel, workspace.get(), squared_distances.data(), nearest.data());
  }
  std::vector<float> scores(static_cast<size_t>(patches.count / num_patches));
  const Memory workspace = allocate(patchcore::image_scores_workspace_bytes(patches, bank, prepared.get(), num_neighbors, parallel));
  patchcore::image_scores_cpu(squared_distances.data(), nearest.data(), patches, bank, prepared.get(), patches.count / num_patches, num_patches,
                              num_neighbors, parallel, workspace.get(), scores.data());
  return scores;
}

int64_t positive(const char* name, const char* text) {
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  if (*end != '\0' || value < 1) throw std::runtime_error(std::string("expected ") + name + " to be a positive number, got " + text);
  return value;
}

void run(int argc, char** argv) {
  const Parallel parallel = threads(argc > 5 ? positive("THREADS", argv[5]) : 1);
  const Matrix good_values = read_npy(argv[1]), test_values = read_npy(argv[2]);
  const Rows good = rows_of(argv[1], good_values, parallel), test = rows_of(argv[2], test_values, parallel);
  const int64_t kept = positive("KEPT", argv[3]), num_patches = positive("PATCHES", argv[4]);
  if (kept > good.count) throw std::runtime_error("expected KEPT to be at most the rows of GOOD, " + std::to_string(good.count));
  if (test.dim != good.dim) throw std::runtime_error("expected TEST to have the dimension of GOOD, " + std::to_string(good.dim));
  if (test.count % num_patches != 0) throw std::runtime_error("expected TEST to have a multiple of PATCHES rows, got " + std::to_string(test.count));

  const std::vector<int64_t> picks = select_coreset(good, kept, parallel);
  std::vector<float> bank_values;
  for (const int64_t pick : picks) {
    const float* row = static_cast<const float*>(good.data) + pick * good.stride;
    bank_values.insert(bank_values.end(), row, row + good.dim);
  }
  const Rows bank = {bank_values.data(), patchcore::ScalarType::kFloat32, kept, good.dim, good.dim};
  std::printf("kept");
  for (const int64_t pick : picks) std::printf(" %lld", static_cast<long long>(pick));
  std::printf("\n");
  for (const float value : score(test, num_patches, bank, 9, parallel)) std::printf("%.9g\n", static_cast<double>(value));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5 || argc > 6) {
    std::fprintf(stderr, "usage: %s GOOD.npy TEST.npy KEPT PATCHES [THREADS]\n", argv[0]);
    return 2;
  }
  try {
    run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "score_features: %s\n", error.what());
    return 1;
  }
  return 0;
}
