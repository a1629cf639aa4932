// Greedy k-center (coreset.h) against the textbook loop.
#include "coreset.h"

#include <algorithm>

#include "check.h"
#include "cpu/codes.h"
#include "cpu/dispatch.h"
#include "cpu/operands.h"
#include "data.h"
#include "distance.h"
#include "filter.h"

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

// The codes of a set of rows with a rotation of so many outputs.
class Packed {
 public:
  Packed(const Rows& rows, int64_t outputs) : rows_(rows) {
    const Rotation rotation = make_rotation(rows, outputs);
    lines_.resize(static_cast<size_t>(coreset_codes_bytes(rows, rotation.view)) / 64 + 1);
    std::vector<double> workspace(static_cast<size_t>(coreset_codes_workspace_bytes(rows, rotation.view, data::slots(2))) / 8 + 1);
    pack_coreset_codes_cpu(rows, rotation.view, data::slots(2), workspace.data(), lines_.data());
    CHECK(coreset_codes_fit(rows, lines_.data(), coreset_codes_bytes(rows, rotation.view)));
    CHECK(!coreset_codes_fit(rows, lines_.data(), coreset_codes_bytes(rows, rotation.view) - 64));
  }

  const void* codes() const { return lines_.data(); }

  // The copies inside, prefix first; writable, so that a test can break them.
  std::vector<Codes> copies() const {
    Codes prefix, full;
    coreset_codes_inside(rows_, lines_.data(), &prefix, &full);
    return prefix.words > 0 ? std::vector<Codes>{prefix, full} : std::vector<Codes>{full};
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  Rows rows_;
  std::vector<Line> lines_;
};

// `count` picks by the batched algorithm, cut into slices.
Result select_with(const Rows& rows, const Packed& packed, int64_t count, int64_t slice, const CoresetOptions& options, const Parallel& parallel,
                   CoresetStatistics* statistics) {
  std::vector<double> workspace(static_cast<size_t>(batched_coreset_workspace_bytes(rows, packed.codes(), parallel)) / 8 + 1);
  Result result;
  result.state.assign(static_cast<size_t>(rows.count), kInfinity);
  result.indices.resize(static_cast<size_t>(count));
  result.squared_distances.resize(static_cast<size_t>(count));
  for (int64_t done = 0; done < count; done += slice) {
    batched_greedy_coreset_cpu(rows, packed.codes(), std::min(slice, count - done), options, parallel, workspace.data(), result.state.data(), nullptr,
                               result.indices.data() + done, result.squared_distances.data() + done, statistics);
  }
  return result;
}

Result select_batched(const Rows& rows, int64_t outputs, int64_t count, int64_t slice, const CoresetOptions& options, const Parallel& parallel,
                      CoresetStatistics* statistics = nullptr) {
  return select_with(rows, Packed(rows, outputs), count, slice, options, parallel, statistics);
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
          const Result found = select_batched(set.rows, outputs, 70, 70, options, data::slots(2));
          if (!(found == expected)) std::cerr << set.name << " dim " << dim << " outputs " << outputs << " batch " << options.batch << "\n";
          CHECK(found == expected);
        }
      }
      CHECK(select_batched(set.rows, dim > 3 ? 3 : 0, 70, 9, {}, data::slots(3)) == expected);
    }
  }
}

TEST(batched_picks_equal_the_loop_on_larger_sets) {
  for (const int64_t dim : {5, 48}) {
    for (data::Set& set : data::sets(3000, dim)) {
      const Result expected = select(data::rows_of(set), 600, 600, data::slots(2));
      for (const int64_t slots : {1, 2, 3}) {
        CoresetStatistics statistics;
        const Result found = select_batched(set.rows, dim > 16 ? 15 : 0, 600, 600, {}, data::slots(slots), &statistics);
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

TEST(batched_picks_equal_the_loop_at_the_edges_of_words_registers_and_lanes) {
  for (const int64_t dim : {8, 15, 31, 64, 127, 128, 129, 384, 1024, 1536}) {
    for (data::Set& set : data::sets(120, dim)) {
      const Result expected = select(data::rows_of(set), 40, 40, serial());
      for (const CoresetOptions& options : {CoresetOptions{32, 1, 0}, CoresetOptions{50, -1, 0}, CoresetOptions{0, 0, 1}}) {
        const Result found = select_batched(set.rows, std::min<int64_t>(dim / 2, 47), 40, 40, options, serial());
        if (!(found == expected)) std::cerr << set.name << " dim " << dim << " batch " << options.batch << "\n";
        CHECK(found == expected);
      }
    }
  }
}

TEST(fat_clusters_end_with_the_same_picks) {
  // 60 clusters of 60 rows, each row nearer to its own than the clusters to each other: a batch of candidates lies in one cluster.
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal;
  std::vector<double> centers(60 * 20);
  for (double& value : centers) value = 100 * normal(random);
  data::Set set = data::fill(data::make("fat clusters", 3600, 20),
                             [&](int64_t r, int64_t j) { return centers[static_cast<size_t>(r % 60 * 20 + j)] + 0.01 * normal(random); });
  const Result expected = select(data::rows_of(set), 300, 300, serial());
  CHECK(select_batched(set.rows, 7, 300, 300, {}, serial()) == expected);
  CHECK(select_batched(set.rows, 7, 300, 300, {32, 0, 0}, serial()) == expected);
}

TEST(added_picks_leave_the_state_of_greedy_ones) {
  for (data::Set& set : data::sets(200, 33)) {
    const Result expected = select(data::rows_of(set), 50, 50, serial());
    const Packed packed(set.rows, 11);
    std::vector<double> state(200, kInfinity);
    std::vector<double> workspace(static_cast<size_t>(batched_coreset_workspace_bytes(set.rows, packed.codes(), serial())) / 8 + 1);
    batched_add_picks_cpu(set.rows, packed.codes(), expected.indices.data(), 50, serial(), workspace.data(), state.data(), nullptr);
    CHECK(state == expected.state);
  }
}

// The filter run with a checker: no pair that it discards would have lowered a value.
TEST(no_discarded_pair_would_have_changed_a_minimum) {
  int64_t discarded = 0, pairs = 0;
  for (const int64_t dim : {3, 16, 33, 129}) {
    for (data::Set& set : data::sets(160, dim)) {
      const Rows& rows = data::rows_of(set);
      const Packed packed(rows, std::min<int64_t>(dim - 1, 11));
      const Result state = select(rows, 20, 20, serial());
      for (const Codes& codes : packed.copies()) {
        std::vector<int64_t> which(64);
        for (int64_t i = 0; i < 64; ++i) which[static_cast<size_t>(i)] = 2 * i + 1;
        std::vector<double> memory(static_cast<size_t>(operands_bytes(64, dim, codes, codes)) / 8 + 8);
        char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        Operands operands = operands_at(64, dim, codes, codes, aligned);
        gather_operands(rows, codes, codes, which.data(), 64, StartWith::kNorm, serial(), &operands);
        for (int64_t r = 0; r < 160; ++r) {
          const double reach = update_reach(state.state[static_cast<size_t>(r)], 0, codes.residuals[r], codes.scale, canonical_slack(dim));
          const int32_t floor = int8_floor(codes.squared_norms[r], int8_skip_limit(reach, operands.tile_residuals[0]));
          uint64_t survivors;
          level().scan_rows(codes.codes + r * 4 * codes.words, 0, 1, operands.tiles, operands.start, 1, codes.words, &floor, &survivors, 1);
          for (int64_t o = 0; o < 64; ++o) {
            ++pairs;
            if (survivors >> o & 1) continue;
            ++discarded;
            const double canonical = squared_distance(data::widened(rows, r).data(), operands.rows + o * dim, dim);
            CHECK(canonical >= state.state[static_cast<size_t>(r)]);
          }
        }
      }
    }
  }
  std::cout << "     discarded " << 100.0 * static_cast<double>(discarded) / static_cast<double>(pairs) << "% of " << pairs << " pairs\n";
  CHECK(discarded > pairs / 2);
}

// Rows left behind change no pick; the values of the others, and the largest, are exact.
TEST(rows_left_behind_are_not_missed) {
  int64_t left_behind = 0, states = 0;
  for (const int64_t dim : {3, 33, 129}) {
    for (data::Set& set : data::sets(700, dim)) {
      const Rows& rows = data::rows_of(set);
      const Packed packed(rows, std::min<int64_t>(dim - 1, 11));
      const int64_t count = 260;
      const Result expected = select(rows, count, count, serial());
      for (const CoresetOptions& options : {CoresetOptions{}, CoresetOptions{16, 1, 0}, CoresetOptions{64, -1, 0}, CoresetOptions{0, 0, 1}}) {
        for (const int64_t slice : {count, int64_t{1}, int64_t{37}}) {
          const Parallel parallel = slice == 37 ? data::slots(3) : serial();
          std::vector<double> workspace(static_cast<size_t>(batched_coreset_workspace_bytes(rows, packed.codes(), parallel)) / 8 + 1);
          std::vector<double> state(static_cast<size_t>(rows.count), kInfinity), values(static_cast<size_t>(count));
          std::vector<int32_t> lowered(static_cast<size_t>(rows.count), kUpToDate);
          std::vector<int64_t> picks(static_cast<size_t>(count));
          for (int64_t done = 0; done < count; done += slice) {
            const CoresetBehind behind = {picks.data(), done, lowered.data()};
            batched_greedy_coreset_cpu(rows, packed.codes(), std::min(slice, count - done), options, parallel, workspace.data(), state.data(),
                                       &behind, picks.data() + done, values.data() + done, nullptr);
          }
          if (picks != expected.indices) std::cerr << set.name << " dim " << dim << " slice " << slice << " batch " << options.batch << "\n";
          CHECK(picks == expected.indices);
          CHECK(values == expected.squared_distances);
          const double largest = *std::max_element(expected.state.begin(), expected.state.end());
          CHECK_EQ(*std::max_element(state.begin(), state.end()), largest);
          for (size_t i = 0; i < state.size(); ++i) {
            ++states;
            left_behind += lowered[i] != kUpToDate;
            CHECK(lowered[i] == kUpToDate ? state[i] == expected.state[i] : state[i] >= expected.state[i] && state[i] < largest);
          }
        }
      }
    }
  }
  std::cout << "     left behind at the end " << 100.0 * static_cast<double>(left_behind) / static_cast<double>(states) << "% of the rows\n";
  CHECK(left_behind > states / 10);
}

// A filter without the residual term must be caught by the comparison with the loop: the tests above have teeth.
TEST(without_residuals_the_picks_are_wrong) {
  int wrong = 0;
  for (data::Set& set : data::sets(400, 33)) {
    Packed packed(data::rows_of(set), 11);
    for (const Codes& codes : packed.copies()) std::fill(codes.residuals, codes.residuals + 400, 0.0f);
    wrong += !(select_with(set.rows, packed, 150, 150, {}, serial(), nullptr) == select(set.rows, 150, 150, serial()));
  }
  CHECK(wrong > 0);
}

TEST(batched_picks_are_a_permutation_when_all_rows_are_asked_for) {
  for (data::Set& set : data::sets(130, 9)) {
    CHECK(select_batched(data::rows_of(set), 4, 130, 130, {}, data::slots(2)) == select(set.rows, 130, 130, serial()));
  }
}

TEST(picks_equal_the_textbook_loop_on_every_set) {
  for (const int64_t dim : {1, 3, 16, 33}) {
    for (data::Set& set : data::sets(60, dim)) {
      const Result expected = oracle(data::rows_of(set), 25);
      for (const int64_t slots : {1, 2, 3, 7}) {
        if (!(select(set.rows, 25, 25, data::slots(slots)) == expected)) std::cerr << set.name << " dim " << dim << "\n";
        CHECK(select(set.rows, 25, 25, data::slots(slots)) == expected);
      }
      CHECK(select(set.rows, 25, 4, data::slots(2)) == expected);
    }
  }
}

TEST(real_threads_give_the_same_picks) {
  for (data::Set& set : data::sets(3000, 48)) {
    CHECK(select(data::rows_of(set), 12, 12, data::threads(3)) == select(set.rows, 12, 12, serial()));
    CHECK(select_batched(set.rows, 15, 300, 300, {}, data::threads(3)) == select_batched(set.rows, 15, 300, 300, {}, serial()));
  }
}

TEST(rows_beyond_one_block_are_reached) {
  for (data::Set& set : data::sets(3 * kBlockRows + 17, 5)) {
    CHECK(select(data::rows_of(set), 30, 30, data::slots(2)) == oracle(set.rows, 30));
  }
}

TEST(as_many_picks_as_rows_give_a_permutation) {
  for (data::Set& set : data::sets(40, 3)) {
    const Result result = select(data::rows_of(set), 40, 7, data::slots(2));
    std::vector<bool> seen(40, false);
    for (const int64_t index : result.indices) seen[static_cast<size_t>(index)] = true;
    CHECK(seen == std::vector<bool>(40, true));
    CHECK(result.state == std::vector<double>(40, kPicked));
    for (size_t p = 1; p < 40; ++p) CHECK(result.squared_distances[p] <= result.squared_distances[p - 1]);
  }
}

TEST(more_slots_than_rows_do_no_harm) {
  for (data::Set& set : data::sets(3, 4)) CHECK(select(data::rows_of(set), 3, 1, data::slots(8)) == oracle(set.rows, 3));
}

TEST(update_equals_the_minimum_over_centers_and_keeps_picked_rows) {
  for (data::Set& set : data::sets(50, 17)) {
    const Rows& rows = data::rows_of(set);
    Rows centers = rows;
    centers.count = 6;
    std::vector<double> state(50, kInfinity);
    state[9] = kPicked;
    state[10] = 1e-90;
    std::vector<double> workspace(static_cast<size_t>(coreset_workspace_bytes(rows, data::slots(2))) / 8 + 1);
    CHECK(update_min_distances_cpu(rows, centers, data::slots(2), workspace.data(), state.data()) == Status::kOk);
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
    std::vector<double> workspace(static_cast<size_t>(coreset_workspace_bytes(data::rows_of(set), data::slots(2))) / 8 + 1);
    CHECK(greedy_coreset_cpu(set.rows, 2, data::slots(2), workspace.data(), state.data(), indices.data(), distances.data()) == Status::kNonFinite);
  }
}

#if defined(__SSE2__)
TEST(flush_to_zero_of_the_caller_changes_nothing) {
  for (data::Set& set : data::sets(40, 5)) {
    const Result expected = select(data::rows_of(set), 20, 20, data::slots(2));
    const unsigned int before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);  // flush to zero, denormals are zero
    const Result flushed = select(set.rows, 20, 20, serial());
    const Result batched = select_batched(set.rows, 2, 20, 20, {32, 1, 0}, serial());
    const bool restored = _mm_getcsr() == (before | 0x8040);
    _mm_setcsr(before);
    CHECK(flushed == expected);
    CHECK(batched == expected);
    CHECK(restored);
    if (set.name == "subnormal") CHECK(expected.squared_distances[5] > 0);  // there was something to lose
  }
}
#endif

TEST_MAIN()
