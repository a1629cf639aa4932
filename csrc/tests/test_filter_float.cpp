// Property tests of the certified filters (filter.h), like test_filter.cpp: the float test, differences, and the residual coordinate of a
// contraction.
#include "filter.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <vector>

#include "check.h"
#include "distance.h"
#include "filter_cases.h"

namespace {

using namespace patchcore;
using namespace filter_cases;

// ---- 6. The float test ----

enum Unit { kChain, kLanes8, kUnfusedFlushing, kTensor4, kTensor8, kTensor16 };

// Truncating tensor core: the accumulator and `block` exact products are cut at 2^-23 of the largest one's exponent, added, and cut to 24 bits.
float tensor_block(float acc, const float* a, const float* b, int64_t block) {
  double largest = std::fabs(static_cast<double>(acc)), total = 0;
  for (int64_t j = 0; j < block; ++j) largest = std::max(largest, std::fabs(static_cast<double>(a[j]) * b[j]));
  if (largest == 0) return 0;
  const double ulp = std::ldexp(1.0, std::ilogb(largest) - 23);
  total += std::trunc(acc / ulp);
  for (int64_t j = 0; j < block; ++j) total += std::trunc(static_cast<double>(a[j]) * b[j] / ulp);
  total *= ulp;
  if (total == 0) return 0;
  const double cut = std::ldexp(1.0, std::ilogb(total) - 23);
  return static_cast<float>(std::trunc(total / cut) * cut);
}

float accumulate(Unit unit, float start, const float* a, const float* b, int64_t depth) {
  float acc = start;
  if (unit == kChain)
    for (int64_t j = 0; j < depth; ++j) acc = std::fma(a[j], b[j], acc);
  if (unit == kUnfusedFlushing)
    for (int64_t j = 0; j < depth; ++j) acc = flush_subnormal(acc + flush_subnormal(a[j] * b[j]));
  if (unit == kLanes8) {
    float lane[8] = {};
    for (int64_t j = 0; j < depth; ++j) lane[j % 8] = std::fma(a[j], b[j], lane[j % 8]);
    for (const float l : lane) acc += l;
  }
  const int64_t block = unit == kTensor4 ? 4 : unit == kTensor8 ? 8 : 16;
  if (unit >= kTensor4)
    for (int64_t j = 0; j < depth; j += block) acc = tensor_block(acc, a + j, b + j, block);
  return acc;
}

float round_to_bits(double value, int bits) {
  if (value == 0 || !std::isfinite(value)) return static_cast<float>(value);
  const double unit = std::ldexp(1.0, std::ilogb(value) - bits + 1);
  return flush_subnormal(static_cast<float>(std::nearbyint(value / unit) * unit));
}

struct FloatPacked {
  int64_t count, dim, depth;
  std::vector<float> rows, operands, residuals;
  std::vector<double> squared_norms;
  double scale;

  // bits: 24 fp32, 11 fp16 and tf32, 8 bf16. Centred at `center`, scaled by a power of two that brings the median norm near 1.
  FloatPacked(std::vector<float> data, int64_t n, int64_t d, int bits, double center, double fixed_scale = 0)
      : count(n), dim(d), depth((d + 15) / 16 * 16), rows(std::move(data)), operands(static_cast<size_t>(n * depth), 0.0f) {
    std::vector<double> norms;
    for (int64_t i = 0; i < n; ++i) {
      double squares = 0;
      for (int64_t j = 0; j < d; ++j) squares += (row(i)[j] - center) * (row(i)[j] - center);
      norms.push_back(std::sqrt(squares));
    }
    std::nth_element(norms.begin(), norms.begin() + n / 2, norms.end());
    const double median = norms[static_cast<size_t>(n / 2)];
    scale = fixed_scale > 0 ? fixed_scale : median > 0 ? std::ldexp(1.0, -std::ilogb(median)) : 1.0;
    for (int64_t i = 0; i < n; ++i) {
      double squares = 0, error_squares = 0;
      for (int64_t j = 0; j < d; ++j) {
        const double scaled = scaled_coordinate(static_cast<double>(row(i)[j]), center, scale);
        const float a = round_to_bits(scaled, bits);
        operands[static_cast<size_t>(i * depth + j)] = a;
        squares += static_cast<double>(a) * a;
        error_squares += (scaled - a) * (scaled - a);
      }
      squared_norms.push_back(squares);
      residuals.push_back(residual_bound(error_squares, squares, d));
    }
  }
  const float* row(int64_t i) const { return &rows[static_cast<size_t>(i * dim)]; }
  const float* operand(int64_t i) const { return &operands[static_cast<size_t>(i * depth)]; }
};

bool float_pair_survives(const FloatPacked& p, int64_t i, int64_t k, Unit unit, double to_beat, double kappa, bool residual = true) {
  const size_t x = static_cast<size_t>(i), y = static_cast<size_t>(k);
  const double rx = residual ? static_cast<double>(p.residuals[x]) : 0, ry = residual ? static_cast<double>(p.residuals[y]) : 0;
  const double reach = search_reach(to_beat, 0, rx, p.scale, canonical_slack(p.dim));
  const float limit = float_skip_limit(reach, ry, p.squared_norms[x], p.squared_norms[y], p.depth, kappa);
  const float a = accumulate(unit, float_start(p.squared_norms[y]), p.operand(i), p.operand(k), p.depth);
  return !(a <= limit);
}

double kappa_of(Unit unit, int64_t depth) { return accumulation_error(depth, unit >= kTensor4 ? Accumulation::kTruncating : Accumulation::kNearest); }

struct Counts {
  int64_t unsound = 0, above = 0, skipped = 0;
};

Counts float_counts(const FloatPacked& p, int64_t pairs, Unit unit, double kappa, bool residual = true) {
  Random random(12);
  Counts counts;
  for (int64_t n = 0; n < pairs; ++n) {
    const int64_t i = random.below(p.count), k = random.below(p.count);
    const double c = squared_distance(p.row(i), p.row(k), p.dim);
    counts.unsound += !float_pair_survives(p, i, k, unit, c, kappa, residual);
    counts.above += c > 0;
    counts.skipped += c > 0 && !float_pair_survives(p, i, k, unit, c * 0.9, kappa, residual);
  }
  return counts;
}

TEST(float_never_skips_an_improvement_or_a_tie) {
  int64_t tested = 0;
  for (const int64_t dim : kDims)
    for (int kind = 0; kind < kKinds; ++kind)
      for (const int bits : {24, 11, 8}) {
        const FloatPacked p(make_rows(kind, 100, dim, 13), 100, dim, bits, kind == kOffset ? 1e4 : 0);
        for (const Unit unit : {kChain, kLanes8, kUnfusedFlushing, kTensor4, kTensor8, kTensor16}) {
          if (bits == 24 && unit >= kTensor4) continue;  // products of fp32 operands are not exact in a tensor core
          const int64_t pairs = pairs_for(dim) / 60;
          const Counts counts = float_counts(p, pairs, unit, kappa_of(unit, p.depth));
          if (counts.unsound) std::cerr << "  " << kNames[kind] << ", dim " << dim << ", bits " << bits << ", unit " << unit << "\n";
          CHECK_EQ(counts.unsound, 0);
          // Most are skipped; a cluster's own rows are too near for these formats.
          CHECK(kind == kEqual ? counts.above == 0 : counts.skipped * 100 > counts.above * (kind == kClusters ? 75 : 90));
          tested += 2 * pairs;
        }
      }
  std::cout << "     " << tested << " float pairs\n";
}

TEST(float_without_kappa_or_residual_is_caught) {
  const FloatPacked exact_operands(make_rows(kOffset, 200, 384, 14), 200, 384, 24, 0);  // far from the centre: accumulation errors dominate
  for (const Unit unit : {kChain, kLanes8, kUnfusedFlushing}) {
    CHECK(float_counts(exact_operands, 2000, unit, 0).unsound > 100);
    CHECK_EQ(float_counts(exact_operands, 2000, unit, kappa_of(unit, 384)).unsound, 0);
  }
  const FloatPacked rounded(make_rows(kNormal, 200, 128, 15), 200, 128, 8, 0);
  CHECK(float_counts(rounded, 2000, kChain, kappa_of(kChain, 128), false).unsound > 100);
  CHECK(float_counts(rounded, 2000, kTensor8, kappa_of(kTensor8, 128), false).unsound > 20);
}

// One large product, then products just below the cut: each is lost whole, twice what rounding to nearest could lose.
TEST(nearest_kappa_on_a_truncating_unit_is_caught) {
  const int64_t dim = 1024;
  std::vector<float> rows(2 * dim);
  for (int64_t j = 0; j < dim; ++j) rows[static_cast<size_t>(j)] = j == 0 ? 8.0f : 1.40625f * 0x1p-10f;
  for (int64_t j = 0; j < dim; ++j) rows[static_cast<size_t>(dim + j)] = j == 0 ? 0.1279296875f : 1.40625f * 0x1p-14f;
  const FloatPacked p(rows, 2, dim, 8, 0, 1.0);
  CHECK(p.residuals[0] < 1e-10f && p.residuals[1] < 1e-10f);
  const double c = squared_distance(p.row(0), p.row(1), dim);
  for (const Unit unit : {kTensor4, kTensor8, kTensor16}) {
    CHECK(!float_pair_survives(p, 0, 1, unit, c, accumulation_error(dim, Accumulation::kNearest)));
    CHECK(float_pair_survives(p, 0, 1, unit, c, accumulation_error(dim, Accumulation::kTruncating)));
  }
}

// The limit against the formula in its proof, in exact arithmetic; n_y = 4^k n_x makes the root exact.
TEST(float_skip_limit_is_just_below_the_exact_bound) {
  Random random(23);
  for (int n = 0; n < 100000; ++n) {
    const int64_t depth = 1 + random.below(2000);
    const double root = std::ldexp(1.0, static_cast<int>(random.below(7)) - 3), nx = random.uniform() * 4, ny = nx * root * root;
    const double reach = random.uniform() * 3, ry = random.uniform(), kappa = n % 2 ? 0.0 : accumulation_error(depth, Accumulation::kNearest);
    const Exact radius = two_sum(reach, ry), squares = product(radius, radius), products = two_sum(nx * root, ny / 2),
                error = product({kappa, 0}, products);
    const Exact exact = sum(product({0.5, 0}, sum({nx, 0}, {-squares.hi, -squares.lo})), {-error.hi, -error.lo});
    const float limit = float_skip_limit(reach, ry, nx, ny, depth, kappa);
    CHECK(less({static_cast<double>(limit), 0}, exact));
    CHECK(static_cast<double>(limit) > exact.hi - 1e-6 * (nx + squares.hi));
  }
}

TEST(float_limits_of_special_values) {
  const double kappa = accumulation_error(16, Accumulation::kNearest);
  const auto survives = [](float a, float limit) { return !(a <= limit); };
  CHECK(!survives(FLT_MAX, float_skip_limit(update_reach(0, 0, 1, 1, 0), 1, 4, 4, 16, kappa)));   // wants nothing
  CHECK(!survives(FLT_MAX, float_skip_limit(search_reach(-1, 0, 1, 1, 0), 1, 4, 4, 16, kappa)));  // picked
  const double nan = NAN;
  for (const double bad : {kInf, nan}) {
    CHECK(survives(-FLT_MAX, float_skip_limit(search_reach(bad, 0, 1, 1, 0), 1, 4, 4, 16, kappa)));
    CHECK(survives(-FLT_MAX, float_skip_limit(search_reach(1, 0, bad, 1, 0), 1, 4, 4, 16, kappa)));
    CHECK(survives(-FLT_MAX, float_skip_limit(search_reach(1, 0, 1, 1, 0), bad, 4, 4, 16, kappa)));
    CHECK(survives(-INFINITY, float_skip_limit(search_reach(1, 0, 1, 1, 0), 1, bad, 4, 16, kappa)));
    CHECK(survives(-INFINITY, float_skip_limit(search_reach(1, 0, 1, 1, 0), 1, 4, bad, 16, kappa)));
    CHECK(survives(-FLT_MAX, float_skip_limit(search_reach(1, 0, 1, 1, 0), 1, 4, 4, 16, bad)));
  }
  CHECK(survives(NAN, float_skip_limit(search_reach(1, 0, 1, 1, 0), 1, 4, 4, 16, kappa)));
  CHECK(std::isinf(accumulation_error(1 << 24, Accumulation::kNearest)));
  CHECK(flush_subnormal(0x1p-127f) == 0 && flush_subnormal(-0x1p-149f) == 0 && flush_subnormal(-0x1p-126f) == -0x1p-126f);
  // Unscaled rows of 1e-30: every product underflows. Nothing unsound, nothing gained.
  const FloatPacked tiny(make_rows(kTiny, 100, 16, 24), 100, 16, 24, 0, 1.0);
  for (const Unit unit : {kChain, kLanes8, kUnfusedFlushing, kTensor4}) CHECK_EQ(float_counts(tiny, 2000, unit, kappa).unsound, 0);
  // Unscaled, the sum overflows to -infinity although the true product is 0 and the pair is nearer than the value to beat: it must survive.
  std::vector<float> pair(32, 0.0f);
  pair[0] = pair[1] = pair[17] = 2e19f;
  pair[16] = -2e19f;
  const FloatPacked huge(pair, 2, 16, 24, 0, 1.0);
  CHECK(accumulate(kChain, float_start(huge.squared_norms[1]), huge.operand(0), huge.operand(1), 16) == -INFINITY);
  CHECK(squared_distance(huge.row(0), huge.row(1), 16) < 1e40);
  CHECK(float_pair_survives(huge, 0, 1, kChain, 1e40, kappa));
  const FloatPacked scaled(pair, 2, 16, 24, 0);
  CHECK(float_pair_survives(scaled, 0, 1, kChain, 1e40, kappa) && !float_pair_survives(scaled, 0, 1, kChain, 1e39, kappa));
}

// The float32 sum of squared differences, in three orders.
float float_difference(const float* x, const float* y, int64_t dim, int order) {
  float lane[16] = {};
  const int64_t lanes = order == 0 ? 1 : 16;
  for (int64_t j = 0; j < dim; ++j) {
    const float difference = x[j] - y[j];
    float& sum = lane[j % lanes];
    sum = order == 2 ? std::fma(difference, difference, sum) : sum + difference * difference;
  }
  for (int64_t l = 1; l < lanes; ++l) lane[0] += lane[l];
  return lane[0];
}

TEST(difference_never_skips_an_improvement_or_a_tie) {
  int64_t unguarded = 0, without_error = 0;
  for (const int64_t dim : kDims)
    for (int kind = 0; kind < kKinds; ++kind) {
      const std::vector<float> rows = make_rows(kind, 100, dim, 21);
      const double slack = canonical_slack(dim);
      Random random(22);
      int64_t above = 0, skipped = 0;
      for (int64_t n = 0; n < pairs_for(dim) / 20; ++n) {
        const float *x = &rows[static_cast<size_t>(random.below(100) * dim)], *y = &rows[static_cast<size_t>(random.below(100) * dim)];
        const double c = squared_distance(x, y, dim);
        const float limit = difference_skip_limit(c, dim, slack), below = difference_skip_limit(c * 0.999, dim, slack);
        for (int order = 0; order < 3; ++order) {
          const float h = float_difference(x, y, dim, order);
          CHECK(!(h > limit));
          above += c > 0;
          skipped += h > below;
          unguarded += static_cast<double>(h) > c * 1.01;
          without_error += h > round_up_to_float(c * (1 + 2 * slack));
        }
      }
      const bool in_range = kind != kTiny && kind != kHuge && kind != kSubnormal && kind != kMixed;
      CHECK(!in_range || skipped > above * 9 / 10 || above == 0);
    }
  CHECK(unguarded > 1000);  // an overflowed sum against U2 itself
  CHECK(without_error > 1000);
  CHECK(difference_skip_limit(-1, 8, 0) == -INFINITY && difference_skip_limit(kInf, 8, 0) == INFINITY);
  CHECK(std::isnan(difference_skip_limit(NAN, 8, 0)));
  CHECK(difference_skip_limit(0, 8, 0) > 0 && difference_skip_limit(1, 1 << 24, 0) == INFINITY);
}

// ---- 7. The residual coordinate ----

// As written in the design notes: sound only while 2 |z| delta + delta^2 <= g^2.
double naive_residual_coordinate_error(double g, double z, double delta) {
  return g - std::sqrt(std::max(0.0, g * g - 2 * z * delta - delta * delta));
}

TEST(residual_coordinate_error_bounds_the_error) {
  Random random(17);
  int64_t naive_wrong = 0;
  double tightest = kInf;
  for (int n = 0; n < 300000; ++n) {
    // A row of norm 1 (times a magnitude) with coordinates (z, g) and a computed projection z (1 + e): every size of g against z and of delta.
    const double size = random.magnitude(-40, 35), z = size, exact_g = n % 10 == 0 ? 0 : size * random.magnitude(-9, 2);
    const double relative = (random.uniform() < 0.5 ? -1 : 1) * random.magnitude(-14, -1), computed_z = z * (1 + relative);
    const double delta = std::fabs(computed_z - z) * (1 + 1e-9) + 1e-300;
    const double g = residual_coordinate(z * z + exact_g * exact_g, computed_z * computed_z);
    const double bound = residual_coordinate_error(g, computed_z, delta, 64), error = std::fabs(g - exact_g);
    CHECK(error <= bound);
    CHECK(bound <= 1e-6 * size + std::sqrt(3 * computed_z * delta));
    naive_wrong += error > naive_residual_coordinate_error(g, computed_z, delta) * (1 + 1e-6) + 1e-6 * size;
    if (error > 1e-6 * size) tightest = std::min(tightest, bound / error);
  }
  CHECK(tightest < 1.01);
  CHECK(naive_wrong > 1000);
  CHECK(residual_coordinate(1.0, 1.5) == 0);
  CHECK(residual_coordinate_error(0, 0, 0, 8) < 1e-100);
}

// Orthonormal rows [prefix, dim], by Gram-Schmidt, shrunk a little: a contraction.
std::vector<double> make_contraction(int64_t prefix, int64_t dim, Random& random) {
  std::vector<double> p(static_cast<size_t>(prefix * dim));
  for (int64_t i = 0; i < prefix; ++i) {
    double* row = &p[static_cast<size_t>(i * dim)];
    for (int64_t j = 0; j < dim; ++j) row[j] = random.normal();
    for (int64_t pass = 0; pass < 2 * i; ++pass) {
      const double* other = &p[static_cast<size_t>(pass % i * dim)];
      double dot = 0, squares = 0;
      for (int64_t j = 0; j < dim; ++j) dot += row[j] * other[j], squares += other[j] * other[j];
      for (int64_t j = 0; j < dim; ++j) row[j] -= dot / squares * other[j];
    }
    double squares = 0;
    for (int64_t j = 0; j < dim; ++j) squares += row[j] * row[j];
    for (int64_t j = 0; j < dim; ++j) row[j] *= (1 - 1e-12) / std::sqrt(squares);
  }
  return p;
}

// The whole road: project with an error of known size, append the residual coordinate, quantise, test. `stretch` enlarges every projection by that
// factor (a projection error that pushes rows apart); `in_span` puts the rows inside the span of P, where the exact residual coordinate is 0.
int64_t projected_unsound(double stretch, bool in_span, bool with_error, int64_t* skipped) {
  const int64_t dim = 96, prefix = 16, count = 128, depth = prefix + 1;
  Random random(18);
  const std::vector<double> p = make_contraction(prefix, dim, random);
  std::vector<float> rows = make_rows(kNormal, count, dim, 19);
  std::vector<double> coordinates(static_cast<size_t>(count * depth)), errors;
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    float* x = &rows[static_cast<size_t>(i * dim)];
    if (in_span)
      for (int64_t j = 0; j < dim; ++j) {
        double value = 0;
        for (int64_t k = 0; k < prefix; ++k) value += p[static_cast<size_t>(k * dim + j)] * std::sin(static_cast<double>(i * 17 + k * 5));
        x[j] = static_cast<float>(value);
      }
    double* z = &coordinates[static_cast<size_t>(i * depth)];
    double norm = 0, projected = 0;
    for (int64_t j = 0; j < dim; ++j) norm += static_cast<double>(x[j]) * x[j];
    for (int64_t k = 0; k < prefix; ++k) {
      double value = 0;
      for (int64_t j = 0; j < dim; ++j) value += p[static_cast<size_t>(k * dim + j)] * x[j];
      z[k] = value * stretch;
      projected += z[k] * z[k];
    }
    z[prefix] = residual_coordinate(norm, projected);
    const double z_norm = std::sqrt(projected) * (1 + 1e-12), delta = std::fabs(1 - 1 / stretch) * z_norm + 1e-12 * std::sqrt(norm);
    errors.push_back(delta + residual_coordinate_error(z[prefix], z_norm, delta, dim));
    for (int64_t k = 0; k < depth; ++k) largest = std::max(largest, std::fabs(z[k]));
  }
  const double scale = int8_scale(largest), zero[17] = {};
  std::vector<int8_t> codes(coordinates.size());
  std::vector<Int8Row> info;
  for (int64_t i = 0; i < count; ++i)
    info.push_back(quantize_row(&coordinates[static_cast<size_t>(i * depth)], zero, scale, depth, &codes[static_cast<size_t>(i * depth)]));
  int64_t unsound = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < count; ++k) {
      const double c = squared_distance(&rows[static_cast<size_t>(i * dim)], &rows[static_cast<size_t>(k * dim)], dim);
      const Int8Row &x = info[static_cast<size_t>(i)], &y = info[static_cast<size_t>(k)];
      int32_t t = 0;
      for (int64_t j = 0; j < depth; ++j) t += codes[static_cast<size_t>(i * depth + j)] * codes[static_cast<size_t>(k * depth + j)];
      const double error = with_error ? errors[static_cast<size_t>(i)] + errors[static_cast<size_t>(k)] : 0;
      const auto skips = [&](double to_beat) {
        const double reach = search_reach(to_beat, error, static_cast<double>(x.residual), scale, canonical_slack(dim));
        return !int8_survives(x.squared_norm, y.squared_norm, t, int8_skip_limit(reach, static_cast<double>(y.residual)));
      };
      unsound += skips(c);
      *skipped += skips(c / 16);
    }
  return unsound;
}

TEST(contraction_with_residual_coordinate_is_sound) {
  for (const bool in_span : {false, true})
    for (const double stretch : {1.0, 0.98, 1.02, 0.9, 1.1, 1.3}) {
      int64_t skipped = 0;
      CHECK_EQ(projected_unsound(stretch, in_span, true, &skipped), 0);
      if (stretch == 1.0) CHECK(skipped > 128 * 127 / 2);
    }
}

TEST(contraction_without_its_error_is_caught) {
  int64_t skipped = 0;
  CHECK(projected_unsound(1.3, true, false, &skipped) > 1000);
}

}  // namespace

TEST_MAIN()
