// The CUDA search, against the CPU's: the same indices and the same bits of the distances.
#include "device.h"
#include "image_score.h"
#include "knn.h"

using namespace patchcore;
using device::Neighbors;
using device::Prepared;

namespace {

Neighbors on_cpu(const Rows& queries, const Rows& bank, int64_t k) {
  Neighbors found;
  found.squared_distances.resize(static_cast<size_t>(queries.count * k));
  found.indices.resize(static_cast<size_t>(queries.count * k));
  device::Vector<double> workspace(static_cast<size_t>(nearest_neighbors_workspace_bytes(queries, bank, k, serial())) / 8 + 1);
  CHECK(nearest_neighbors_cpu(queries, bank, k, serial(), workspace.data(), found.squared_distances.data(), found.indices.data()) == Status::kOk);
  return found;
}

device::Vector<float> scores_on_cpu(const Neighbors& found, const Rows& queries, const Rows& bank, int64_t batch, int64_t num_neighbors) {
  device::Vector<float> scores(static_cast<size_t>(batch));
  device::Vector<double> workspace(static_cast<size_t>(image_scores_workspace_bytes(queries, bank, nullptr, num_neighbors, serial())) / 8 + 1);
  CHECK(image_scores_cpu(found.squared_distances.data(), found.indices.data(), queries, bank, nullptr, batch, queries.count / batch, num_neighbors,
                         serial(), workspace.data(), scores.data()) == Status::kOk);
  return scores;
}

// Queries that are bank rows, so that distance 0 and its ties are met, and that are not.
Rows first_rows(const Rows& rows, int64_t count) {
  Rows part = rows;
  part.count = count;
  return part;
}

void expect(const std::string& name, const Neighbors& found, const Neighbors& expected) {
  CHECK_EQ(found.flags, 0);
  if (!(found == expected)) std::cerr << name << "\n";
  CHECK(found == expected);
}

}  // namespace

TEST(neighbors_equal_those_of_the_cpu_on_every_set) {
  for (const int64_t dim : {1, 3, 16, 65, 130}) {
    for (data::Set& set : data::sets(dim == 16 ? 300 : 140, dim)) {
      const Rows& bank = data::rows_of(set);
      const Rows queries = first_rows(bank, 19);
      for (const int64_t k : {1, 2, 9}) {
        device::next_order();
        expect(set.name + " one-off", Prepared::nearest(queries, bank, nullptr, false, k, 0), on_cpu(queries, bank, k));
      }
      Prepared prepared(bank, false);
      expect(set.name + " prepared", prepared.search(queries, bank, 1, 0), on_cpu(queries, bank, 1));
    }
  }
}

TEST(prefixes_change_nothing) {
  for (data::Set& set : data::sets(270, 200)) {
    const Rows& bank = data::rows_of(set);
    const Rows queries = first_rows(bank, 131), few = first_rows(bank, 11);
    device::next_order();
    Prepared prepared(bank, true);
    device::next_order();
    expect(set.name, prepared.search(queries, bank, 1, 1), on_cpu(queries, bank, 1));
    const Neighbors nine = on_cpu(few, bank, 9);
    for (const int prefix : {0, 1, -1}) {
      device::next_order();
      expect(set.name, prepared.search(few, bank, 9, prefix), nine);
    }
  }
}

TEST(all_neighbors_and_many_come_in_order) {
  for (data::Set& set : data::sets(150, 20)) {
    const Rows& bank = data::rows_of(set);
    const Rows queries = first_rows(bank, 12);
    device::next_order();
    for (const int64_t k : {100, 150}) expect(set.name, Prepared::nearest(queries, bank, nullptr, false, k, 0), on_cpu(queries, bank, k));
  }
}

TEST(a_bank_smaller_than_a_tile_and_queries_of_another_type) {
  for (const int64_t count : {1, 2, 5, 127, 128, 129}) {
    data::Set bank = data::fill(data::make("bank", count, 33, 1), [](int64_t r, int64_t j) { return std::sin(static_cast<double>(r * 33 + j)); });
    device::next_order();
    data::Set queries = data::half_precision("queries", ScalarType::kBFloat16, 17, 33, 3);
    expect("bfloat16 queries", Prepared::nearest(data::rows_of(queries), data::rows_of(bank), nullptr, false, 1, 0),
           on_cpu(queries.rows, bank.rows, 1));
  }
}

TEST(the_bank_is_shared_out_among_blocks) {
  device::set_multiprocessors(40);
  for (data::Set& set : data::sets(1000, 12)) {
    const Rows& bank = data::rows_of(set);
    const Rows queries = first_rows(bank, 10);
    device::next_order();
    expect(set.name, Prepared::nearest(queries, bank, nullptr, false, 3, 0), on_cpu(queries, bank, 3));
  }
  device::set_multiprocessors(3);
}

TEST(a_block_goes_through_groups_of_tiles) {
  device::set_multiprocessors(1);
  for (data::Set& set : data::sets(1300, 3)) {
    const Rows& bank = data::rows_of(set);
    const Rows queries = first_rows(bank, 5);
    device::next_order();
    expect(set.name, Prepared::nearest(queries, bank, nullptr, false, 3, 0), on_cpu(queries, bank, 3));
  }
  device::set_multiprocessors(3);
}

// Rows of two kinds, each known by 16 signs, in tiles of one kind: those that codes hold exactly, and those that rounding takes another way than the
// query, which is nearer to them. A filter that forgot their residual would drop them, unless it began with them.
TEST(residuals_of_bank_rows_count) {
  constexpr int64_t kDim = 17;
  // Magnitude 127, so that one step of the codes is 1. Each has its opposite, so that the mean is 0; two rows are 0, one of them the center.
  const auto value = [](int64_t sign, int64_t j, double small) {
    const double magnitude = j < 16 ? 127 : small;
    return (sign / 2 >> j % 16 & 1) == sign % 2 ? magnitude : -magnitude;
  };
  data::Set set = data::fill(data::make("at the edge of codes", 1024, kDim), [&](int64_t r, int64_t j) {
    const bool exact = r / 128 % 2 == 0;
    return r / 2 == 256 ? 0.0 : value(r / 256 * 128 + r % 128, j, exact ? 1 : 31.0 / 64);
  });
  data::Set asked = data::fill(data::make("queries", 100, kDim), [&](int64_t r, int64_t j) { return value(r * 5, j, 33.0 / 64); });
  const Rows &bank = data::rows_of(set), &queries = data::rows_of(asked);
  const Neighbors expected = on_cpu(queries, bank, 1);
  for (const int64_t nearest : expected.indices) CHECK_EQ(nearest / 128 % 2, 1);
  device::set_multiprocessors(1);
  for (uint64_t order = 0; order < 8; ++order) {
    device::set_order(order);
    expect(set.name, Prepared::nearest(queries, bank, nullptr, false, 1, 0), expected);
  }
  device::set_multiprocessors(3);
  Prepared prepared(bank, true);
  expect(set.name + ", by a prefix first", prepared.search(queries, bank, 1, 1), expected);
}

TEST(codes_spare_most_canonical_distances) {
  data::Set set = data::fill(data::make("clusters", 2000, 200), [](int64_t r, int64_t j) {
    return std::sin(static_cast<double>(r % 400 * 200 + j)) + 0.01 * std::sin(static_cast<double>(r * 7 + j * 13 + r * j));
  });
  const Rows& bank = data::rows_of(set);
  const Rows queries = first_rows(bank, 100);
  device::set_order(0);
  Prepared prepared(bank, true);
  for (const int prefix : {1, 0, -1}) {
    device::Value<cuda::SearchCounters> counters;
    expect("clusters", prepared.search(queries, bank, 1, prefix, counters.get()), on_cpu(queries, bank, 1));
    std::cout << "     prefix " << prefix << ": " << static_cast<double>((*counters).canonical) / 100 << " canonical distances a query of 2000\n";
    CHECK((*counters).canonical < 100 * 100);
    if (prefix == 1) CHECK((*counters).canonical > 0);  // else seeds by all codes may be the nearest rows already
  }
}

TEST(the_trial_speaks_for_a_prefix_that_tells_clusters_apart) {
  // Fifty clusters far from each other: a prefix leaves one pair in fifty, whatever its directions, and the trial wants one in 32 at most.
  const auto hash = [](int64_t value) { return (static_cast<uint64_t>(value) * 0x9e3779b97f4a7c15ull) >> 40; };
  data::Set set = data::fill(data::make("far clusters", 1000, 200), [&](int64_t r, int64_t j) {
    return (hash(r % 50 * 200 + j + 1) % 2 == 0 ? 1.0 : -1.0) + 1e-3 * static_cast<double>(hash(r * 200 + j) % 1000) / 1000;
  });
  const Rows& bank = data::rows_of(set);
  const Rows queries = first_rows(bank, 100);
  device::set_order(0);
  Prepared prepared(bank, true);
  unsigned long long canonical[2];
  for (const int prefix : {1, 0}) {
    device::Value<cuda::SearchCounters> counters;
    expect(set.name, prepared.search(queries, bank, 1, prefix, counters.get()), on_cpu(queries, bank, 1));
    canonical[prefix] = (*counters).canonical;
  }
  CHECK(canonical[1] > 0);
  CHECK_EQ(canonical[0], canonical[1]);  // the same plan
}

TEST(a_query_that_is_not_finite_is_reported_and_gets_nan) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const bool with_prefixes : {false, true}) {
      data::Set set = data::fill(data::make("set", 300, 200), [](int64_t r, int64_t j) { return std::cos(static_cast<double>(r * 200 + j)); });
      data::Set asked = data::fill(data::make("asked", 3, 200), [](int64_t r, int64_t j) { return std::sin(static_cast<double>(r * 200 + j)); });
      asked.values[200 + 150] = bad;
      const Rows& bank = data::rows_of(set);
      Prepared prepared(bank, with_prefixes);
      const Neighbors found = prepared.search(data::rows_of(asked), bank, 1, with_prefixes ? 1 : 0);
      CHECK(found.flags == cuda::kNonFinite);
      CHECK(std::isnan(found.squared_distances[1]));
      CHECK_EQ(found.indices[1], 0);
      const Neighbors first = on_cpu(first_rows(asked.rows, 1), bank, 1);
      CHECK_EQ(found.squared_distances[0], first.squared_distances[0]);
    }
  }
}

TEST(a_matrix_that_is_no_contraction_is_refused) {
  data::Set set = data::fill(data::make("set", 300, 200), [](int64_t r, int64_t j) { return std::cos(static_cast<double>(r * 200 + j)); });
  const Rows& bank = data::rows_of(set);
  const device::Vector<double> center(200, 0.0);
  device::Vector<int32_t> order(300);
  for (int32_t i = 0; i < 300; ++i) order[static_cast<size_t>(i)] = i;
  device::Block prepared(cuda::prepared_bank_bytes(300, 200, true)), workspace(cuda::prepare_bank_workspace_bytes(300, 200, true));
  for (const int64_t wrong : {0, 1, 2}) {
    device::Vector<int16_t> matrix(static_cast<size_t>(254 * 200), 0);
    for (int64_t o = 0; o < 63; ++o) matrix[static_cast<size_t>(o * 200 + o)] = 16000;         // orthogonal, each a little shorter than 1
    for (int64_t o = 63; o < 254; ++o) matrix[static_cast<size_t>(o * 200 + o - 63)] = 16000;  // the second prefix on its own
    if (wrong == 1) matrix[5 * 200 + 6] = 8000;                                                // no longer orthogonal to the next
    if (wrong == 2) matrix[7 * 200 + 7] = 16384;                                               // does not fit the planes
    device::Value<int32_t> flags;
    CHECK(device::finished(
        cuda::prepare_bank_cuda(bank, center.data(), matrix.data(), order.data(), true, workspace.data(), prepared.data(), flags.get(), nullptr)));
    CHECK_EQ(*flags, wrong == 0 ? 0 : cuda::kNoContraction);
  }
}

TEST(rows_too_long_for_codes_are_compared_pair_by_pair) {
  data::Set set = data::fill(data::make("long", 9, 40000), [](int64_t r, int64_t j) { return std::sin(static_cast<double>(r * 3 + j)); });
  const Rows& bank = data::rows_of(set);
  const Rows queries = first_rows(bank, 4);
  const Neighbors expected = on_cpu(queries, bank, 2);
  expect("long", Prepared::nearest(queries, bank, nullptr, false, 2, 0), expected);
  const Neighbors one = on_cpu(queries, bank, 1);
  CHECK(Prepared::image_scores(one, queries, bank, nullptr, false, 2, 3) == scores_on_cpu(one, queries, bank, 2, 3));
  data::Set asked = data::fill(data::make("infinite", 2, 40000), [](int64_t r, int64_t j) { return r == 1 && j == 5 ? INFINITY : 0.0; });
  const Neighbors found = Prepared::nearest(data::rows_of(asked), bank, nullptr, false, 1, 0);
  CHECK_EQ(found.flags, cuda::kNonFinite);
  CHECK(!std::isnan(found.squared_distances[0]) && std::isnan(found.squared_distances[1]));
}

TEST(image_scores_equal_those_of_the_cpu) {
  for (const int64_t dim : {7, 200}) {
    for (data::Set& set : data::sets(140, dim)) {
      const Rows& bank = data::rows_of(set);
      Rows queries = first_rows(bank, 60);
      const Neighbors found = on_cpu(queries, bank, 1);
      for (const int64_t b : {1, 2, 9, 40, 1000}) {
        if (dim == 200 && b != 9) continue;
        device::next_order();
        const device::Vector<float> expected = scores_on_cpu(found, queries, bank, 4, b);
        CHECK(Prepared::image_scores(found, queries, bank, nullptr, false, 4, b) == expected);
        if (b == 9) CHECK(Prepared(bank, dim == 200).scores(found, queries, bank, 4, b) == expected);
      }
    }
  }
}

TEST(images_with_bad_values_get_nan_and_say_why) {
  data::Set set = data::fill(data::make("set", 40, 5), [](int64_t r, int64_t j) { return std::cos(static_cast<double>(r * 5 + j)); });
  const Rows& bank = data::rows_of(set);
  const Rows queries = first_rows(bank, 12);
  for (uint64_t order = 0; order < 8; ++order) {
    const bool outside = order % 2 == 1;
    device::set_order(order);
    Neighbors found = on_cpu(queries, bank, 1);
    if (outside)
      found.indices[5] = 40;
    else
      found.squared_distances[5] = std::numeric_limits<double>::quiet_NaN();
    int32_t flags = 0;
    const device::Vector<float> scores = Prepared::image_scores(found, queries, bank, nullptr, false, 3, 4, &flags);
    CHECK((flags & (outside ? cuda::kOutside : cuda::kNonFinite)) != 0);
    CHECK(std::isnan(scores[1]));
    CHECK(!std::isnan(scores[0]) && !std::isnan(scores[2]));
  }
}

TEST_MAIN()
