// Greedy k-center (coreset.h) against the textbook loop.
#include "coreset.h"

#include "check.h"
#include "data.h"
#include "distance.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

using namespace patchcore;

namespace {

struct Result {
  std::vector<int64_t> indices;
  std::vector<double> squared_distances;
  std::vector<double> state;

  bool operator==(const Result& other) const {
    return indices == other.indices && squared_distances == other.squared_distances && state == other.state;
  }
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Result oracle(const Rows& rows, int64_t count) {
  Result result;
  result.state.assign(static_cast<size_t>(rows.count), kInfinity);
  for (int64_t p = 0; p < count; ++p) {
    int64_t best = -1;
    for (int64_t i = 0; i < rows.count; ++i) {
      if (result.state[static_cast<size_t>(i)] == kPicked) continue;
      if (best < 0 || result.state[static_cast<size_t>(i)] > result.state[static_cast<size_t>(best)]) best = i;
    }
    result.indices.push_back(best);
    result.squared_distances.push_back(result.state[static_cast<size_t>(best)]);
    result.state[static_cast<size_t>(best)] = kPicked;
    const std::vector<double> center = data::widened(rows, best);
    for (int64_t i = 0; i < rows.count; ++i) {
      double& value = result.state[static_cast<size_t>(i)];
      value = std::min(value, squared_distance(data::widened(rows, i).data(), center.data(), rows.dim));
    }
  }
  return result;
}

// `count` picks, cut into slices of `slice`.
Result select(const Rows& rows, int64_t count, int64_t slice, const Parallel& parallel) {
  Result result;
  result.state.assign(static_cast<size_t>(rows.count), kInfinity);
  result.indices.resize(static_cast<size_t>(count));
  result.squared_distances.resize(static_cast<size_t>(count));
  std::vector<double> workspace(static_cast<size_t>(coreset_workspace_bytes(rows, parallel)) / 8 + 1);
  for (int64_t done = 0; done < count; done += slice) {
    const Status status = greedy_coreset_cpu(rows, std::min(slice, count - done), parallel, workspace.data(), result.state.data(),
                                             result.indices.data() + done, result.squared_distances.data() + done);
    CHECK(status == Status::kOk);
  }
  return result;
}

// A rotation's prefix: `outputs` orthonormal directions, a hair shorter than 1 so that their matrix is a contraction.
struct Rotation {
  std::vector<double> center, matrix;
  CoresetRotation view;
};

Rotation make_rotation(const Rows& rows, int64_t outputs) {
  Rotation rotation;
  const int64_t columns = (outputs + 7) / 8 * 8;
  rotation.center = data::widened(rows, 0);
  rotation.matrix.assign(static_cast<size_t>(rows.dim * std::max<int64_t>(columns, 1)), 0.0);
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  std::vector<std::vector<double>> basis;
  for (int64_t o = 0; o < outputs; ++o) {
    std::vector<double> direction(static_cast<size_t>(rows.dim));
    for (double& value : direction) value = normal(random);
    for (int twice = 0; twice < 2; ++twice) {
      for (const std::vector<double>& other : basis) {
        double product = 0;
        for (size_t j = 0; j < direction.size(); ++j) product += direction[j] * other[j];
        for (size_t j = 0; j < direction.size(); ++j) direction[j] -= product * other[j];
      }
    }
    double norm = 0;
    for (const double value : direction) norm += value * value;
    for (double& value : direction) value /= std::sqrt(norm);
    basis.push_back(direction);
    for (int64_t j = 0; j < rows.dim; ++j) rotation.matrix[static_cast<size_t>(j * columns + o)] = (1 - 1e-9) * direction[static_cast<size_t>(j)];
  }
  rotation.view = {rotation.center.data(), outputs, columns, rotation.matrix.data()};
  return rotation;
}

// `count` picks by the batched algorithm, cut into slices.
Result select_batched(const Rows& rows, int64_t outputs, int64_t count, int64_t slice, const CoresetOptions& options, const Parallel& parallel,
                      CoresetStatistics* statistics = nullptr) {
  const Rotation rotation = make_rotation(rows, outputs);
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> codes(static_cast<size_t>(coreset_codes_bytes(rows, rotation.view)) / 64 + 1);
  std::vector<double> workspace(static_cast<size_t>(coreset_codes_workspace_bytes(rows, rotation.view, parallel)) / 8 + 1);
  pack_coreset_codes_cpu(rows, rotation.view, parallel, workspace.data(), codes.data());
  workspace.assign(static_cast<size_t>(batched_coreset_workspace_bytes(rows, codes.data(), parallel)) / 8 + 1, 0);
  Result result;
  result.state.assign(static_cast<size_t>(rows.count), kInfinity);
  result.indices.resize(static_cast<size_t>(count));
  result.squared_distances.resize(static_cast<size_t>(count));
  for (int64_t done = 0; done < count; done += slice) {
    batched_greedy_coreset_cpu(rows, codes.data(), std::min(slice, count - done), options, parallel, workspace.data(), result.state.data(),
                               result.indices.data() + done, result.squared_distances.data() + done, statistics);
  }
  return result;
}

}  // namespace

TEST(batched_picks_equal_the_textbook_loop_on_every_set) {
  for (const int64_t dim : {1, 3, 7, 16, 17, 33, 65}) {
    for (data::Set& set : data::sets(150, dim)) {
      const Result expected = oracle(data::rows_of(set), 70);
      for (const int64_t outputs : {int64_t{0}, int64_t{3}, int64_t{11}}) {
        if (outputs >= dim) continue;
        for (const CoresetOptions& options : {CoresetOptions{}, CoresetOptions{1, 0, 0}, CoresetOptions{32, 1, 0}, CoresetOptions{64, -1, 0},
                                              CoresetOptions{100, 1, 0}, CoresetOptions{0, 0, 1}}) {
          const Result found = select_batched(set.rows, outputs, 70, 70, options, data::threads(2));
          if (!(found == expected)) std::cerr << set.name << " dim " << dim << " outputs " << outputs << " batch " << options.batch << "\n";
          CHECK(found == expected);
        }
      }
      CHECK(select_batched(set.rows, dim > 3 ? 3 : 0, 70, 9, {}, data::threads(3)) == expected);
    }
  }
}

TEST(batched_picks_equal_the_loop_on_larger_sets) {
  for (const int64_t dim : {5, 48}) {
    for (data::Set& set : data::sets(3000, dim)) {
      const Result expected = select(data::rows_of(set), 600, 600, data::threads(2));
      for (const int64_t slots : {1, 2, 3}) {
        CoresetStatistics statistics;
        const Result found = select_batched(set.rows, dim > 16 ? 15 : 0, 600, 600, {}, data::threads(slots), &statistics);
        if (!(found == expected)) std::cerr << set.name << " dim " << dim << "\n";
        CHECK(found == expected);
        if (slots == 1)
          std::cout << "     " << set.name << " dim " << dim << ": " << statistics.passes << " passes, left by codes "
                    << 100.0 * static_cast<double>(statistics.survivors) / static_cast<double>(statistics.pairs) << "%, canonical "
                    << 100.0 * static_cast<double>(statistics.canonical) / static_cast<double>(statistics.pairs) << "%\n";
      }
    }
  }
}

TEST(batched_picks_are_a_permutation_when_all_rows_are_asked_for) {
  for (data::Set& set : data::sets(130, 9)) {
    CHECK(select_batched(data::rows_of(set), 4, 130, 130, {}, data::threads(2)) == select(set.rows, 130, 130, serial()));
  }
}

TEST(picks_equal_the_textbook_loop_on_every_set) {
  for (const int64_t dim : {1, 3, 16, 33}) {
    for (data::Set& set : data::sets(60, dim)) {
      const Result expected = oracle(data::rows_of(set), 25);
      for (const int64_t slots : {1, 2, 3, 7}) {
        if (!(select(set.rows, 25, 25, data::threads(slots)) == expected)) std::cerr << set.name << " dim " << dim << "\n";
        CHECK(select(set.rows, 25, 25, data::threads(slots)) == expected);
      }
      CHECK(select(set.rows, 25, 4, data::threads(2)) == expected);
    }
  }
}

TEST(rows_beyond_one_block_are_reached) {
  for (data::Set& set : data::sets(3 * kBlockRows + 17, 5)) {
    CHECK(select(data::rows_of(set), 30, 30, data::threads(2)) == oracle(set.rows, 30));
  }
}

TEST(as_many_picks_as_rows_give_a_permutation) {
  for (data::Set& set : data::sets(40, 3)) {
    const Result result = select(data::rows_of(set), 40, 7, data::threads(2));
    std::vector<bool> seen(40, false);
    for (const int64_t index : result.indices) seen[static_cast<size_t>(index)] = true;
    CHECK(seen == std::vector<bool>(40, true));
    CHECK(result.state == std::vector<double>(40, kPicked));
    for (size_t p = 1; p < 40; ++p) CHECK(result.squared_distances[p] <= result.squared_distances[p - 1]);
  }
}

TEST(more_slots_than_rows_do_no_harm) {
  for (data::Set& set : data::sets(3, 4)) CHECK(select(data::rows_of(set), 3, 1, data::threads(8)) == oracle(set.rows, 3));
}

TEST(update_equals_the_minimum_over_centers_and_keeps_picked_rows) {
  for (data::Set& set : data::sets(50, 17)) {
    const Rows& rows = data::rows_of(set);
    Rows centers = rows;
    centers.count = 6;
    std::vector<double> state(50, kInfinity);
    state[9] = kPicked;
    state[10] = 1e-90;
    std::vector<double> workspace(static_cast<size_t>(coreset_workspace_bytes(rows, data::threads(2))) / 8 + 1);
    CHECK(update_min_distances_cpu(rows, centers, data::threads(2), workspace.data(), state.data()) == Status::kOk);
    for (int64_t i = 0; i < 50; ++i) {
      double expected = i == 10 ? 1e-90 : kInfinity;
      for (int64_t c = 0; c < 6; ++c) {
        expected = std::min(expected, squared_distance(data::widened(rows, i).data(), data::widened(rows, c).data(), rows.dim));
      }
      CHECK_EQ(state[static_cast<size_t>(i)], i == 9 ? kPicked : expected);
    }
  }
}

TEST(nonfinite_rows_are_reported) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    data::Set set = data::fill(data::make("bad", 600, 8), [](int64_t r, int64_t j) { return static_cast<double>(r * 8 + j); });
    set.values[8 * 555 + 3] = bad;
    std::vector<double> state(600, kInfinity);
    std::vector<int64_t> indices(2);
    std::vector<double> distances(2);
    std::vector<double> workspace(static_cast<size_t>(coreset_workspace_bytes(data::rows_of(set), data::threads(2))) / 8 + 1);
    CHECK(greedy_coreset_cpu(set.rows, 2, data::threads(2), workspace.data(), state.data(), indices.data(), distances.data()) == Status::kNonFinite);
  }
}

#if defined(__SSE2__)
TEST(flush_to_zero_of_the_caller_changes_nothing) {
  for (data::Set& set : data::sets(40, 5)) {
    const Result expected = select(data::rows_of(set), 20, 20, data::threads(2));
    const unsigned int before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);  // flush to zero, denormals are zero
    const Result flushed = select(set.rows, 20, 20, serial());
    const bool restored = _mm_getcsr() == (before | 0x8040);
    _mm_setcsr(before);
    CHECK(flushed == expected);
    CHECK(restored);
    if (set.name == "subnormal") CHECK(expected.squared_distances[5] > 0);  // there was something to lose
  }
}
#endif

TEST_MAIN()
