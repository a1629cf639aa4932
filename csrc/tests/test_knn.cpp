// Nearest neighbours (knn.h) against sorting all distances.
#include "knn.h"

#include <algorithm>
#include <utility>

#include "check.h"
#include "cpu/dispatch.h"
#include "data.h"
#include "distance.h"
#include "filter.h"

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

// Random directions as two integer contractions, however bad they are for the data.
struct Rotation {
  std::vector<double> center;
  std::vector<int16_t> matrix;
  std::vector<int32_t> order;
  BankRotation view;
};

Rotation rotation_for(const Rows& bank, int64_t short_outputs, int64_t long_outputs) {
  Rotation rotation;
  const std::vector<double> first = data::widened(bank, 0);
  rotation.center = first;
  for (int64_t i = 0; i < bank.count; ++i) rotation.order.push_back(static_cast<int32_t>(i));
  std::mt19937_64 random(5);
  std::shuffle(rotation.order.begin(), rotation.order.end(), random);
  std::normal_distribution<double> normal;
  for (double size = 16384 / std::sqrt(static_cast<double>(bank.dim)); true; size *= 0.7) {
    rotation.matrix.clear();
    for (int64_t i = 0; i < (short_outputs + long_outputs) * bank.dim; ++i) {
      rotation.matrix.push_back(static_cast<int16_t>(std::max(-16384.0, std::min(16384.0, size * normal(random)))));
    }
    rotation.view = {rotation.center.data(), short_outputs, long_outputs, rotation.matrix.data(), rotation.order.data()};
    if (is_contraction(rotation.view, bank.dim)) return rotation;
  }
}

// 64-byte aligned memory.
struct Memory {
  std::vector<char> bytes;
  explicit Memory(int64_t size) : bytes(static_cast<size_t>(size) + 64) {}
  void* data() { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64); }
};

Memory prepare(const Rows& bank, const BankRotation& rotation, const Parallel& parallel) {
  const int64_t size = prepared_bank_bytes(bank, rotation);
  Memory prepared(size), workspace(prepare_bank_workspace_bytes(bank, rotation, parallel));
  prepare_bank_cpu(bank, rotation, parallel, workspace.bytes.data(), prepared.data());
  CHECK(prepared_bank_fits(bank, prepared.data(), size));
  return prepared;
}

Result filtered(const Rows& queries, const Rows& bank, Memory& prepared, int64_t k, const SearchOptions& options, const Parallel& parallel,
                SearchStatistics* statistics = nullptr) {
  Result result;
  result.squared_distances.resize(static_cast<size_t>(queries.count * k));
  result.indices.resize(static_cast<size_t>(queries.count * k));
  std::vector<char> workspace(static_cast<size_t>(filtered_neighbors_workspace_bytes(queries, bank, prepared.data(), k, parallel)));
  CHECK(filtered_neighbors_cpu(queries, bank, prepared.data(), k, options, parallel, workspace.data(), result.squared_distances.data(),
                               result.indices.data(), statistics) == Status::kOk);
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

TEST(the_filtered_search_finds_the_same_on_every_set) {
  for (const int64_t dim : {8, 33, 96}) {
    for (data::Set& set : data::sets(330, dim)) {
      const Rows& bank = data::rows_of(set);
      Rows queries = bank;
      queries.count = 150;
      const Rotation rotation = rotation_for(bank, 5, dim / 2);
      const Rotation none = rotation_for(bank, 0, 0);
      const Rotation alone = rotation_for(bank, 5, 0);
      Memory with_prefix = prepare(bank, rotation.view, data::slots(2)), without = prepare(bank, none.view, serial());
      Memory by_steps = prepare(bank, alone.view, data::slots(2));
      for (const int64_t k : {1, 2, 9, 100, 330}) {
        const Result expected = search(queries, bank, k, serial());
        for (const int32_t prefix : {-1, 0, 1}) {
          for (const int64_t line : {-1, 0, 10, 30, 70}) {
            if (k > 9 && line > 0 && line != 30) continue;
            SearchOptions options;
            options.prefix = prefix;
            options.line = line;
            const bool same = filtered(queries, bank, with_prefix, k, options, data::slots(line == 10 ? 3 : 1)) == expected;
            if (!same) std::cerr << set.name << " dim " << dim << " k " << k << " prefix " << prefix << " line " << line << "\n";
            CHECK(same);
            CHECK(filtered(queries, bank, by_steps, k, options, data::slots(line == 10 ? 3 : 1)) == expected);
          }
        }
        CHECK(filtered(queries, bank, without, k, {}, data::slots(2)) == expected);
      }
    }
  }
}

// Rows along a few directions, as features are: the prefix must tell them apart, and every stage must be reached.
TEST(the_filters_discard_what_they_should) {
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  const int64_t dim = 64, directions = 4, count = 5000;
  std::vector<double> basis(static_cast<size_t>(directions * dim));
  for (double& value : basis) value = normal(random);
  std::vector<double> weights(static_cast<size_t>(count * directions));
  for (double& value : weights) value = normal(random);
  data::Set set = data::fill(data::make("few directions", count, dim), [&](int64_t r, int64_t j) {
    double sum = 0.02 * normal(random);
    for (int64_t d = 0; d < directions; ++d) sum += weights[static_cast<size_t>(r * directions + d)] * basis[static_cast<size_t>(d * dim + j)];
    return sum;
  });
  const Rows& bank = data::rows_of(set);
  Rows queries = bank;
  queries.count = 200;
  // The first prefix: those directions, about orthogonal, each of norm 8 sqrt(2) at most.
  Rotation rotation = rotation_for(bank, directions, 24);
  for (int64_t i = 0; i < directions * dim; ++i) {
    rotation.matrix[static_cast<size_t>(i)] = static_cast<int16_t>(16384 / 12.0 / 1.5 * basis[static_cast<size_t>(i)]);
  }
  rotation.view.matrix = rotation.matrix.data();
  CHECK(is_contraction(rotation.view, dim));
  SearchOptions options;
  options.prefix = 1;
  SearchStatistics statistics;
  for (const int64_t long_outputs : {24, 0}) {
    rotation.view.long_outputs = long_outputs;
    Memory prepared = prepare(bank, rotation.view, serial());
    for (const int64_t k : {1, 9}) {
      CHECK(filtered(queries, bank, prepared, k, options, serial(), &statistics) == search(queries, bank, k, serial()));
      CHECK(statistics.survivors * 4 < statistics.pairs);
      CHECK(statistics.differences < statistics.survivors);
      CHECK(statistics.canonical < statistics.survivors / 2);
      CHECK(statistics.canonical >= queries.count * k);
    }
  }
}

// Rows at +-1000 along one axis, which sets the size of a step, and less than a step apart along another, which is the prefix: without the steps'
// own error in the bound, the nearest rows would look far.
TEST(the_error_of_the_steps_counts) {
  const int64_t dim = 8;
  std::mt19937_64 random(11);
  std::uniform_real_distribution<double> small(-0.05, 0.05);
  data::Set set = data::fill(data::make("steps", 600, dim), [&](int64_t r, int64_t j) {
    return j == 0 ? (r % 2 ? 1000.0 : -1000.0) : j == 1 ? small(random) : 0.0;
  });
  data::Set asked = data::fill(data::make("queries", 128, dim), [&](int64_t r, int64_t j) {
    return j == 0 ? (r % 2 ? 1000.0 : -1000.0) : j == 1 ? small(random) : 0.0;
  });
  const Rows &bank = data::rows_of(set), &queries = data::rows_of(asked);
  Rotation rotation = rotation_for(bank, 1, 1);
  std::vector<int16_t>& matrix = rotation.matrix;
  std::fill(rotation.center.begin(), rotation.center.end(), 0.0);
  std::fill(matrix.begin(), matrix.end(), int16_t{0});
  matrix[1] = 16384;
  SearchOptions options;
  options.prefix = 1;
  for (const int64_t long_outputs : {1, 0}) {
    rotation.view.long_outputs = long_outputs;
    Memory prepared = prepare(bank, rotation.view, serial());
    for (const int64_t k : {1, 5}) CHECK(filtered(queries, bank, prepared, k, options, serial()) == search(queries, bank, k, serial()));
  }
}

// The first axis is the short prefix and has codes of 4 in the long one, where the second axis has codes of 1. A query's nearest row rounds away from
// it by one of the large codes, and another row does not: without the error of the large codes in the bound, that one would be found.
TEST(the_error_of_large_codes_counts) {
  const int64_t dim = 8, groups = 15;
  const auto group_at = [](int64_t g) { return static_cast<double>(4 * (g - 7)); };
  data::Set set = data::fill(data::make("large codes", 600, dim), [&](int64_t r, int64_t j) {
    if (j > 1) return 0.0;
    if (r < 2 * groups) return j == 1 ? group_at(r % groups) : r < groups ? 1.96 : 4.0;
    return j == 1 ? group_at(r % groups) : r % 2 ? 508.0 : -508.0;
  });
  data::Set asked = data::fill(data::make("queries", groups, dim), [&](int64_t q, int64_t j) { return j == 0 ? 2.04 : j == 1 ? group_at(q) : 0.0; });
  const Rows &bank = data::rows_of(set), &queries = data::rows_of(asked);
  Rotation rotation = rotation_for(bank, 1, 1);
  std::fill(rotation.center.begin(), rotation.center.end(), 0.0);
  std::fill(rotation.matrix.begin(), rotation.matrix.end(), int16_t{0});
  rotation.matrix[0] = rotation.matrix[static_cast<size_t>(dim) + 1] = 16384;
  Memory prepared = prepare(bank, rotation.view, serial());
  SearchOptions options;
  options.prefix = 1;
  const Result found = filtered(queries, bank, prepared, 1, options, serial());
  for (int64_t q = 0; q < groups; ++q) CHECK_EQ(found.indices[static_cast<size_t>(q)], q);
  CHECK(found == search(queries, bank, 1, serial()));
}

// Rows whose coordinates are the same numbers in other orders: all about as far from the origin, to the last bits of float64. Float32 sums differ by
// more than that, and must not decide.
TEST(float32_does_not_decide_between_near_ties) {
  std::mt19937_64 random(23);
  std::vector<double> numbers(48);
  for (double& number : numbers) number = std::sqrt(static_cast<double>(1 + random() % 1000));
  std::vector<std::vector<double>> rows(600, numbers);
  for (std::vector<double>& row : rows) std::shuffle(row.begin(), row.end(), random);
  data::Set set =
      data::fill(data::make("orders", 600, 48), [&](int64_t r, int64_t j) { return rows[static_cast<size_t>(r)][static_cast<size_t>(j)]; });
  data::Set asked = data::fill(data::make("origin", 3, 48), [&](int64_t r, int64_t) { return static_cast<double>(r) * 1e-3; });
  const Rows &bank = data::rows_of(set), &queries = data::rows_of(asked);
  for (const auto& [short_outputs, long_outputs] : {std::pair<int64_t, int64_t>{0, 0}, {9, 9}, {9, 0}}) {
    Memory prepared = prepare(bank, rotation_for(bank, short_outputs, long_outputs).view, serial());
    for (const int32_t prefix : {-1, 1}) {
      SearchOptions options;
      options.prefix = prefix;
      for (const int64_t k : {1, 4}) CHECK(filtered(queries, bank, prepared, k, options, serial()) == search(queries, bank, k, serial()));
    }
  }
}

TEST(a_filtered_query_alone_gets_the_bits_it_gets_in_a_batch) {
  data::Set set = data::fill(data::make("lattice", 900, 12), [](int64_t r, int64_t j) { return static_cast<double>((r * 31 + j * 17) % 5); });
  const Rows& bank = data::rows_of(set);
  Rows queries = bank;
  queries.count = 130;
  const Rotation rotation = rotation_for(bank, 3, 6);
  Memory prepared = prepare(bank, rotation.view, serial());
  SearchOptions options;
  options.line = 26;
  const Result batch = filtered(queries, bank, prepared, 2, options, data::slots(2));
  for (int64_t q = 0; q < 130; ++q) {
    Rows one = queries;
    one.count = 1;
    one.data = static_cast<const float*>(queries.data) + q * queries.stride;
    const Result alone = filtered(one, bank, prepared, 2, {}, serial());
    CHECK(std::equal(alone.indices.begin(), alone.indices.end(), batch.indices.begin() + q * 2));
    CHECK(std::equal(alone.squared_distances.begin(), alone.squared_distances.end(), batch.squared_distances.begin() + q * 2));
  }
}

TEST(other_prepared_banks_are_refused) {
  data::Set set = data::fill(data::make("bank", 300, 9), [](int64_t r, int64_t j) { return static_cast<double>(r + j); });
  const Rows& bank = data::rows_of(set);
  const Rotation rotation = rotation_for(bank, 3, 4);
  const int64_t size = prepared_bank_bytes(bank, rotation.view);
  Memory prepared = prepare(bank, rotation.view, serial());
  Rows shorter = bank;
  shorter.count = 299;
  CHECK(!prepared_bank_fits(shorter, prepared.data(), size));
  CHECK(!prepared_bank_fits(bank, prepared.data(), size - 1));
  CHECK(!prepared_bank_fits(bank, prepared.data(), 7));
  for (const int64_t at : {0, 8, 16, 24}) {  // count, dim, outputs
    Memory spoiled = prepared;
    static_cast<int64_t*>(spoiled.data())[at / 8] = -5;
    CHECK(!prepared_bank_fits(bank, spoiled.data(), size));
  }
}

TEST(nonfinite_queries_are_reported) {
  data::Set set = data::fill(data::make("bank", 300, 9), [](int64_t r, int64_t j) { return static_cast<double>(r * j % 13); });
  const Rows& bank = data::rows_of(set);
  for (const int64_t outputs : {0, 3}) {
    Memory prepared = prepare(bank, rotation_for(bank, outputs, outputs).view, serial());
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      std::vector<float> query(9, 1.0f);
      query[8] = bad;
      const Rows queries = {query.data(), ScalarType::kFloat32, 1, 9, 9};
      std::vector<char> workspace(static_cast<size_t>(filtered_neighbors_workspace_bytes(queries, bank, prepared.data(), 1, serial())));
      double squared_distance;
      int64_t index;
      CHECK(filtered_neighbors_cpu(queries, bank, prepared.data(), 1, {}, serial(), workspace.data(), &squared_distance, &index, nullptr) ==
            Status::kNonFinite);
    }
  }
}

TEST(what_is_no_contraction_is_refused) {
  const std::vector<double> center(8);
  std::vector<int16_t> matrix(16, 0);
  matrix[0] = matrix[9] = 16384;  // e_0 and e_1
  CHECK(is_contraction({center.data(), 1, 1, matrix.data(), nullptr}, 8));
  matrix[1] = 129;
  CHECK(!is_contraction({center.data(), 1, 1, matrix.data(), nullptr}, 8));
  matrix[1] = 0;
  matrix[8] = 16384;  // the second row is e_0 + e_1
  CHECK(!is_contraction({center.data(), 1, 1, matrix.data(), nullptr}, 8));
}

TEST_MAIN()
