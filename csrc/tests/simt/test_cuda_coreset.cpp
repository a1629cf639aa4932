// The CUDA coreset, against the CPU's: the same picks, the same bits of the distances and of the state that is left.
#include "coreset.h"
#include "device.h"

using namespace patchcore;
using device::CoresetCodes;
using device::Picks;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Picks start(int64_t count) { return {device::Vector<double>(static_cast<size_t>(count), kInfinity), {}, {}}; }

Picks on_cpu(const Rows& rows, int64_t count) {
  Picks picks = start(rows.count);
  picks.indices.resize(static_cast<size_t>(count));
  picks.squared_distances.resize(static_cast<size_t>(count));
  device::Vector<double> workspace(static_cast<size_t>(coreset_workspace_bytes(rows, serial())) / 8 + 1);
  CHECK(greedy_coreset_cpu(rows, count, serial(), workspace.data(), picks.state.data(), picks.indices.data(), picks.squared_distances.data()) ==
        Status::kOk);
  return picks;
}

void expect(const std::string& name, const Picks& found, const Picks& expected) {
  if (!(found == expected)) std::cerr << name << "\n";
  CHECK(found == expected);
}

}  // namespace

TEST(picks_equal_those_of_the_cpu_on_every_set) {
  for (const int64_t dim : {1, 3, 17, 65, 128, 130}) {
    for (data::Set& set : data::sets(dim == 17 ? 260 : 140, dim)) {
      const Rows& rows = data::rows_of(set);
      CoresetCodes codes(rows);
      for (const int64_t batch : {0, 1, 12}) {
        if (batch == 1 ? dim != 3 : batch == 0 && (dim == 3 || dim == 65 || dim == 128)) continue;
        const int64_t count = batch == 1 ? 9 : dim == 17 ? 30 : 13;
        const Picks expected = on_cpu(rows, count);
        device::next_order();
        Picks picks = start(rows.count);
        codes.select(count, batch, batch == 1 ? 3 : 2, &picks);
        expect(set.name + " dim " + std::to_string(dim) + " batch " + std::to_string(batch), picks, expected);
      }
    }
  }
}

TEST(slices_and_all_rows_give_a_permutation) {
  for (data::Set& set : data::sets(131, 9)) {
    const Rows& rows = data::rows_of(set);
    const Picks expected = on_cpu(rows, 131);
    CoresetCodes codes(rows);
    Picks picks = start(rows.count);
    device::next_order();
    for (const int64_t slice : {7, 81, 43}) codes.select(slice, 0, 2, &picks);
    expect(set.name, picks, expected);
  }
}

TEST(many_picks_take_few_passes) {
  data::Set set = data::fill(data::make("waves", 3000, 24), [](int64_t r, int64_t j) {
    return std::sin(0.37 * static_cast<double>(r) * (1 + static_cast<double>(j % 5))) / (1 + static_cast<double>(j));
  });
  const Rows& rows = data::rows_of(set);
  CoresetCodes codes(rows);
  Picks picks = start(rows.count);
  const int64_t passes = codes.select(500, 0, 1, &picks);
  std::cout << "     500 picks of 3000 rows in " << passes << " passes\n";
  CHECK(passes < 60);
  expect(set.name, picks, on_cpu(rows, 500));
}

TEST(the_number_of_passes_depends_on_the_rows_alone) {
  // Wrong counts of digits would still end in the right picks, but among more candidates than asked for, or after more passes.
  data::Set set = std::move(data::sets(300, 2)[0]);
  const Rows& rows = data::rows_of(set);
  CoresetCodes codes(rows);
  const Picks expected = on_cpu(rows, 60);
  std::vector<int64_t> passes;
  for (uint64_t order = 0; order < 4; ++order) {
    device::set_order(order);
    Picks picks = start(rows.count);
    passes.push_back(codes.select(60, 20, 1, &picks));
    expect(set.name, picks, expected);
  }
  std::cout << "     60 picks of 300 rows in " << passes[0] << " passes\n";
  for (const int64_t count : passes) CHECK_EQ(count, passes[0]);
}

TEST(added_picks_leave_the_state_of_greedy_ones) {
  for (data::Set& set : data::sets(200, 33)) {
    const Rows& rows = data::rows_of(set);
    const Picks expected = on_cpu(rows, 50);
    device::Vector<double> state(200, kInfinity);
    device::next_order();
    CoresetCodes(rows).add(expected.indices, &state);
    CHECK(state == expected.state);
  }
}

TEST(picks_of_several_groups_of_tiles_lower_every_row) {
  for (data::Set& set : data::sets(540, 2)) {
    if (set.name != "gaussian" && set.name != "lattice with ties" && set.name != "clusters") continue;
    const Rows& rows = data::rows_of(set);
    device::Vector<int64_t> picks(520);
    for (size_t i = 0; i < picks.size(); ++i) picks[i] = static_cast<int64_t>(539 - i);
    device::Vector<double> expected(540, kInfinity), workspace(static_cast<size_t>(coreset_workspace_bytes(rows, serial())) / 8 + 1);
    device::Vector<double> state = expected;
    Rows centers = rows;
    centers.count = 520;
    centers.data = static_cast<const char*>(rows.data) + 20 * rows.stride * (rows.type == ScalarType::kFloat32 ? 4 : 2);
    CHECK(update_min_distances_cpu(rows, centers, serial(), workspace.data(), expected.data()) == Status::kOk);
    for (const int64_t pick : picks) expected[static_cast<size_t>(pick)] = kPicked;
    device::next_order();
    CoresetCodes(rows).add(picks, &state);
    if (state != expected) std::cerr << set.name << "\n";
    CHECK(state == expected);
  }
}

TEST(a_pass_has_a_batch_of_candidates) {
  // Rows so far apart that all candidates of a pass are picked: the number of passes tells how many there were, at most a batch and at least half of
  // it. The keys differ in digits that hold bits of the value and of the row, or there is one too many of them in a group of digits.
  data::Set set = data::fill(data::make("far", 300, 2), [](int64_t r, int64_t j) { return static_cast<double>(j == 0 ? 100 * r : 0); });
  const Rows& rows = data::rows_of(set);
  const auto check = [&](const std::string& name, auto&& value, int64_t count, int64_t fewest, int64_t most) {
    Picks expected = start(300);
    for (int64_t i = 0; i < 300; ++i) expected.state[static_cast<size_t>(i)] = value(i);
    Picks picks = expected;
    expected.indices.resize(static_cast<size_t>(count));
    expected.squared_distances.resize(static_cast<size_t>(count));
    device::Vector<double> workspace(static_cast<size_t>(coreset_workspace_bytes(rows, serial())) / 8 + 1);
    CHECK(greedy_coreset_cpu(rows, count, serial(), workspace.data(), expected.state.data(), expected.indices.data(),
                             expected.squared_distances.data()) == Status::kOk);
    device::next_order();
    const int64_t passes = CoresetCodes(rows).select(count, 20, 1, &picks);
    std::cout << "     " << name << ": " << count << " picks, 20 candidates, " << passes << " passes\n";
    CHECK(fewest <= passes && passes <= most);
    expect(name, picks, expected);
  };
  check("last bits", [](int64_t i) { return 1 + static_cast<double>((i * 7 % 12 + (i % 3 == 0 ? 16 : 0)) / 3) * 0x1p-52; }, 250, 13, 25);
  check("few in the first digits", [](int64_t i) { return i < 8 ? 4.0 : 1 + static_cast<double>(i) * 0x1p-12; }, 28, 2, 3);
  check("a group of 21", [](int64_t i) { return i < 21 ? std::ldexp(1.0, -static_cast<int>(i % 16)) : std::ldexp(1.0, -200); }, 21, 2, 2);
  check("a digit of 30", [](int64_t i) { return i < 30 ? 1.5 + static_cast<double>(i) * 0x1p-20 : 0x1p-9; }, 30, 2, 3);
}

TEST(minima_over_centers_equal_those_of_the_cpu) {
  for (const int64_t dim : {1, 17, 130}) {
    for (data::Set& set : data::sets(150, dim)) {
      const Rows& rows = data::rows_of(set);
      for (const int64_t count : {1, 8, 9, 140}) {
        if (count == (dim == 17 ? 9 : 8)) continue;
        Rows centers = rows;
        centers.count = count;
        device::Vector<double> expected(150, kInfinity);
        expected[20] = kPicked;
        expected[21] = 1e-90;
        device::Vector<double> found = expected;
        device::Vector<double> workspace(static_cast<size_t>(coreset_workspace_bytes(rows, serial())) / 8 + 1);
        CHECK(update_min_distances_cpu(rows, centers, serial(), workspace.data(), expected.data()) == Status::kOk);
        device::next_order();
        device::Block memory(cuda::update_min_distances_workspace_bytes(rows, centers));
        device::Value<int32_t> flags;
        CHECK(device::finished(cuda::update_min_distances_cuda(rows, centers, memory.data(), found.data(), flags.get(), nullptr)));
        CHECK_EQ(*flags, 0);
        if (found != expected) std::cerr << set.name << " dim " << dim << " centers " << count << "\n";
        CHECK(found == expected);
      }
    }
  }
}

TEST(more_edges_than_fit_cost_passes_and_nothing_else) {
  // All keys are infinite and all rows near each other: with 4096 candidates every pair is an edge.
  data::Set set = data::fill(data::make("cloud", 1030, 2), [](int64_t r, int64_t j) { return std::sin(static_cast<double>(r * (j + 1))); });
  const Rows& rows = data::rows_of(set);
  CoresetCodes codes(rows);
  const Picks expected = on_cpu(rows, 3);
  for (const uint64_t order : {0, 1}) {  // with poison of either sign
    device::set_order(order);
    Picks picks = start(rows.count);
    codes.select(3, 4096, 1, &picks);
    expect(set.name, picks, expected);
  }
}

TEST(rows_too_long_for_codes_are_picked_one_by_one) {
  data::Set set = data::fill(data::make("long", 9, 40000), [](int64_t r, int64_t j) { return std::sin(static_cast<double>(r * 3 + j)); });
  const Rows& rows = data::rows_of(set);
  Picks picks = start(rows.count);
  picks.indices.resize(9);
  picks.squared_distances.resize(9);
  device::Value<int32_t> scratch, flags;
  CHECK(device::finished(cuda::greedy_by_all_cuda(rows, 9, scratch.get(), picks.state.data(), picks.indices.data(), picks.squared_distances.data(),
                                                  flags.get(), nullptr)));
  CHECK_EQ(*flags, 0);
  expect(set.name, picks, on_cpu(rows, 9));
}

TEST(rows_that_are_not_finite_are_reported) {
  data::Set set = data::fill(data::make("set", 300, 70), [](int64_t r, int64_t j) { return std::cos(static_cast<double>(r * 70 + j)); });
  set.values[200 * 70 + 3] = std::numeric_limits<float>::infinity();
  const Rows& rows = data::rows_of(set);
  const device::Vector<double> center(70, 0.0);
  device::Block codes(cuda::coreset_codes_bytes(300, 70)), workspace(cuda::coreset_codes_workspace_bytes(70));
  device::Value<int32_t> coding;
  CHECK(device::finished(cuda::coreset_codes_cuda(rows, center.data(), workspace.data(), codes.data(), coding.get(), nullptr)));
  CHECK_EQ(*coding, cuda::kNonFinite);
  for (const int64_t count : {2, 20}) {
    Rows centers = rows;
    centers.count = count;
    device::Vector<double> state(300, kInfinity);
    device::Block memory(cuda::update_min_distances_workspace_bytes(rows, centers));
    device::Value<int32_t> flags;
    CHECK(device::finished(cuda::update_min_distances_cuda(rows, centers, memory.data(), state.data(), flags.get(), nullptr)));
    CHECK_EQ(*flags, cuda::kNonFinite);
  }
}

TEST_MAIN()
