// Nearest neighbours (knn.h) against sorting all distances.
#include "knn.h"

#include <algorithm>
#include <utility>

#include "check.h"
#include "data.h"
#include "distance.h"

using namespace patchcore;

namespace {

struct Result {
  std::vector<double> squared_distances;
  std::vector<int64_t> indices;

  bool operator==(const Result& other) const { return squared_distances == other.squared_distances && indices == other.indices; }
};

Result oracle(const Rows& queries, const Rows& bank, int64_t k) {
  Result result;
  for (int64_t q = 0; q < queries.count; ++q) {
    std::vector<std::pair<double, int64_t>> all;
    for (int64_t m = 0; m < bank.count; ++m) {
      all.emplace_back(squared_distance(data::widened(queries, q).data(), data::widened(bank, m).data(), bank.dim), m);
    }
    std::sort(all.begin(), all.end());
    for (int64_t i = 0; i < k; ++i) {
      result.squared_distances.push_back(all[static_cast<size_t>(i)].first);
      result.indices.push_back(all[static_cast<size_t>(i)].second);
    }
  }
  return result;
}

Result search(const Rows& queries, const Rows& bank, int64_t k, const Parallel& parallel) {
  Result result;
  result.squared_distances.resize(static_cast<size_t>(queries.count * k));
  result.indices.resize(static_cast<size_t>(queries.count * k));
  std::vector<double> workspace(static_cast<size_t>(nearest_neighbors_workspace_bytes(queries, bank, k, parallel)) / 8 + 1);
  CHECK(nearest_neighbors_cpu(queries, bank, k, parallel, workspace.data(), result.squared_distances.data(), result.indices.data()) == Status::kOk);
  return result;
}

}  // namespace

TEST(neighbors_equal_a_full_sort_on_every_set) {
  for (const int64_t dim : {1, 3, 16, 33}) {
    for (data::Set& set : data::sets(70, dim)) {
      const Rows& bank = data::rows_of(set);
      Rows queries = bank;  // the first rows of the bank: distance 0 to themselves or to an earlier duplicate
      queries.count = 19;
      for (const int64_t k : {1, 2, 9, 70}) {
        const Result expected = oracle(queries, bank, k);
        for (const int64_t slots : {1, 2, 5}) {
          if (!(search(queries, bank, k, data::slots(slots)) == expected)) std::cerr << set.name << " dim " << dim << " k " << k << "\n";
          CHECK(search(queries, bank, k, data::slots(slots)) == expected);
        }
      }
    }
  }
}

TEST(a_query_alone_gets_the_bits_it_gets_in_a_batch) {
  for (data::Set& set : data::sets(2 * kBlockRows + 3, 7)) {
    const Rows& bank = data::rows_of(set);
    Rows queries = bank;
    queries.count = 30;
    const Result batch = search(queries, bank, 4, data::slots(2));
    for (int64_t q = 0; q < 30; ++q) {
      Rows one = queries;
      one.count = 1;
      const int64_t size = one.type == ScalarType::kFloat32 ? 4 : 2;
      one.data = static_cast<const char*>(queries.data) + q * queries.stride * size;
      const Result alone = search(one, bank, 4, serial());
      CHECK(std::equal(alone.indices.begin(), alone.indices.end(), batch.indices.begin() + q * 4));
      CHECK(std::equal(alone.squared_distances.begin(), alone.squared_distances.end(), batch.squared_distances.begin() + q * 4));
    }
  }
}

TEST(queries_and_bank_may_differ_in_type) {
  std::vector<data::Set> sets = data::sets(40, 20);
  for (data::Set& a : sets) {
    for (data::Set& b : sets) {
      if (a.rows.type == b.rows.type) continue;
      Rows queries = data::rows_of(a);
      queries.count = 5;
      CHECK(search(queries, data::rows_of(b), 3, serial()) == oracle(queries, b.rows, 3));
    }
  }
}

TEST(ties_go_to_the_lowest_index) {
  data::Set set = data::fill(data::make("equal", 600, 4), [](int64_t, int64_t) { return 1.0; });
  Rows query = data::rows_of(set);
  query.count = 1;
  const Result result = search(query, set.rows, 5, data::threads(2));
  CHECK(result.indices == (std::vector<int64_t>{0, 1, 2, 3, 4}));
}

TEST(no_queries_no_work) {
  data::Set set = data::fill(data::make("bank", 3, 2), [](int64_t r, int64_t) { return static_cast<double>(r); });
  Rows queries = data::rows_of(set);
  queries.count = 0;
  CHECK(search(queries, set.rows, 1, data::slots(2)).indices.empty());
}

TEST(nonfinite_values_are_reported) {
  data::Set set = data::fill(data::make("bank", 300, 6), [](int64_t r, int64_t j) { return static_cast<double>(r + j); });
  set.values[6 * 299 + 5] = std::numeric_limits<float>::quiet_NaN();
  Rows queries = data::rows_of(set);
  queries.count = 2;
  std::vector<double> workspace(static_cast<size_t>(nearest_neighbors_workspace_bytes(queries, set.rows, 1, serial())) / 8 + 1);
  double squared_distances[2];
  int64_t indices[2];
  CHECK(nearest_neighbors_cpu(queries, set.rows, 1, serial(), workspace.data(), squared_distances, indices) == Status::kNonFinite);
}

TEST_MAIN()
