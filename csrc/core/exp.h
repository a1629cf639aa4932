// The exponential of Eq. (7), with the same bits on CPU and CUDA: libm and the CUDA library differ in the last one.
//
// Domain x <= 0 (a stable softmax subtracts the largest exponent first). Below -708 the result is exactly 0, before subnormal numbers begin.
//
// Method: x = k ln2 + r with |r| <= ln2 / 2 (a little more by rounding), k = round(x / ln2). ln2 is split in two parts; the high part has 32
// significant bits, so k * high is exact for |k| < 2^20. x - k * high is exact too: both are multiples of 2^-54 (k = 0, or |x| > 1/4) and the
// difference is below 1/2. The rounding of r = (x - k high) - k low is recovered in c. exp(r + c) = 1 + (r + (r^2 q(r) + c)), q the Taylor polynomial
// up to r^13 / 13!: truncated at 0.347^14 / 14! < 5e-18, a twentieth of an ulp. Scaling by 2^k is exact. Error, in units of 2^-53 (one ulp of a
// result below 1 before scaling; half an ulp above): the last addition 1/2; r + (...) is below 0.42: 1/4; r^2 q + c is below 0.07: 1/32 and the
// roundings inside r^2 q less than 1/16 together. Sum below 0.9 ulp; measured 0.85: csrc/tests/test_image_score.cpp.
#pragma once

#include <cstdint>

#include "platform.h"

namespace patchcore {

// 2^k for -1022 <= k <= 1023.
PATCHCORE_HOST_DEVICE double power_of_two(int k) {
  union {
    uint64_t bits;
    double value;
  } number;
  number.bits = static_cast<uint64_t>(k + 1023) << 52;
  return number.value;
}

PATCHCORE_HOST_DEVICE double exp_of_nonpositive(double x) {
  constexpr double kLog2E = 1.4426950408889634;
  constexpr double kLn2High = 6.93147180369123816490e-01;  // ln 2 to 32 bits; 0x3fe62e42fee00000
  constexpr double kLn2Low = 1.90821492927058770002e-10;   // the rest
  if (x < -708.0) return 0.0;
  const int k = static_cast<int>(subtract(multiply(x, kLog2E), 0.5));  // truncation toward zero rounds the non-positive x / ln2 to nearest
  const double high = subtract(x, multiply(k, kLn2High));
  const double low = multiply(k, kLn2Low);
  const double r = subtract(high, low);
  const double c = subtract(subtract(high, r), low);
  const double reciprocal_factorial[] = {1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,      1.0 / 720,       1.0 / 5040,
                                         1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  double q = reciprocal_factorial[11];
  for (int i = 10; i >= 0; --i) q = add(multiply(q, r), reciprocal_factorial[i]);
  return multiply(add(1.0, add(r, add(multiply(multiply(r, r), q), c))), power_of_two(k));
}

}  // namespace patchcore
