// Eq. (7) (image_score.h) and its exponential (exp.h).
#include "image_score.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "check.h"
#include "data.h"
#include "distance.h"
#include "exp.h"
#include "knn.h"

using namespace patchcore;

namespace {

// Eq. (7) in long double, straight from the text.
double oracle(const Rows& patches, const Rows& bank, int64_t num_neighbors) {
  double largest = -1;
  int64_t patch = -1, nearest = -1;
  for (int64_t p = 0; p < patches.count; ++p) {
    double smallest = std::numeric_limits<double>::infinity();
    int64_t row = -1;
    for (int64_t m = 0; m < bank.count; ++m) {
      const double d2 = squared_distance(data::widened(patches, p).data(), data::widened(bank, m).data(), bank.dim);
      if (d2 < smallest) {
        smallest = d2;
        row = m;
      }
    }
    if (smallest > largest) {
      largest = smallest;
      patch = p;
      nearest = row;
    }
  }
  std::vector<std::pair<double, int64_t>> others;
  for (int64_t m = 0; m < bank.count; ++m) {
    if (m != nearest) others.emplace_back(squared_distance(data::widened(bank, nearest).data(), data::widened(bank, m).data(), bank.dim), m);
  }
  std::sort(others.begin(), others.end());
  others.resize(std::min(others.size(), static_cast<size_t>(num_neighbors - 1)));
  const long double s = std::sqrt(static_cast<long double>(largest));
  long double sum = 1;  // exp(d(t, m*)) / exp(d(t, m*))
  for (const auto& [ignored, m] : others) {
    const double d2 = squared_distance(data::widened(patches, patch).data(), data::widened(bank, m).data(), bank.dim);
    sum += std::exp(std::sqrt(static_cast<long double>(d2)) - s);
  }
  return static_cast<double>(others.empty() ? s : (1 - 1 / sum) * s);
}

float score(const Rows& patches, const Rows& bank, int64_t num_neighbors, const Parallel& parallel, int64_t copies = 1) {
  std::vector<double> squared(static_cast<size_t>(patches.count));
  std::vector<int64_t> nearest(static_cast<size_t>(patches.count));
  std::vector<double> workspace(static_cast<size_t>(nearest_neighbors_workspace_bytes(patches, bank, 1, parallel)) / 8 + 1);
  CHECK(nearest_neighbors_cpu(patches, bank, 1, parallel, workspace.data(), squared.data(), nearest.data()) == Status::kOk);
  workspace.assign(static_cast<size_t>(image_scores_workspace_bytes(patches, bank, nullptr, num_neighbors, parallel)) / 8 + 1, 0);
  std::vector<float> scores(static_cast<size_t>(copies));
  CHECK(image_scores_cpu(squared.data(), nearest.data(), patches, bank, nullptr, copies, patches.count / copies, num_neighbors, parallel,
                         workspace.data(), scores.data()) == Status::kOk);
  // The same from a prepared bank.
  const std::vector<double> center(static_cast<size_t>(bank.dim));
  std::vector<int32_t> order(static_cast<size_t>(bank.count));
  std::iota(order.begin(), order.end(), 0);
  const BankRotation rotation = {center.data(), 0, 0, nullptr, order.data()};
  std::vector<double> prepared(static_cast<size_t>(prepared_bank_bytes(bank, rotation)) / 8 + 8);
  void* codes = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(prepared.data()) + 63) / 64 * 64);
  workspace.assign(static_cast<size_t>(prepare_bank_workspace_bytes(bank, rotation, parallel)) / 8 + 1, 0);
  prepare_bank_cpu(bank, rotation, parallel, workspace.data(), codes);
  workspace.assign(static_cast<size_t>(image_scores_workspace_bytes(patches, bank, codes, num_neighbors, parallel)) / 8 + 1, 0);
  std::vector<float> again(static_cast<size_t>(copies));
  CHECK(image_scores_cpu(squared.data(), nearest.data(), patches, bank, codes, copies, patches.count / copies, num_neighbors, parallel,
                         workspace.data(), again.data()) == Status::kOk);
  CHECK(again == scores);
  return scores.back();
}

}  // namespace

TEST(scores_follow_equation_7_on_every_set) {
  for (const int64_t dim : {1, 3, 16, 33}) {
    for (data::Set& set : data::sets(60, dim)) {
      Rows bank = data::rows_of(set), patches = bank;
      bank.count = 45;
      patches.count = 15;
      const int64_t size = bank.type == ScalarType::kFloat32 ? 4 : 2;
      patches.data = static_cast<const char*>(bank.data) + 45 * bank.stride * size;
      for (const int64_t b : {1, 2, 9, 45, 100}) {
        const double expected = oracle(patches, bank, b);
        const float found = score(patches, bank, b, data::slots(2));
        const double tolerance = 1e-6 * std::abs(expected) + 1e-12 * std::abs(oracle(patches, bank, 1)) + std::numeric_limits<float>::denorm_min();
        if (!(std::abs(found - expected) <= tolerance))
          std::cerr << set.name << " dim " << dim << " b " << b << ": " << found << " " << expected << "\n";
        CHECK(std::abs(found - expected) <= tolerance);
        CHECK_EQ(score(patches, bank, b, serial()), found);
      }
    }
  }
}

TEST(equation_7_by_hand_on_three_rows) {
  // m* = (0), the patch at distance 2; b = 3: the others at distances 3 and 1 from m*, 5 and 3 from the patch on the other side
  data::Set bank = data::fill(data::make("bank", 3, 1), [](int64_t r, int64_t) { return r == 0 ? 0.0 : r == 1 ? 3.0 : 1.0; });
  data::Set patch = data::fill(data::make("patch", 1, 1), [](int64_t, int64_t) { return -2.0; });
  const double expected = (1 - std::exp(2.0) / (std::exp(2.0) + std::exp(3.0) + std::exp(5.0))) * 2;
  CHECK(std::abs(score(data::rows_of(patch), data::rows_of(bank), 3, serial()) - expected) < 1e-6);
  const double with_two = (1 - std::exp(2.0) / (std::exp(2.0) + std::exp(3.0))) * 2;  // N_2(m*) = {m*, the row at 1}
  CHECK(std::abs(score(data::rows_of(patch), data::rows_of(bank), 2, serial()) - with_two) < 1e-6);
}

TEST(duplicates_do_not_take_the_place_of_the_nearest_row) {
  // Rows 0 and 1 are equal; m* is row 0 and N_2 = {0, 1}: the quotient is exactly one half.
  data::Set bank = data::fill(data::make("bank", 3, 1), [](int64_t r, int64_t) { return r == 2 ? 100.0 : 0.0; });
  data::Set patch = data::fill(data::make("patch", 1, 1), [](int64_t, int64_t) { return 4.0; });
  CHECK_EQ(score(data::rows_of(patch), data::rows_of(bank), 2, serial()), 2.0f);
}

TEST(an_image_scores_the_same_alone_and_in_a_batch) {
  data::Set bank = data::fill(data::make("bank", 300, 8), [](int64_t r, int64_t j) { return std::sin(static_cast<double>(r * 8 + j)); });
  data::Set patches = data::fill(data::make("patches", 40, 8), [](int64_t r, int64_t j) { return std::cos(static_cast<double>((r % 10) * 8 + j)); });
  Rows one = data::rows_of(patches);
  one.count = 10;
  CHECK_EQ(score(data::rows_of(patches), data::rows_of(bank), 9, data::slots(3), 4), score(one, bank.rows, 9, serial()));
}

TEST(exp_is_within_one_ulp) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> uniform(0, 1);
  double worst = 0;
  for (int i = 0; i < 2000000; ++i) {
    const double scale = i % 3 == 0 ? 708.0 : i % 3 == 1 ? 2.0 : 1e-3;
    const double x = -scale * uniform(random);
    const long double truth = std::exp(static_cast<long double>(x));
    const long double ulp = std::ldexp(1.0L, std::ilogb(static_cast<double>(truth)) - 52);
    worst = std::max(worst, static_cast<double>(std::abs(exp_of_nonpositive(x) - truth) / ulp));
  }
  std::cout << "     largest error of exp: " << worst << " ulp\n";
  CHECK(worst < 1.0);
  CHECK(worst > 0.49);  // the measurement itself works: no double routine stays below one half
  CHECK_EQ(exp_of_nonpositive(0.0), 1.0);
  CHECK_EQ(exp_of_nonpositive(-709.0), 0.0);
  CHECK_EQ(exp_of_nonpositive(-1e300), 0.0);
  CHECK_EQ(exp_of_nonpositive(-std::numeric_limits<double>::infinity()), 0.0);
}

TEST_MAIN()
