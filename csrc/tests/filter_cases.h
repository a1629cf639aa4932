// What the tests of the certified filters share: random numbers, exact arithmetic, and rows made to break a filter.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace filter_cases {

constexpr int64_t kDims[] = {1, 3, 16, 17, 64, 128, 384, 1536};
constexpr double kInf = INFINITY;

// ---- Random numbers: the same on every platform (the distributions of <random> are not) ----

struct Random {
  std::mt19937_64 engine;
  explicit Random(uint64_t seed) : engine(seed) {}
  double uniform() { return static_cast<double>(engine() >> 11) * 0x1p-53; }
  int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
  double normal() {  // variance 1, bounded by 6
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  double magnitude(double low, double high) { return std::pow(10.0, low + (high - low) * uniform()); }
};

// ---- Exact arithmetic: unevaluated sums hi + lo of two doubles, relative error about 2^-100 ----

struct Exact {
  double hi, lo;
};

inline Exact two_sum(double a, double b) {
  const double s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}

inline Exact sum(Exact a, Exact b) {
  const Exact s = two_sum(a.hi, b.hi);
  return two_sum(s.hi, s.lo + a.lo + b.lo);
}

inline Exact product(Exact a, Exact b) {
  const double p = a.hi * b.hi;
  return two_sum(p, std::fma(a.hi, b.hi, -p) + (a.hi * b.lo + a.lo * b.hi));
}

inline bool less(Exact a, Exact b) { return a.hi < b.hi || (a.hi == b.hi && a.lo < b.lo); }

template <class A, class B>
Exact exact_squared_distance(const A* a, const B* b, int64_t dim) {
  Exact total{0, 0};
  for (int64_t j = 0; j < dim; ++j) {
    const Exact difference = two_sum(static_cast<double>(a[j]), -static_cast<double>(b[j]));
    total = sum(total, product(difference, difference));
  }
  return total;
}

// ---- Data ----

enum Kind { kNormal, kTiny, kHuge, kOffset, kLattice, kSubnormal, kOutliers, kClusters, kMixed, kHalfGrid, kEqual, kKinds };
constexpr const char* kNames[] = {"normal", "x1e-30", "x1e30", "+1e4", "lattice", "subnormal", "outliers", "clusters", "mixed", "fp16 grid", "equal"};

inline std::vector<float> make_rows(int kind, int64_t count, int64_t dim, uint64_t seed) {
  Random random(seed * 977 + static_cast<uint64_t>(kind * 31 + dim));
  std::vector<float> rows(static_cast<size_t>(count * dim));
  std::vector<double> column(static_cast<size_t>(dim));
  for (double& c : column) c = random.magnitude(-18, 18);
  for (int64_t i = 0; i < count; ++i) {
    const bool outlier = kind == kOutliers && i % 10 == 3;
    for (int64_t j = 0; j < dim; ++j) {
      const double g = random.normal();
      double value = g;
      if (kind == kTiny) value = g * 1e-30;
      if (kind == kHuge) value = g * 1e30;
      if (kind == kOffset) value = g + 1e4;
      if (kind == kLattice) value = static_cast<double>(random.below(5)) - 2;
      if (kind == kSubnormal) value = g * 1e-44;
      if (outlier) value = i % 20 == 3 ? g * 50 : (j == i % dim ? 1e6 : g);
      if (kind == kClusters) value = static_cast<double>((i % 8 * 7 + j * 3) % 11) + (i % 3 == 0 ? 0 : 1e-3 * g);
      if (kind == kMixed) value = g * column[static_cast<size_t>(j)];
      if (kind == kHalfGrid) value = std::floor(g * 64) / 1024;
      if (kind == kEqual) value = 0.1;
      rows[static_cast<size_t>(i * dim + j)] = static_cast<float>(value);
    }
  }
  return rows;
}

inline int64_t pairs_for(int64_t dim) { return dim <= 17 ? 60000 : dim <= 128 ? 20000 : dim <= 384 ? 6000 : 2000; }

}  // namespace filter_cases
