// The canonical distance (distance.h): its order of summation, and every level of instructions against it.
#include "distance.h"

#include <cstring>

#include "check.h"
#include "checks.h"
#include "cpu/dispatch.h"
#include "data.h"

using namespace patchcore;

namespace {

const int64_t kDims[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 127, 128, 129, 384, 1024, 1536};

// The definition once more, as a sum of lanes written down lane by lane.
double by_the_book(const std::vector<double>& a, const std::vector<double>& b) {
  double lanes[16];
  for (size_t l = 0; l < 16; ++l) {
    volatile double sum = 0;  // volatile: no rearrangement by the compiler
    for (size_t j = l; j < a.size(); j += 16) {
      volatile double difference = a[j] - b[j];
      volatile double square = difference * difference;
      sum = sum + square;
    }
    lanes[l] = sum;
  }
  for (int l = 0; l < 8; ++l) lanes[l] += lanes[l + 8];
  for (int l = 0; l < 4; ++l) lanes[l] += lanes[l + 4];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

}  // namespace

TEST(every_level_equals_the_definition_bit_for_bit) {
  const char* names[kMostLevels];
  const int levels = available_levels(names);
  CHECK(levels >= 1);
  for (const int64_t dim : kDims) {
    for (data::Set& set : data::sets(12, dim)) {
      if (set.rows.type != ScalarType::kFloat32) continue;
      const float* values = static_cast<const float*>(data::rows_of(set).data);
      for (int n = 0; n < levels; ++n) {
        std::vector<double> found(11);
        find_level(names[n])->squared_distances(values, values + set.rows.stride, set.rows.stride, 11, dim, found.data());
        for (int64_t r = 0; r < 11; ++r) {
          const double expected = by_the_book(data::widened(set.rows, 0), data::widened(set.rows, r + 1));
          CHECK_EQ(found[static_cast<size_t>(r)], expected);
          CHECK_EQ(squared_distance(values, values + (r + 1) * set.rows.stride, dim), expected);
        }
      }
    }
  }
}

TEST(distance_of_a_row_to_itself_is_zero_and_the_distance_is_symmetric) {
  for (data::Set& set : data::sets(3, 129)) {
    if (set.rows.type != ScalarType::kFloat32) continue;
    const float* a = static_cast<const float*>(data::rows_of(set).data);
    const float* b = a + set.rows.stride;
    CHECK_EQ(squared_distance(a, a, 129), 0.0);
    CHECK_EQ(squared_distance(a, b, 129), squared_distance(b, a, 129));
  }
}

TEST(extreme_values_neither_overflow_nor_vanish) {
  const float largest = std::numeric_limits<float>::max(), smallest = std::numeric_limits<float>::denorm_min();
  const float zero = 0, high[2] = {largest, largest}, low[2] = {-largest, -largest};
  CHECK(std::isfinite(squared_distance(high, low, 2)));
  CHECK(squared_distance(&smallest, &zero, 1) > 0);
}

TEST(every_half_precision_value_widens_exactly_at_every_level) {
  const char* names[kMostLevels];
  const int levels = available_levels(names);
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  for (int n = 0; n < levels; ++n) {
    for (const ScalarType type : {ScalarType::kFloat16, ScalarType::kBFloat16}) {
      const auto widen = type == ScalarType::kFloat16 ? find_level(names[n])->float16_to_float : find_level(names[n])->bfloat16_to_float;
      const int exponent_mask = type == ScalarType::kFloat16 ? 0x7c00 : 0x7f80;
      for (const int64_t count : {int64_t{65536}, int64_t{1}, int64_t{7}, int64_t{15}, int64_t{17}}) {
        std::vector<float> out(static_cast<size_t>(count) + 1, -7.0f);
        widen(all.data() + 65536 - count, count, out.data());
        CHECK_EQ(out.back(), -7.0f);  // nothing written past the end
        for (int64_t i = 0; i < count; ++i) {
          const uint16_t half = all[static_cast<size_t>(65536 - count + i)];
          const Rows one = {&half, type, 1, 1, 1};
          if ((half & exponent_mask) == exponent_mask) {
            CHECK(!std::isfinite(out[static_cast<size_t>(i)]));
          } else {
            CHECK_EQ(static_cast<double>(out[static_cast<size_t>(i)]), data::widened(one, 0)[0]);
          }
        }
      }
    }
  }
}

TEST(first_nonfinite_row_is_the_first) {
  for (const int64_t slots : {1, 2, 5}) {
    for (data::Set& set : data::sets(100, 9)) {
      CHECK_EQ(first_nonfinite_row_cpu(data::rows_of(set), data::slots(slots)), -1);
      for (const int64_t bad : {99, 60, 3}) {
        const size_t at = static_cast<size_t>(bad * set.rows.stride + 4);
        if (set.rows.type == ScalarType::kFloat32) {
          set.values[at] = bad == 60 ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
        } else {
          set.halves[at] = set.rows.type == ScalarType::kFloat16 ? 0xfc00 : 0x7fc0;
        }
        CHECK_EQ(first_nonfinite_row_cpu(data::rows_of(set), data::slots(slots)), bad);
      }
    }
  }
}

TEST(unknown_levels_are_not_found) {
  CHECK(find_level("scalar") != nullptr);
  CHECK(find_level("mmx") == nullptr);
  CHECK(find_level(level().name) == &level());
}

TEST_MAIN()
