// Property tests of the certified filters (filter.h, sections 1 to 5; the others: test_filter_float.cpp): no pair that a filter skips may improve on,
// or tie with, the value to beat, on data made to break it; the filters must skip most of what can be skipped; and a filter with one of its terms
// taken out must be caught (so that these tests have teeth).
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

// Rows with their int8 operands. The centre is the median, the scale comes from a percentile low enough that the outliers are clipped.
struct Packed {
  int64_t count, dim;
  std::vector<float> rows;
  std::vector<double> center;
  double scale = 1;
  std::vector<int8_t> codes;
  std::vector<Int8Row> info;

  Packed(std::vector<float> data, int64_t n, int64_t d) : count(n), dim(d), rows(std::move(data)), center(static_cast<size_t>(d)) {
    std::vector<double> largest(static_cast<size_t>(n), 0.0);
    for (int64_t j = 0; j < d; ++j) {
      std::vector<float> column;
      for (int64_t i = 0; i < n; ++i) column.push_back(row(i)[j]);
      std::nth_element(column.begin(), column.begin() + n / 2, column.end());
      center[static_cast<size_t>(j)] = static_cast<double>(column[static_cast<size_t>(n / 2)]);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < d; ++j)
        largest[static_cast<size_t>(i)] = std::max(largest[static_cast<size_t>(i)], std::fabs(row(i)[j] - center[static_cast<size_t>(j)]));
    std::sort(largest.begin(), largest.end());
    scale = int8_scale(largest[static_cast<size_t>(n * 8 / 10)]);
    codes.resize(rows.size());
    for (int64_t i = 0; i < n; ++i) info.push_back(quantize_row(row(i), center.data(), scale, d, &codes[static_cast<size_t>(i * d)]));
  }
  const float* row(int64_t i) const { return &rows[static_cast<size_t>(i * dim)]; }
  double canonical(int64_t i, int64_t k) const { return squared_distance(row(i), row(k), dim); }
  int32_t dot(int64_t i, int64_t k) const {
    const int8_t *a = &codes[static_cast<size_t>(i * dim)], *b = &codes[static_cast<size_t>(k * dim)];
    int32_t total = 0;
    for (int64_t j = 0; j < dim; ++j) total += a[j] * b[j];
    return total;
  }
};

// What the mutations change; the default is the certified test.
struct Terms {
  bool residual = true, scale = true;
};

bool int8_pair_survives(const Packed& p, int64_t i, int64_t k, double squared_distance_to_beat, bool search, Terms terms = {}) {
  const Int8Row &x = p.info[static_cast<size_t>(i)], &y = p.info[static_cast<size_t>(k)];
  const double rx = terms.residual ? static_cast<double>(x.residual) : 0, ry = terms.residual ? static_cast<double>(y.residual) : 0;
  const double scale = terms.scale ? p.scale : 1, slack = canonical_slack(p.dim);
  const double reach =
      search ? search_reach(squared_distance_to_beat, 0, rx, scale, slack) : update_reach(squared_distance_to_beat, 0, rx, scale, slack);
  const int32_t limit = int8_skip_limit(reach, ry), t = p.dot(i, k);
  const bool survives = int8_survives(x.squared_norm, y.squared_norm, t, limit);
  const bool fast = t + int8_start(y.squared_norm) >= int8_floor(x.squared_norm, limit);
  CHECK(fast || !survives);
  return survives;
}

// Pairs that must survive by the narrowest margin: c just below U2 for the update, c == U2 for the search. Returns how many were skipped.
int64_t int8_unsound(const Packed& p, int64_t pairs, Terms terms = {}) {
  Random random(11);
  int64_t unsound = 0;
  for (int64_t n = 0; n < pairs; ++n) {
    const int64_t i = random.below(p.count), k = random.below(p.count);
    const double c = p.canonical(i, k);
    unsound += !int8_pair_survives(p, i, k, c, true, terms);
    unsound += !int8_pair_survives(p, i, k, std::nextafter(c, kInf), false, terms);
  }
  return unsound;
}

// ---- 1. Rounding ----

TEST(round_to_float_is_the_nearest_bound) {
  Random random(1);
  const double special[] = {0.0,    -0.0,    1e-320, -1e-320, 0x1p-150,    0x1p-149, -0x1p-149, 1e300,
                            -1e300, FLT_MAX, 3.5e38, -3.5e38, 1 + 0x1p-30, kInf,     -kInf};
  for (int n = 0; n < 200000; ++n) {
    const double v = n < 15 ? special[n] : random.normal() * random.magnitude(-47, 40);
    const float up = round_up_to_float(v), down = round_down_to_float(v);
    CHECK(static_cast<double>(up) >= v && static_cast<double>(down) <= v);
    CHECK(static_cast<double>(std::nextafter(up, -INFINITY)) < v || std::isinf(v));
    CHECK(static_cast<double>(std::nextafter(down, INFINITY)) > v || std::isinf(v));
  }
  CHECK(std::isnan(round_up_to_float(NAN)) && std::isnan(round_down_to_float(NAN)));
}

TEST(inflate_undoes_the_worst_roundings) {
  Random random(2);
  for (int n = 0; n < 200000; ++n) {
    const int64_t k = random.below(2000);
    const double v = (1 + random.uniform()) * random.magnitude(-290, 290), up = inflate(v, k);
    // v / (1 - u)^k <= v (1 + k u + (k u)^2): compare in exact arithmetic.
    const double ku = static_cast<double>(k) * 0x1p-53;
    CHECK(!less({up, 0}, product({v, 0}, two_sum(1, ku + ku * ku))));
    CHECK(up <= v * (1 + (2 * ku + 0x1p-50)));
  }
  CHECK(inflate(0, 3) == 0 && std::isinf(inflate(kInf, 3)) && std::isnan(inflate(NAN, 3)));
}

// ---- 2. gamma ----

TEST(canonical_slack_bounds_the_canonical_error) {
  for (const int64_t dim : kDims)
    for (int kind = 0; kind < kKinds; ++kind) {
      const std::vector<float> rows = make_rows(kind, 100, dim, 3);
      for (int64_t i = 0; i + 1 < 100; ++i) {
        const float *x = &rows[static_cast<size_t>(i * dim)], *y = x + dim;
        const Exact exact = exact_squared_distance(x, y, dim);
        const double c = squared_distance(x, y, dim);
        CHECK(std::fabs((c - exact.hi) - exact.lo) <= canonical_slack(dim) * exact.hi);
        CHECK(exact.hi == 0 || c > 0);  // nothing underflows
      }
    }
}

// 16 lanes at 1, then terms just below half an ulp of 1: every one of them is lost, the canonical value falls short by 92% of gamma.
TEST(dropping_gamma_is_caught) {
  const int64_t dim = 1536;
  std::vector<float> x(dim, 0.7071f * 0x1p-26f), y(dim, 0.0f);
  for (int j = 0; j < 16; ++j) x[static_cast<size_t>(j)] = 1;
  const Exact exact = exact_squared_distance(x.data(), y.data(), dim);
  const double c = squared_distance(x.data(), y.data(), dim);
  CHECK_EQ(c, 16.0);
  const double error = (exact.hi - c) + exact.lo, bound = canonical_slack(dim) * exact.hi;
  CHECK(error > 0.9 * bound && error <= bound);
  // An ideal filter, which knows the true distance: it must keep this pair, for c < U2.
  const double to_beat = std::nextafter(c, kInf);
  const auto skips = [&](double slack) {
    const double reach = update_reach(to_beat, 0, 0, 1, slack);
    return less(product({reach, 0}, {reach, 0}), exact);
  };
  CHECK(!skips(canonical_slack(dim)));
  CHECK(skips(0));
}

TEST(reach_is_not_below_the_exact_one) {
  Random random(3);
  for (int n = 0; n < 20000; ++n) {
    const double distance = std::ldexp(std::floor((1 + random.uniform()) * 0x1p20), static_cast<int>(random.below(60))) * 0x1p-50;  // a square's root
    const double error = random.uniform() * distance * 0x1p-5, residual = random.uniform() * 9;
    const double scale = (1 + random.uniform()) * random.magnitude(-10, 10), slack = canonical_slack(1 + random.below(2000));
    const Exact wanted = sum(product({distance, 0}, two_sum(1, slack)), {error, 0}), exact = sum(product({scale, 0}, wanted), {residual, 0});
    const double reach = search_reach(distance * distance, error, residual, scale, slack);
    CHECK(!less({reach, 0}, exact));
    CHECK(reach <= exact.hi * (1 + 0x1p-48));
  }
}

// ---- 3. Quantisation ----

TEST(residual_bounds_the_exact_residual) {
  Random random(4);
  for (const int64_t dim : kDims)
    for (int kind = 0; kind < kKinds; ++kind) {
      const Packed p(make_rows(kind, 60, dim, 5), 60, dim);
      for (int64_t i = 0; i < p.count; ++i) {
        Exact total{0, 0};
        int64_t norm = 0;
        for (int64_t j = 0; j < dim; ++j) {
          Exact target = product({p.scale, 0}, two_sum(static_cast<double>(p.row(i)[j]), -p.center[static_cast<size_t>(j)]));
          if (target.hi > 127 || (target.hi == 127 && target.lo > 0)) target = {127, 0};
          if (target.hi < -127 || (target.hi == -127 && target.lo < 0)) target = {-127, 0};
          const int8_t code = p.codes[static_cast<size_t>(i * dim + j)];
          CHECK(code >= -127);
          norm += code * code;
          const Exact e = sum(target, {-static_cast<double>(code), 0});
          total = sum(total, product(e, e));
        }
        const double r = static_cast<double>(p.info[static_cast<size_t>(i)].residual);
        CHECK(!less(product({r, 0}, {r, 0}), total));
        CHECK(r <= std::sqrt(total.hi) * (1 + 1e-6) + 1e-10);                        // and is no looser than float needs
        CHECK(r <= 0.5 * std::sqrt(static_cast<double>(dim)) * (1 + 1e-6) + 1e-10);  // clipped rows too
        CHECK_EQ(norm, static_cast<int64_t>(p.info[static_cast<size_t>(i)].squared_norm));
      }
    }
}

TEST(int8_scale_and_codes_take_any_input) {
  CHECK_EQ(int8_scale(127.0), 1.0);
  CHECK(int8_scale(0) == 1 && int8_scale(NAN) == 1 && int8_scale(kInf) == 1 && int8_scale(-1) == 1);
  CHECK(std::isfinite(int8_scale(0x1p-149)) && std::isfinite(int8_scale(2.0 * FLT_MAX)) && int8_scale(2.0 * FLT_MAX) > 0);
  CHECK_EQ(static_cast<int>(int8_code(kInf).code), 127);
  CHECK_EQ(static_cast<int>(int8_code(-1e300).code), -127);
  CHECK_EQ(static_cast<int>(int8_code(-126.5).code), -126);  // halves to even
  CHECK_EQ(static_cast<int>(int8_code(127.4).code), 127);
  CHECK(std::isnan(int8_code(NAN).error));
  const float rows[] = {1.0f, NAN, 2.0f};
  const float zero[] = {0, 0, 0};
  int8_t codes[3];
  const Int8Row bad = quantize_row(rows, zero, 1.0, 3, codes);
  CHECK(std::isnan(bad.residual));
  CHECK_EQ(int8_skip_limit(search_reach(1.0, 0, static_cast<double>(bad.residual), 1, 0), 0), kNeverSkip);
}

// ---- 4, 5. The int8 test ----

TEST(int8_never_skips_an_improvement_or_a_tie) {
  int64_t tested = 0;
  for (const int64_t dim : kDims)
    for (int kind = 0; kind < kKinds; ++kind) {
      const Packed p(make_rows(kind, 256, dim, 6), 256, dim);
      const int64_t unsound = int8_unsound(p, pairs_for(dim));
      if (unsound) std::cerr << "  " << kNames[kind] << ", dim " << dim << "\n";
      CHECK_EQ(unsound, 0);
      tested += 2 * pairs_for(dim);
    }
  std::cout << "     " << tested << " int8 pairs at the narrowest margin\n";
}

// Rows against a value to beat that comes from other rows, as in a scan: whatever is skipped is above it, and most of what is above it is skipped.
TEST(int8_skips_most_of_what_can_be_skipped) {
  for (const int64_t dim : kDims)
    for (int kind = 0; kind < kKinds; ++kind) {
      const int64_t count = dim > 128 ? 96 : 256;
      const Packed p(make_rows(kind, count, dim, 7), count, dim);
      int64_t above = 0, skipped = 0;
      for (int64_t i = 0; i < count / 4; ++i) {
        double to_beat = kInf;
        for (int64_t k = count / 4; k < count / 2; ++k) to_beat = std::min(to_beat, p.canonical(i, k));
        for (int64_t k = count / 2; k < count; ++k) {
          const double c = p.canonical(i, k);
          const bool update = !int8_pair_survives(p, i, k, to_beat, false), search = !int8_pair_survives(p, i, k, to_beat, true);
          CHECK(!update || c >= to_beat);
          CHECK(!search || c > to_beat);
          CHECK(update || !search || to_beat == 0);
          above += c > to_beat;
          skipped += search;
        }
      }
      const double rate = static_cast<double>(skipped) / static_cast<double>(std::max<int64_t>(above, 1));
      if (kind == kNormal) std::cout << "     int8 skips " << 100 * rate << "% of what it could, dim " << dim << "\n";
      CHECK(kind == kEqual ? above == 0 : rate > (kind == kNormal && dim <= 128 ? 0.95 : 0.75));
    }
}

TEST(int8_without_the_residual_is_caught) {
  for (const int64_t dim : kDims) {
    const Packed p(make_rows(kNormal, 256, dim, 8), 256, dim);
    Terms terms;
    terms.residual = false;
    CHECK(int8_unsound(p, pairs_for(dim), terms) > 100);
  }
}

TEST(int8_without_the_scale_is_caught) {
  for (const int64_t dim : kDims) {
    const Packed p(make_rows(kNormal, 256, dim, 9), 256, dim);
    CHECK(p.scale > 4);
    Terms terms;
    terms.scale = false;
    CHECK(int8_unsound(p, pairs_for(dim), terms) > pairs_for(dim) / 2);
  }
}

// Integer rows are their own codes: no residual, ties are exact in the filter too, and a limit one unit lower loses every one of them.
TEST(int8_limit_one_lower_is_caught) {
  const int64_t dim = 24;
  const std::vector<float> rows = make_rows(kLattice, 64, dim, 20), zero(static_cast<size_t>(dim), 0.0f);
  std::vector<int8_t> codes(rows.size());
  for (int64_t i = 0; i < 63; ++i) {
    const float *x = &rows[static_cast<size_t>(i * dim)], *y = x + dim;
    int8_t* a = &codes[static_cast<size_t>(i * dim)];
    const Int8Row row = quantize_row(x, zero.data(), 1.0, dim, a), next = quantize_row(y, zero.data(), 1.0, dim, a + dim);
    int32_t dot = 0;
    for (int64_t j = 0; j < dim; ++j) dot += a[j] * a[dim + j];
    const double c = squared_distance(x, y, dim);
    CHECK_EQ(c, static_cast<double>(row.squared_norm + next.squared_norm - 2 * dot));
    const double reach = search_reach(c, 0, static_cast<double>(row.residual), 1.0, canonical_slack(dim));
    const int32_t limit = int8_skip_limit(reach, static_cast<double>(next.residual));
    CHECK(int8_survives(row.squared_norm, next.squared_norm, dot, limit));
    CHECK(!int8_survives(row.squared_norm, next.squared_norm, dot, limit - 1));
  }
}

TEST(int8_limits_of_special_values) {
  CHECK_EQ(int8_skip_limit(update_reach(0.0, 0, 3, 2, 1e-15), 1), kAlwaysSkip);
  CHECK_EQ(int8_skip_limit(update_reach(-0.0, 0, 3, 2, 1e-15), 1), kAlwaysSkip);
  CHECK_EQ(int8_skip_limit(update_reach(-1.0, 0, 3, 2, 1e-15), 1), kAlwaysSkip);
  CHECK_EQ(int8_skip_limit(search_reach(-1.0, 0, 3, 2, 1e-15), kInf), kAlwaysSkip);
  CHECK_EQ(int8_skip_limit(search_reach(0.0, 0, 0, 2, 1e-15), 0), 1);  // distance 0 may tie, distance 1 may not
  CHECK_EQ(int8_skip_limit(search_reach(0.0, 0, 3, 2, 1e-15), 1), 17);
  for (const double bad : {kInf, static_cast<double>(NAN), 1e300}) {
    CHECK_EQ(int8_skip_limit(update_reach(bad, 0, 3, 2, 1e-15), 1), kNeverSkip);
    CHECK_EQ(int8_skip_limit(search_reach(bad, 0, 3, 2, 1e-15), 1), kNeverSkip);
    CHECK_EQ(int8_skip_limit(search_reach(1.0, bad, 3, 2, 1e-15), 1), kNeverSkip);
    CHECK_EQ(int8_skip_limit(search_reach(1.0, 0, bad, 2, 1e-15), 1), kNeverSkip);
    CHECK_EQ(int8_skip_limit(search_reach(1.0, 0, 3, 2, 1e-15), bad), kNeverSkip);
  }
  CHECK_EQ(int8_skip_limit(46340.9, 0), 2147479013);  // the largest limits still fit
  CHECK_EQ(int8_skip_limit(46341.0, 0), kNeverSkip);
  CHECK_EQ(int8_skip_limit(1e-200, 0), 1);  // the square underflows: still above R^2
  // Nothing reaches kNeverSkip, everything reaches kAlwaysSkip, at the largest norms that the dimension limit allows.
  const int32_t top = static_cast<int32_t>(kMaxFilterDim) * kMaxCode * kMaxCode;
  CHECK(int8_survives(top, top, -top, kNeverSkip));
  CHECK(!int8_survives(0, 0, 0, kAlwaysSkip));
}

TEST(int8_floor_agrees_with_the_plain_test) {
  Random random(10);
  const int32_t top = static_cast<int32_t>(kMaxFilterDim) * kMaxCode * kMaxCode;
  const auto compare = [&](int32_t nx, int32_t ny, int32_t t, int32_t limit) {
    const bool plain = int8_survives(nx, ny, t, limit), fast = t + int8_start(ny) >= int8_floor(nx, limit);
    CHECK(fast || !plain);
    CHECK(!fast || plain || (limit != kAlwaysSkip && nx + ny - 2 * t <= limit));  // at most one unit looser
  };
  for (int n = 0; n < 300000; ++n) {
    const int32_t size = n % 3 == 0 ? 20 : top;
    const int32_t nx = static_cast<int32_t>(random.below(size + 1)), ny = static_cast<int32_t>(random.below(size + 1));
    const int32_t most = static_cast<int32_t>(std::sqrt(static_cast<double>(nx) * ny));
    const int32_t t = static_cast<int32_t>(random.below(2 * static_cast<int64_t>(most) + 1) - most), v = nx + ny - 2 * t;
    for (int32_t near = -2; near <= 2; ++near) compare(nx, ny, t, v + near);
    compare(nx, ny, t, kNeverSkip);
    compare(nx, ny, t, kAlwaysSkip);
  }
  for (const int32_t n : {0, 1, top}) {
    compare(n, n, -n, kNeverSkip);
    compare(n, n, n, kAlwaysSkip);
    CHECK(kInt8PaddingStart < int8_floor(n, kNeverSkip));
  }
}

}  // namespace

TEST_MAIN()
