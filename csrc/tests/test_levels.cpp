// The inner loops of every level (cpu/dispatch.h) against those of the scalar one, on codes of all values and lengths.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "check.h"
#include "cpu/dispatch.h"
#include "cpu/level_avx2.h"
#include "cpu/stage_starts.h"
#include "filter.h"

using namespace patchcore;

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512vl,avx512vnni")

// The AVX-VNNI level's source, compiled for the same instruction as AVX-512 has it.
namespace twin {

#define PATCHCORE_DPBUSD _mm256_dpbusd_epi32
#include "cpu/vnni256.inc"
#undef PATCHCORE_DPBUSD

}  // namespace twin

#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

// The AMX level's source with the tile registers in memory, as strict as the processor is about their shapes.
namespace tiles_in_memory {

struct Tile {
  int64_t rows, bytes;
  uint8_t data[16][64];
};
Tile registers[8];
bool configured = false;

template <class Shapes>
void configure(const Shapes* shapes) {
  for (int i = 0; i < 8; ++i) registers[i] = {shapes->rows[i], shapes->row_bytes[i], {}};
  configured = shapes->palette == 1;
}

void load(Tile* to, const void* from, int64_t stride) {
  CHECK(configured && to->rows > 0 && to->rows <= 16 && to->bytes > 0 && to->bytes <= 64 && to->bytes % 4 == 0);
  for (int64_t r = 0; r < to->rows; ++r) std::memcpy(to->data[r], static_cast<const char*>(from) + r * stride, static_cast<size_t>(to->bytes));
}

void store(const Tile& from, void* to, int64_t stride) {
  for (int64_t r = 0; r < from.rows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, from.data[r], static_cast<size_t>(from.bytes));
}

void add_dots(Tile* sums, const Tile& rows, const Tile& operands) {
  CHECK(configured && rows.bytes == 4 * operands.rows && sums->rows == rows.rows && sums->bytes == operands.bytes);
  for (int64_t r = 0; r < sums->rows; ++r) {
    for (int64_t o = 0; o < sums->bytes / 4; ++o) {
      int32_t sum;
      std::memcpy(&sum, sums->data[r] + 4 * o, 4);
      for (int64_t k = 0; k < rows.bytes; ++k) sum += rows.data[r][k] * static_cast<int8_t>(operands.data[k / 4][4 * o + k % 4]);
      std::memcpy(sums->data[r] + 4 * o, &sum, 4);
    }
  }
}

#define PATCHCORE_TILE_CONFIGURE(shapes) configure(shapes)
#define PATCHCORE_TILE_RELEASE() configured = false
#define PATCHCORE_TILE_ZERO(t) std::memset(registers[t].data, 0, sizeof(registers[t].data))
#define PATCHCORE_TILE_LOAD(t, from, stride) load(&registers[t], from, stride)
#define PATCHCORE_TILE_STORE(t, to, stride) store(registers[t], to, stride)
#define PATCHCORE_TILE_DOTS(sums, rows, operands) add_dots(&registers[sums], registers[rows], registers[operands])
#include "cpu/amx_scan.inc"

}  // namespace tiles_in_memory

#pragma GCC pop_options
#endif

namespace {

std::vector<Level> levels() {
  std::vector<Level> all;
  const char* names[kMostLevels];
  const int count = available_levels(names);
  for (int i = 0; i < count; ++i) all.push_back(*find_level(names[i]));
#if defined(__x86_64__)
  if (find_level("avx512") != nullptr) {
    Level level = *find_level("avx2");
    level.name = "avxvnni, by AVX-512's instruction";
    level.scanned_code = find_level("avx512")->scanned_code;
    level.scan_rows = twin::scan_rows;
    level.stage_bytes = 4;
    level.scan_stages = twin::scan_stages;
    level.scan_tile = twin::scan_tile;
    level.dots = twin::dots;
    all.push_back(level);
    level = *find_level("avx512");
    level.name = "amx, by tiles in memory";
    level.scan_rows = tiles_in_memory::scan_rows_by_tiles;
    all.push_back(level);
  }
#endif
  return all;
}

std::mt19937_64& generator() {
  static std::mt19937_64 random(17);
  return random;
}

// Codes of the whole range, with runs of the extremes: sums must neither saturate nor wrap.
template <class T>
std::vector<T> codes(int64_t count, int low, int high) {
  std::vector<T> all(static_cast<size_t>(count));
  const uint64_t kind = generator()() % 4;
  for (T& code : all) {
    const uint64_t word = generator()();
    code = static_cast<T>(kind == 0   ? high
                          : kind == 1 ? (word % 2 == 0 ? low : high)
                                      : low + static_cast<int>(word % static_cast<uint64_t>(high - low + 1)));
  }
  return all;
}

}  // namespace

TEST(scans_and_dots_equal_the_scalar_level) {
  const Level& scalar = *find_level("scalar");
  for (const Level& level : levels()) {
    for (const int64_t words : {1, 2, 3, 8, 12, 15, 16, 17, 32, 33, 384, 1100}) {
      for (const int64_t count : {1, 2, 3, 4, 7, 17, 28, 48}) {
        const int most = level.scanned_code;
        const std::vector<uint8_t> rows = codes<uint8_t>(count * 4 * words, 1, 2 * most + 1);
        const int64_t tiles = words < 64 ? 3 : 1, mask_stride = tiles + 2;
        const std::vector<int8_t> tile = codes<int8_t>(tiles * 4 * words * kTileOperands, -most, most);
        std::vector<int32_t> start(static_cast<size_t>(tiles * kTileOperands)), floors(static_cast<size_t>(std::max(count, kTileOperands)));
        for (int32_t& value : start) value = generator()() % 8 == 0 ? kInt8PaddingStart / 2 : static_cast<int32_t>(generator()() % 20000) - 10000;
        for (int32_t& value : floors) value = static_cast<int32_t>(generator()() % 200000) - 100000;
        std::vector<uint64_t> found(static_cast<size_t>(count * mask_stride), 5), expected = found;  // what lies between the masks stays as it is
        level.scan_rows(rows.data(), 4 * words, count, tile.data(), start.data(), tiles, words, floors.data(), found.data(), mask_stride);
        scalar.scan_rows(rows.data(), 4 * words, count, tile.data(), start.data(), tiles, words, floors.data(), expected.data(), mask_stride);
        if (found != expected) std::cerr << level.name << " words " << words << " rows " << count << "\n";
        CHECK(found == expected);
        for (const int32_t offset : {0, 5000}) {
          CHECK_EQ(level.scan_tile(rows.data(), tile.data(), start.data(), words, floors.data(), offset),
                   scalar.scan_tile(rows.data(), tile.data(), start.data(), words, floors.data(), offset));
        }
        const std::vector<uint8_t> row = codes<uint8_t>(4 * words, 1, 255);
        const std::vector<int8_t> others = codes<int8_t>(4 * words * kTileOperands, -127, 127);
        for (const int64_t operands : {1, 4, 7, 41}) {
          std::vector<int32_t> which(41), some(41), same(41);
          for (int32_t& operand : which) operand = static_cast<int32_t>(generator()() % kTileOperands);
          for (int64_t coarse = 0; coarse < words && coarse <= 64; coarse += 4) {
            const int64_t shift = coarse == 0 ? 0 : static_cast<int64_t>(generator()() % 3) * 2;
            level.dots(row.data(), others.data(), 4 * words, which.data(), operands, words, coarse, shift, some.data());
            scalar.dots(row.data(), others.data(), 4 * words, which.data(), operands, words, coarse, shift, same.data());
            CHECK(some == same);
          }
        }
      }
    }
  }
}

// Rows and operands of one scan in stages, as the search prepares them.
template <class T>
struct Staged {
  int64_t count, tiles, length, stages;
  std::vector<uint8_t> rows, operands;  // [count, length] and [tiles * 64, length], code + most + 1
  std::vector<int8_t> tiled;
  std::vector<T> row_starts, starts;

  Staged(int64_t count_, int64_t tiles_, int64_t length_, int most) : count(count_), tiles(tiles_), length(length_), stages(num_stages(length_)) {
    constexpr int64_t kGroup = sizeof(T);
    rows = codes<uint8_t>(count * length, 1, 2 * most + 1);
    operands = codes<uint8_t>(tiles * kTileOperands * length, 1, 2 * most + 1);
    for (int64_t k = 0; k < length; ++k) operands[static_cast<size_t>(k)] = rows[static_cast<size_t>(k)];  // a pair at distance 0
    tiled.resize(operands.size());
    row_starts.resize(static_cast<size_t>(stages * kTileOperands));
    starts.resize(static_cast<size_t>(tiles * stages * kTileOperands));
    for (int64_t r = 0; r < count; ++r) stage_starts(rows.data() + r * length, length, most + 1, 0, row_starts.data() + r);
    for (int64_t i = 0; i < tiles * kTileOperands; ++i) {
      const int64_t tile = i / kTileOperands, o = i % kTileOperands;
      stage_starts(operands.data() + i * length, length, most + 1, most + 1, starts.data() + tile * stages * kTileOperands + o);
      for (int64_t k = 0; k < length; ++k) {
        const int64_t at = tile * length * kTileOperands + (k / kGroup * kTileOperands + o) * kGroup + k % kGroup;
        tiled[static_cast<size_t>(at)] = static_cast<int8_t>(operands[static_cast<size_t>(i * length + k)] - (most + 1));
      }
    }
  }

  int64_t squared_distance(int64_t r, int64_t i) const {
    int64_t sum = 0;
    for (int64_t k = 0; k < length; ++k) {
      const int64_t apart = rows[static_cast<size_t>(r * length + k)] - operands[static_cast<size_t>(i * length + k)];
      sum += apart * apart;
    }
    return sum;
  }
};

// A pair below its limit is always left. Another one is left only where halves were rounded, or if its sum of 16 bits, 2^15 below zero or more, wraps
// around.
template <class T>
void check_scan_in_stages(const Level& level) {
  constexpr bool kWraps = sizeof(T) == 2;
  int64_t left = 0, skipped = 0;
  for (const int64_t length : {4, 8, 16, 20, 32, 36, 64, 96, 128, 516}) {
    for (const int64_t count : {1, 2, 3, 4, 5, 7, 9, 11, 28, 64}) {
      const Staged<T> scan(count, 3, length, level.scanned_code);
      std::vector<int64_t> limits(static_cast<size_t>(count));
      std::vector<int32_t> floors(static_cast<size_t>(count));
      for (size_t r = 0; r < limits.size(); ++r) {
        // Around some pair's own distance, where one more or less decides; or too far for 16 bits, or 0: the row itself is wanted.
        const int64_t near = scan.squared_distance(static_cast<int64_t>(r), static_cast<int64_t>(generator()() % 192));
        const uint64_t kind = generator()() % 8;
        const int64_t around = kWraps ? std::min<int64_t>(near, 60000) : near;
        limits[r] = kind == 0 ? 1 : kind == 1 ? kNeverSkip : kind == 2 ? 65534 : around + static_cast<int64_t>(kind) - 4;
        limits[r] = std::max<int64_t>(limits[r], 1);
        floors[r] = int8_floor(0, static_cast<int32_t>(limits[r]));
      }
      constexpr int64_t kStride = 5;
      std::vector<uint64_t> found(static_cast<size_t>(count * kStride), 7);
      level.scan_stages(scan.rows.data(), length, count, scan.row_starts.data(), scan.tiled.data(), scan.starts.data(), 3, length / 4, floors.data(),
                        found.data(), kStride);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < 3 * kTileOperands; ++i) {
          const bool survives = (found[static_cast<size_t>(r * kStride + i / kTileOperands)] >> i % kTileOperands & 1) != 0;
          const int64_t squared = scan.squared_distance(r, i), limit = limits[static_cast<size_t>(r)];
          if (squared < limit) CHECK(survives);
          if (kWraps && limit > 65534) CHECK(survives);  // left whole
          if (squared > limit + 1 && (!kWraps || squared < limit + 65534)) CHECK(!survives);
          (survives ? left : skipped) += 1;
        }
        CHECK_EQ(found[static_cast<size_t>(r * kStride + 3)], uint64_t{7});
      }
    }
  }
  CHECK(left > 1000 && skipped > 1000);
}

TEST(scans_in_stages_leave_what_the_filter_asks_for) {
  for (const Level& level : levels()) {
    if (level.fewest_staged_rows == kNeverStaged) continue;
    level.stage_bytes == 2 ? check_scan_in_stages<int16_t>(level) : check_scan_in_stages<int32_t>(level);
  }
}

TEST(floors_equal_the_bounds_of_the_filter) {
  std::vector<double> reach = {-INFINITY, -1.0, 0.0, 1e-300, 0.5, 3.25, 1000.0, 46340.0, 46341.0, 1e30, INFINITY, std::nan("")};
  for (int i = 0; i < 500; ++i) reach.push_back(std::exp(static_cast<double>(generator()() % 20000) / 1000 - 8));
  reach.resize(reach.size() / 8 * 8);
  for (const Level& level : levels()) {
    for (const double residual : {0.0, 0.7, 5.5, 90.0}) {
      std::vector<int32_t> norms(reach.size()), found(reach.size());
      for (int32_t& norm : norms) norm = static_cast<int32_t>(generator()() % (127 * 127 * 32768ll));
      level.int8_floors(reach.data(), norms.data(), static_cast<int64_t>(reach.size()), residual, found.data());
      for (size_t i = 0; i < reach.size(); ++i) CHECK_EQ(found[i], int8_floor(norms[i], int8_skip_limit(reach[i], residual)));
    }
  }
}

TEST(first_largest_is_the_first) {
  for (const Level& level : levels()) {
    for (const size_t count : {8u, 16u, 64u, 2048u}) {
      std::vector<double> values(count);
      for (int round = 0; round < 50; ++round) {
        for (double& value : values) value = static_cast<double>(generator()() % (round % 2 == 0 ? 5 : 1000000)) - 1;
        if (round == 7) std::fill(values.begin(), values.end(), -1.0);
        if (round == 8) values[count - 1] = INFINITY;
        const int64_t expected = std::max_element(values.begin(), values.end()) - values.begin();
        CHECK_EQ(level.first_largest(values.data(), static_cast<int64_t>(count)), expected);
      }
    }
  }
}

TEST(quantisation_gives_the_codes_of_the_filter) {
  std::normal_distribution<double> normal;
  for (const Level& level : levels()) {
    for (const int64_t count : {1, 3, 4, 7, 8, 9, 48, 129}) {
      for (const double scale : {1.0, 40.0, 1e5}) {
        const int32_t most = generator()() % 2 == 0 ? kMaxCode : 63;
        std::vector<double> coordinates(static_cast<size_t>(count));
        for (double& value : coordinates) value = normal(generator());
        coordinates[0] = 2.5 / scale;  // a half: to even
        std::vector<uint8_t> found(static_cast<size_t>(count) + 1, 7);
        double errors, expected_errors = 0;
        int32_t expected_norm = 0;
        const int32_t norm = level.quantize(coordinates.data(), count, scale, most, found.data(), &errors);
        for (int64_t k = 0; k < count; ++k) {
          const Int8Code code = int8_code(multiply(scale, coordinates[static_cast<size_t>(k)]), most);
          CHECK_EQ(static_cast<int>(found[static_cast<size_t>(k)]), most + 1 + code.code);
          expected_norm += code.code * code.code;
          expected_errors += code.error * code.error;
        }
        CHECK_EQ(static_cast<int>(found.back()), 7);
        CHECK_EQ(norm, expected_norm);
        CHECK(std::abs(errors - expected_errors) <= 1e-12 * expected_errors);
      }
    }
  }
}

TEST(matrix_products_have_the_same_bits) {
  std::normal_distribution<double> normal;
  for (const Level& level : levels()) {
    for (const int64_t outputs : {8, 40, 48, 56, 104}) {
      std::vector<double> x(37), matrix(static_cast<size_t>(37 * outputs)), found(static_cast<size_t>(outputs)),
          expected(static_cast<size_t>(outputs));
      for (double& value : x) value = normal(generator());
      for (double& value : matrix) value = normal(generator());
      level.multiply_matrix(x.data(), matrix.data(), 37, outputs, found.data());
      find_level("scalar")->multiply_matrix(x.data(), matrix.data(), 37, outputs, expected.data());
      CHECK(found == expected);
    }
  }
}

TEST(int16_products_equal_the_scalar_level) {
  for (const Level& level : levels()) {
    for (const int64_t pairs : {1, 2, 5, 64, 65, 192}) {
      for (const int64_t count : {1, 2, 3, 4, 5, 28}) {
        std::vector<int16_t> rows(static_cast<size_t>(count * 2 * pairs)), tile(static_cast<size_t>(2 * pairs * kTileOperands));
        for (int16_t& value : rows) value = static_cast<int16_t>(generator()() % 32767) - 16383;
        for (int16_t& value : tile) value = static_cast<int16_t>(generator()() % 32769) - 16384;
        const int64_t stride = kTileOperands + 16;  // what lies between the rows of the result stays as it is
        std::vector<int32_t> found(static_cast<size_t>(count * stride), 5), expected = found;
        for (const int64_t outputs : {int64_t{32}, kTileOperands}) {
          level.multiply_int16(rows.data(), 2 * pairs, count, tile.data(), pairs, outputs, found.data(), stride);
          find_level("scalar")->multiply_int16(rows.data(), 2 * pairs, count, tile.data(), pairs, outputs, expected.data(), stride);
          CHECK(found == expected);
        }
      }
    }
  }
}

TEST(codes_of_steps_are_those_of_the_filter) {
  for (const Level& level : levels()) {
    for (const int64_t count : {1, 7, 15, 16, 17, 31, 32, 33, 384, 385}) {
      for (int64_t bits = 0; bits <= kMostStepBits; ++bits) {
        std::vector<int16_t> steps(static_cast<size_t>(count));
        for (int16_t& step : steps) step = static_cast<int16_t>(static_cast<int>(generator()() % 32767) - 16383);
        steps[0] = generator()() % 2 == 0 ? 16383 : -16383;
        std::vector<uint8_t> found(static_cast<size_t>(count) + 1, 7);
        int32_t errors, expected_errors = 0, expected_norm = 0;
        const int32_t norm = level.coarsen_steps(steps.data(), count, bits, found.data(), &errors);
        for (int64_t j = 0; j < count; ++j) {
          const int step = steps[static_cast<size_t>(j)], most = 127 * (1 << bits), clipped = std::max(-most, std::min(most, step));
          const StepCode code = step_code(step, static_cast<int>(bits));
          CHECK(std::abs(clipped - code.code * (1 << bits)) <= (1 << bits) / 2);
          CHECK_EQ(clipped - code.code * (1 << bits), code.error);
          CHECK_EQ(static_cast<int>(found[static_cast<size_t>(j)]), 128 + code.code);
          expected_norm += code.code * code.code;
          expected_errors += code.error * code.error;
        }
        CHECK_EQ(static_cast<int>(found.back()), 7);
        CHECK_EQ(norm, expected_norm);
        CHECK_EQ(errors, expected_errors);
      }
    }
  }
}

TEST(what_is_not_finite_is_found_anywhere) {
  for (const Level& level : levels()) {
    for (const int64_t count : {1, 5, 15, 16, 17, 33, 64}) {
      std::vector<float> values(static_cast<size_t>(count));
      for (float& value : values) value = generator()() % 2 == 0 ? std::numeric_limits<float>::max() : -1e-40f;
      CHECK(level.all_finite(values.data(), count));
      for (const float bad : {std::nanf(""), -std::nanf(""), INFINITY, -INFINITY}) {
        for (size_t at = 0; at < values.size(); ++at) {
          const float kept = values[at];
          values[at] = bad;
          CHECK(!level.all_finite(values.data(), count));
          values[at] = kept;
        }
      }
    }
  }
}

TEST(steps_are_those_of_the_filter) {
  std::normal_distribution<double> normal;
  for (const Level& level : levels()) {
    for (const int64_t count : {1, 3, 4, 7, 8, 9, 48, 129}) {
      std::vector<float> x(static_cast<size_t>(count));
      std::vector<double> center(static_cast<size_t>(count));
      for (float& value : x) value = static_cast<float>(normal(generator()));
      for (double& value : center) value = 0.1 * normal(generator());
      std::vector<int16_t> found(static_cast<size_t>(count) + 1, 7);
      double errors, expected_errors = 0, expected_norm = 0;
      const double norm = level.round_to_steps(x.data(), center.data(), count, 9000.0, 6689, found.data(), &errors);
      for (int64_t j = 0; j < count; ++j) {
        const RoundedCode step = rounded_code(scaled_coordinate(x[static_cast<size_t>(j)], center[static_cast<size_t>(j)], 9000.0), 6689);
        CHECK_EQ(found[static_cast<size_t>(j)], static_cast<int16_t>(step.code));
        expected_norm += step.code * step.code;
        expected_errors += step.error * step.error;
      }
      CHECK_EQ(found.back(), 7);
      CHECK_EQ(norm, expected_norm);
      CHECK(std::abs(errors - expected_errors) <= 1e-12 * expected_errors);
      x[0] = std::nanf("");
      level.round_to_steps(x.data(), center.data(), count, 9000.0, 6689, found.data(), &errors);
      CHECK(std::isnan(errors));
    }
  }
}

TEST(marked_places_are_taken_in_order) {
  for (const Level& level : levels()) {
    for (int round = 0; round < 40; ++round) {
      std::vector<uint64_t> words(9);
      for (uint64_t& word : words) {
        word = generator()();
        for (int i = 0; i < round % 5; ++i) word &= generator()();
        if (round == 3) word = ~uint64_t{0};
      }
      std::vector<int32_t> expected, found(64 * 9 + 4);
      for (int32_t b = 0; b < 64 * 9; ++b) {
        if (words[static_cast<size_t>(b / 64)] >> (b % 64) & 1) expected.push_back(1000 + b);
      }
      const int64_t taken = level.take_marked(words.data(), 9, 1000, found.data());
      found.resize(static_cast<size_t>(taken));
      CHECK(found == expected);
    }
  }
}

TEST(float_differences_are_close) {
  std::normal_distribution<float> normal;
  for (const Level& level : levels()) {
    for (const int64_t dim : {1, 7, 16, 17, 63, 64, 65, 200, 384}) {
      std::vector<float> a(static_cast<size_t>(dim)), b(static_cast<size_t>(dim));
      double expected = 0;
      for (size_t j = 0; j < a.size(); ++j) {
        a[j] = normal(generator());
        b[j] = normal(generator());
        expected += (static_cast<double>(a[j]) - b[j]) * (static_cast<double>(a[j]) - b[j]);
      }
      CHECK(std::abs(level.squared_difference(a.data(), b.data(), dim) - expected) <= static_cast<double>(dim + 3) * 0x1p-24 * expected);
    }
  }
}

TEST_MAIN()
