// Hostile and ordinary feature sets, and a pool of threads, for the tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "parallel.h"
#include "types.h"

#if defined(PATCHCORE_GPU)
#include "managed.h"
#endif

namespace data {

using patchcore::Parallel;
using patchcore::Rows;
using patchcore::ScalarType;

// What kernels read and write in a test.
#if defined(PATCHCORE_GPU)
template <class T>
using Vector = std::vector<T, ManagedAllocator<T>>;
#else
template <class T>
using Vector = std::vector<T>;
#endif

// `count` rows of `dim` values in memory with `padding` unused values between rows (NaN: reading them would show).
struct Set {
  std::string name;
  Vector<float> values;
  Vector<uint16_t> halves;
  Rows rows;
};

inline Set make(const std::string& name, int64_t count, int64_t dim, int64_t padding = 0) {
  Set set;
  set.name = name;
  const int64_t stride = dim + padding;
  set.values.assign(static_cast<size_t>(count * stride), std::numeric_limits<float>::quiet_NaN());
  set.rows = {nullptr, ScalarType::kFloat32, count, dim, stride};
  return set;
}

template <class F>
Set fill(Set set, F&& value) {
  for (int64_t r = 0; r < set.rows.count; ++r) {
    for (int64_t j = 0; j < set.rows.dim; ++j) set.values[static_cast<size_t>(r * set.rows.stride + j)] = static_cast<float>(value(r, j));
  }
  set.rows.data = set.values.data();
  return set;
}

// The same set moved into its final place: rows.data must follow the vector.
inline const Rows& rows_of(Set& set) {
  if (set.halves.empty()) {
    set.rows.data = set.values.data();
  } else {
    set.rows.data = set.halves.data();
  }
  return set.rows;
}

inline Set half_precision(const std::string& name, ScalarType type, int64_t count, int64_t dim, uint64_t seed) {
  std::mt19937_64 random(seed);
  Set set;
  set.name = name;
  set.halves.resize(static_cast<size_t>(count * dim));
  // random bit patterns with a moderate exponent: finite, of both signs, some subnormal
  for (uint16_t& half : set.halves) {
    const uint64_t word = random();
    const uint16_t exponent = static_cast<uint16_t>(type == ScalarType::kFloat16 ? (word % 20) << 10 : (100 + word % 40) << 7);
    const uint16_t mantissa = static_cast<uint16_t>((word >> 8) & (type == ScalarType::kFloat16 ? 0x3ff : 0x7f));
    half = static_cast<uint16_t>(((word >> 40) & 1) << 15 | exponent | mantissa);
  }
  set.rows = {set.halves.data(), type, count, dim, dim};
  return set;
}

// The sets on which every kernel must equal its oracle.
inline std::vector<Set> sets(int64_t count, int64_t dim) {
  std::mt19937_64 random(static_cast<uint64_t>(count * 1000 + dim));
  std::normal_distribution<double> normal;
  std::vector<Set> all;
  all.push_back(fill(make("gaussian", count, dim), [&](int64_t, int64_t) { return normal(random); }));
  all.push_back(fill(make("strided", count, dim, 5), [&](int64_t, int64_t) { return normal(random); }));
  all.push_back(fill(make("lattice with ties", count, dim), [&](int64_t, int64_t) { return static_cast<double>(random() % 3); }));
  all.push_back(fill(make("all equal", count, dim), [](int64_t, int64_t j) { return static_cast<double>(j) + 0.5; }));
  all.push_back(fill(make("two points", count, dim), [](int64_t r, int64_t) { return static_cast<double>(r % 2); }));
  all.push_back(fill(make("offset 1e4", count, dim), [&](int64_t, int64_t) { return 1e4 + normal(random); }));
  all.push_back(fill(make("times 1e30", count, dim), [&](int64_t, int64_t) { return 1e30 * normal(random); }));
  all.push_back(fill(make("times 1e-30", count, dim), [&](int64_t, int64_t) { return 1e-30 * normal(random); }));
  all.push_back(fill(make("subnormal", count, dim), [&](int64_t, int64_t) { return 1e-41 * normal(random); }));
  all.push_back(fill(make("one outlier", count, dim), [&](int64_t r, int64_t) { return (r == count / 2 ? 1e6 : 1.0) * normal(random); }));
  all.push_back(
      fill(make("clusters", count, dim), [&](int64_t r, int64_t j) { return static_cast<double>((r % 7) * (j % 5)) + 0.01 * normal(random); }));
  all.push_back(half_precision("float16", ScalarType::kFloat16, count, dim, 1));
  all.push_back(half_precision("bfloat16", ScalarType::kBFloat16, count, dim, 2));
  for (Set& set : all) rows_of(set);
  return all;
}

// Row r as doubles, whatever its type: written without the library's own conversions.
[[gnu::noinline]] inline Vector<double> widened(const Rows& rows, int64_t r) {
  Vector<double> out(static_cast<size_t>(rows.dim));
  for (int64_t j = 0; j < rows.dim; ++j) {
    const int64_t at = r * rows.stride + j;
    double& value = out[static_cast<size_t>(j)];
    if (rows.type == ScalarType::kFloat32) {
      value = static_cast<const float*>(rows.data)[at];
      continue;
    }
    const uint16_t half = static_cast<const uint16_t*>(rows.data)[at];
    const bool is_float16 = rows.type == ScalarType::kFloat16;
    const int mantissa_bits = is_float16 ? 10 : 7, bias = is_float16 ? 15 : 127;
    const int exponent = (half & 0x7fff) >> mantissa_bits;
    const int mantissa = half & ((1 << mantissa_bits) - 1);
    const double magnitude =
        exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits) : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    value = half & 0x8000 ? -magnitude : magnitude;
  }
  return out;
}

// `num_slots` shares one after the other, the last first: their order must not matter. Starting threads costs more than the small work of most tests.
inline Parallel slots(int64_t num_slots) {
  return {[](void*, int64_t count, Parallel::Body body, void* context) {
            for (int64_t slot = count - 1; slot >= 0; --slot) body(context, slot);
          },
          nullptr, num_slots};
}

// `num_slots` shares on as many threads.
inline Parallel threads(int64_t num_slots) {
  return {[](void*, int64_t slots, Parallel::Body body, void* context) {
            std::vector<std::thread> pool;
            for (int64_t slot = 0; slot < slots; ++slot) pool.emplace_back(body, context, slot);
            for (std::thread& thread : pool) thread.join();
          },
          nullptr, num_slots};
}

}  // namespace data
