// Certified filters: when may a cheap comparison discard a pair of rows without its canonical squared distance (distance.h) being computed?
//
// Contract: a pair is skipped only if c(x, y) > U2, where c is the canonical squared distance and U2 the value to beat (a row's min-distance in the
// coreset, a query's k-th best so far in the search). So a skipped pair neither improves nor ties: ties survive, and the caller breaks them by index
// on canonical values. NaN and infinite bounds never skip. Plain float64, every operation rounded on its own (platform.h): the same limits on CUDA.
// Assumed: round to nearest and gradual underflow (the core clears FTZ and DAZ in its threads); finite rows, exact in float32 (float32, fp16, bf16);
// dim <= kMaxFilterDim for the int8 test.
//
// Notation: u = 2^-53 and v = 2^-24 are the unit roundoffs of float64 and float32. A rounding is a factor (1 + e), |e| <= u. S is the scale, mu the
// centre, a_x the stored operand of row x (int8 codes or floats), r_x its residual, n_x = ||a_x||^2, t = a_x . a_y, D = ||x - y|| (exact).
//
// Theorem (the whole method). Let f be a map with ||f(x) - f(y)|| <= S (D + E) and r_x >= ||f(x) - a_x||. By the triangle inequality
//     ||a_x - a_y|| <= S (D + E) + r_x + r_y.
// Let w >= sqrt(U2 / (1 - gamma)) with c >= (1 - gamma) D^2 (canonical_slack), and R >= S (w + E) + r_x + r_y. Then
//     ||a_x - a_y|| > R   =>   D > w   =>   c(x, y) >= (1 - gamma) D^2 > U2.
// The tests compare n_x + n_y - 2t = ||a_x - a_y||^2 with R^2. They are monotone: a larger r_x, r_y, E, w or R only lets more pairs survive, so each
// is rounded up, and r_y may be the maximum over a tile. The maps f in use:
//   S (x - mu)             E = 0: a translation and a scaling.
//   clip(S (x - mu))       E = 0: clipping each coordinate to [-127, 127] does not enlarge distances, |clip(a) - clip(b)| <= |a - b|. So the residual
//                          is measured AFTER clipping, on both sides: r_x <= sqrt(dim) / 2 for every row, however far out it lies.
//   S (P x, residual)      E = E_x + E_y, see the last section; may be clipped too.
// Strict or not: the canonical test ">= R^2" would do for c >= U2 (no improvement), ">" is needed for c > U2 (no tie). R is rounded up, so the two
// agree unless nothing was rounded; the strict one is used everywhere: a tie that survives costs one canonical evaluation, a lost one is wrong.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "platform.h"

namespace patchcore {

// (2 * 127)^2 * dim < 2^31 - 1 needs dim <= 33,286: up to this limit n_x + n_y - 2t fits int32 and stays below kNeverSkip.
constexpr int64_t kMaxFilterDim = 32768;
constexpr int32_t kNeverSkip = INT32_MAX;   // as an int8 skip limit: no pair reaches it
constexpr int32_t kAlwaysSkip = INT32_MIN;  // as an int8 skip limit: every pair reaches it
constexpr int kMaxCode = 127;               // -128 is not used: the code range is symmetric

// ---- 1. Rounding ----------------------------------------------------------------------------------------------------------------------------------

PATCHCORE_HOST_DEVICE double rounded_root(double value) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(value);
#else
  return std::sqrt(value);
#endif
}

// An upper bound of q >= 0 from its computed value, which suffered at most k = `roundings` roundings: value >= q (1 - u)^k.
// Proof. The factor F = 1 + 2 (k + 1) u is exact for k < 2^52. The product is rounded once more, and by Bernoulli's inequality
//   fl(value F) >= q (1 - u)^(k + 1) F >= q (1 - (k + 1) u) (1 + 2 (k + 1) u) = q (1 + (k + 1) u (1 - 2 (k + 1) u)) >= q   for 2 (k + 1) u <= 1.
// Needs value = 0 or value >= 2^-1000, so that the product does not underflow; the callers say why. Infinity and NaN pass through.
PATCHCORE_HOST_DEVICE double inflate(double value, int64_t roundings) { return multiply(value, 1.0 + static_cast<double>(roundings + 1) * 0x1p-52); }

// The smallest float >= value: the nearest float, or its successor if that one is below (bits of one sign are ordered like magnitudes). Keeps NaN.
PATCHCORE_HOST_DEVICE float round_up_to_float(double value) {
  const float nearest = static_cast<float>(value);
  if (!(static_cast<double>(nearest) < value)) return nearest;
  if (nearest == 0.0f) return 0x1p-149f;
  uint32_t bits;
  memcpy(&bits, &nearest, sizeof(bits));
  bits = nearest > 0 ? bits + 1 : bits - 1;
  float next;
  memcpy(&next, &bits, sizeof(next));
  return next;
}

// The largest float <= value.
PATCHCORE_HOST_DEVICE float round_down_to_float(double value) { return -round_up_to_float(-value); }

// ---- 2. The canonical distance against the true one -----------------------------------------------------------------------------------------------

// gamma = (ceil(dim / 16) + 7) 2^-53, with |c(x, y) - D^2| <= gamma D^2.
// Proof. No underflow, no overflow: float32 values are multiples of 2^-149 below 2^128, so a rounded difference is 0 or in [2^-149, 2^129], its
// square 0 or in [2^-298, 2^258], and sums of squares stay in range. So every operation is a factor (1 + e). A term (x_j - y_j)^2 passes the
// subtraction (squared: 2 factors), the product (1), its lane's additions (ceil(dim / 16), of which the first adds to 0 and is exact) and the tree
// over 16 lanes (4): at most m = ceil(dim / 16) + 6 factors. All terms are >= 0, hence
//   |c - D^2| <= ((1 - u)^-m - 1) D^2 <= m u / (1 - m u) D^2 <= (m + 1) u D^2,   the last step because m (m + 1) u <= 1 (dim < 10^9).
PATCHCORE_HOST_DEVICE double canonical_slack(int64_t dim) { return static_cast<double>((dim + 15) / 16 + 7) * 0x1p-53; }

// ---- 3. Quantisation ------------------------------------------------------------------------------------------------------------------------------

// p = fl(S fl(x - mu)) for one coordinate. S > 0, finite; mu any double (a float or double centre). residual_bound accounts for its error.
PATCHCORE_HOST_DEVICE double scaled_coordinate(double value, double center, double scale) { return multiply(scale, subtract(value, center)); }

// The int8 scale, in codes per unit, that puts `magnitude` at code 127; for codes within a smaller range, in proportion. Any S is sound. Rows beyond
// are clipped, which blunts their bound, but a finer step sharpens everyone's: hand in about the 80th percentile of the rows' largest |x_j - mu_j|,
// with mu a median (outliers move a mean). Measured on 31,360 rows of ResNet18 features, pairs that survive without improving: at d = 128 0.17% of
// all for the 99.9th percentile and 0.095% for the 80th, at d = 384 1.29% and 0.54%. A useless magnitude (0, NaN, Inf) gives 1. For magnitudes of
// float32 rows S lies in [2^-123, 2^157], so S times any difference of rows stays in range.
PATCHCORE_HOST_DEVICE double int8_scale(double magnitude) { return magnitude >= 0x1p-150 && magnitude <= 0x1p130 ? kMaxCode / magnitude : 1.0; }

struct RoundedCode {
  double code;   // an integer
  double error;  // fl(clip(p) - code); NaN if p is NaN, so that the row's residual is NaN and the row is never skipped
};

// The integer nearest to clip(p) = p clipped to [-most, most]. Adding and subtracting 1.5 * 2^52 rounds to the nearest integer (halves to even) for
// most < 2^51.
PATCHCORE_HOST_DEVICE RoundedCode rounded_code(double scaled, double most) {
  const double clipped = scaled > most ? most : (scaled < -most ? -most : scaled);
  const double code = clipped == clipped ? subtract(add(clipped, 0x1.8p52), 0x1.8p52) : 0.0;
  return {code, subtract(clipped, code)};
}

struct Int8Code {
  int8_t code;
  double error;
};

PATCHCORE_HOST_DEVICE Int8Code int8_code(double scaled, int most = kMaxCode) {
  const RoundedCode rounded = rounded_code(scaled, most);
  return {static_cast<int8_t>(rounded.code), rounded.error};
}

// r_x >= ||f(x) - a||, rounded up to float, from error_squares = sum_j e_j^2 and operand_squares = sum_j a_j^2, both summed in float64 in ANY order
// (lanes, warps), with fma or without. f(x)_j = C(S (x_j - mu_j)), C = clip to some [-m, m] or the identity; p_j = scaled_coordinate;
// e_j = fl(C(p_j) - a_j); a_j any operand, nearest or not.
// Proof. (i) p = S (x - mu) (1 + e1) (1 + e2) + h with |h| <= 2^-1075, as only the product can underflow: |S (x - mu) - p| <= 2.01 u |p| + 2^-1074.
// (ii) |f(x)_j - C(p)| <= 4.02 u |C(p)| + 2^-1074. For the identity this is (i). For clip: if |p| > 2 m then |S (x - mu)| > m with the same sign
// and both clip to the same value (an infinite p too); else |p| <= 2 |C(p)|, and clipping does not enlarge the difference in (i).
// (iii) A subtraction does not underflow: |C(p) - a| <= |e| / (1 - u), hence |C(p)| <= |a| + |e| / (1 - u), hence
//   |f(x)_j - a_j| <= (1 + 6 u) |e_j| + 4.02 u |a_j| + 2^-1074,   and by Minkowski
//   ||f(x) - a|| <= (1 + 6 u) ||e|| + 4.02 u ||a|| + sqrt(dim) 2^-1074.
// (iv) A term of error_squares passes its product and at most dim additions, and a square that underflows loses at most 2^-1075:
//   ||e|| <= (sqrt(error_squares) + sqrt(dim) 2^-537) (1 - u)^-(dim + 1),   and likewise ||a||, where nothing underflows (0 or >= 2^-149).
// (v) 8 u sqrt(operand_squares) covers 4.02 u ||a||; 2^-400 covers the absolute terms and keeps `inflate` in its domain. Roundings: 6 for (iii),
// dim + 1, the root and two additions, fewer than dim + 12.
PATCHCORE_HOST_DEVICE float residual_bound(double error_squares, double operand_squares, int64_t dim) {
  const double sum = add(add(rounded_root(error_squares), multiply(0x1p-50, rounded_root(operand_squares))), 0x1p-400);
  return round_up_to_float(inflate(sum, dim + 12));
}

struct Int8Row {
  int32_t squared_norm;  // n_x = sum of the squared codes, exact: <= 127^2 * 32,768 < 2^29
  float residual;        // r_x >= ||clip(S (x - mu)) - a_x||, in codes
};

// Quantises row [dim] to codes [dim]: x ~ mu + codes / S. Row, Center: types that convert to double exactly. SIMD and warps use the pieces above.
template <class Row, class Center>
PATCHCORE_HOST_DEVICE Int8Row quantize_row(const Row* row, const Center* center, double scale, int64_t dim, int8_t* codes) {
  double error_squares = 0;
  int32_t squared_norm = 0;
  for (int64_t j = 0; j < dim; ++j) {
    const Int8Code c = int8_code(scaled_coordinate(static_cast<double>(row[j]), static_cast<double>(center[j]), scale));
    codes[j] = c.code;
    squared_norm += c.code * c.code;
    error_squares = add(error_squares, multiply(c.error, c.error));
  }
  return {squared_norm, residual_bound(error_squares, squared_norm, dim)};
}

// ---- 4. The reach of a row: everything in R that belongs to x -------------------------------------------------------------------------------------

// reach >= S (w + E) + r_x with w = sqrt(U2) (1 + gamma), so that R = reach + r_y. Recompute it when U2 falls.
// Proof. (1 + g)^2 (1 - g) = 1 + g (1 - g - g^2) >= 1 for 0 <= g <= 1/2, so w >= sqrt(U2 / (1 - gamma)). Roundings on the longest path: root, 1 +
// gamma, product, sum with E, product with S, sum with r_x: 6, all terms >= 0. Domain of `inflate`: sqrt(U2) is 0 or >= 2^-537, and S >= 2^-400.
// U2 < 0 marks a row that wants nothing (a picked row, padding): -infinity, always skipped. U2 = infinity or NaN: never skipped. U2 = 0 is a real
// bound in a search: another row at distance 0 may have the lower index.
PATCHCORE_HOST_DEVICE double search_reach(double squared_distance, double error, double residual, double scale, double slack) {
  if (squared_distance < 0) return -INFINITY;
  const double distance = multiply(rounded_root(squared_distance), add(1.0, slack));
  return inflate(add(multiply(scale, add(distance, error)), residual), 6);
}

// The same for a min-distance update, which asks for c < U2: nothing is below U2 = 0, so a picked row's duplicate is always skipped, like the pick.
// A caller that reports owners and visits one pass's picks out of order uses search_reach instead: an earlier pick may tie at 0.
PATCHCORE_HOST_DEVICE double update_reach(double squared_distance, double error, double residual, double scale, double slack) {
  return squared_distance <= 0 ? -INFINITY : search_reach(squared_distance, error, residual, scale, slack);
}

// ---- 5. The int8 test -----------------------------------------------------------------------------------------------------------------------------

// L such that skipping n_x + n_y - 2t >= L is sound. reach and r_y (the pair's, or its tile's maximum) in codes.
// Proof. T = fl((reach + r_y)^2) suffers 3 roundings (the sum counts twice) and is inflated: T >= R^2. (Should the square underflow, R^2 < 1 <= L.)
// The left side is an exact integer, so if it is >= floor(T) + 1 it is > T >= R^2, the theorem's condition. Clamped before the conversion: a T that
// does not fit, infinity and NaN give kNeverSkip, which no left side reaches (kMaxFilterDim).
PATCHCORE_HOST_DEVICE int32_t int8_skip_limit(double reach, double residual_y) {
  if (reach < 0) return kAlwaysSkip;
  const double radius = add(reach, residual_y);
  const double bound = inflate(multiply(radius, radius), 3);
  return bound < 2147483646.0 ? static_cast<int32_t>(bound) + 1 : kNeverSkip;
}

// The test in its plain form. dot = t, exact.
PATCHCORE_HOST_DEVICE bool int8_survives(int32_t squared_norm_x, int32_t squared_norm_y, int32_t dot, int32_t limit) {
  return squared_norm_x + squared_norm_y - 2 * dot < limit;
}

// The form for inner loops: an accumulator starts at int8_start(n_y) = -floor(n_y / 2), so it ends at A = t - floor(n_y / 2), and the pair survives
// iff A >= int8_floor(n_x, L).
// Proof. n_x + n_y - 2t < L is 2t - n_y >= n_x - L + 1. As 2A = 2t - n_y + (n_y mod 2), it implies 2A >= n_x - L + 1, that is A >= ceil((n_x - L +
// 1) / 2) = floor((n_x - L + 2) / 2). So no survivor of the plain form is lost; conversely a survivor's left side is at most L.
// Range: for L = kNeverSkip every left side is below L and the proof covers it, the floor is >= 1 - 2^30; for L = kAlwaysSkip the floor is >= 2^30,
// above any A <= n_x / 2 < 2^28. Padding: zero codes with start kInt8PaddingStart end at -2^31, below every floor.
constexpr int32_t kInt8PaddingStart = INT32_MIN;
PATCHCORE_HOST_DEVICE int32_t int8_start(int32_t squared_norm_y) { return -(squared_norm_y >> 1); }
PATCHCORE_HOST_DEVICE int32_t int8_floor(int32_t squared_norm_x, int32_t limit) {
  return static_cast<int32_t>((static_cast<int64_t>(squared_norm_x) - limit + 2) >> 1);  // >> floors
}

// The form in stages. Let d_k be the distance of the first k codes of x and y, and n_xk, n_yk, t_k likewise. As d_k^2 does not
// fall with k, a pair may be skipped by any k as soon as d_k^2 >= L. With A_k = t_k - floor(n_xk / 2) - floor(n_yk / 2), a pair survives k iff
//   A_k >= int8_floor(0, L) = -floor((L - 1) / 2).
// Proof. 2 t_k = n_xk + n_yk - d_k^2, so -d_k^2 / 2 <= A_k <= 1 - d_k^2 / 2. A pair that is not to be skipped has d_k^2 <= L - 1, so A_k >= -(L - 1)
// / 2, and as A_k is an integer, A_k >= -floor((L - 1) / 2). Range: |A_k| < 2^29 + 2^28, a floor is at least 1 - 2^30. In 16 bits: with room =
// -int8_floor(0, L) <= kMostRoom, A_k + room <= 1 + 32766. So a sum that should survive, 0 <= A_k + room < 2^15, is kept modulo 2^16 as itself. One
// below -2^15 (d_k^2 > 2^16 + L) may look as if it survived: that costs time and nothing else.
constexpr int32_t kMostRoom = 32766;

// ---- 6. The float tests ---------------------------------------------------------------------------------------------------------------------------

// Operands of the product test: a_j = S (x_j - mu_j) rounded to fp32, bf16, fp16 or tf32; S a power of two that brings the norms near 1 (at 1e30
// products overflow, at 1e-30 they drown in the absolute error below). Some units flush subnormal operands (dpbf16), which would change a_j: pass
// every operand through this, and measure r_x (residual_bound) on what it returns.
PATCHCORE_HOST_DEVICE float flush_subnormal(float value) { return value > -0x1p-126f && value < 0x1p-126f ? 0.0f : value; }

// How a unit adds. kNearest: float32 operations rounded to nearest, in any order, fused or not, flushing subnormal results or not. kTruncating: a
// tensor core fed with fp16, bf16 or tf32 (not fp8, whose accumulators are shorter): blocks of at least 4 exact products are aligned with the
// accumulator to the largest exponent, cut to 24 bits, added, and cut again. That is what Fasi, Higham, Mikaitis and Pranesh ("Numerical behavior of
// NVIDIA tensor cores", PeerJ CS 2021) and Khattak and Mikaitis (arXiv:2512.07004) measured from V100 to B200; the maker promises nothing.
enum class Accumulation { kNearest, kTruncating };

// kappa with |A - (t - n_y / 2)| <= kappa B + (K + 2) 2^-124, B = ||a_x|| ||a_y|| + n_y / 2, where A is float_start(n_y) plus K products in float32
// and B < 2^126. kappa = m v / (1 - m v), m = K + 2 (nearest) or 3 (K + 2) (truncating). m v > 1/2 returns infinity: never skipped.
// Proof, nearest. Any order is a binary tree with K + 1 leaves: a leaf passes at most K additions. A product has one rounding more unless fused; the
// start has its conversion to float (v) and the float64 error of n_y, (K + 1) u <= v. So a leaf carries at most m = K + 2 factors (1 + e), |e| <= v,
// and the leaves' magnitudes sum to at most B (Cauchy-Schwarz): the error is at most ((1 - v)^-m - 1) B <= m v / (1 - m v) B. Each of the 2 K + 1
// operations may also lose up to 2^-126 when its result is subnormal, amplified by later factors of at most (1 - v)^-m <= 2: together less than
// (2 K + 1) 2^-125 < (K + 2) 2^-124. Partial sums stay below (1 + kappa) B <= 2 B < 2^127: no overflow.
// Proof, truncating. Let M bound every product and partial sum. A block of n >= 4 products cuts n + 1 addends at 2^-23 of the largest (or of a
// smaller unnormalised exponent) and the sum once, losing at most (n + 2) 2 v M; K / n blocks lose (K + 2 K / n) 2 v M <= 3 K v M; the start 2 v M:
// together at most m v M. By induction over the blocks M <= B + m v M, so M <= B / (1 - m v) and the error is at most m v / (1 - m v) B. Subnormal
// results as above. K counts the zero padding to whole blocks.
PATCHCORE_HOST_DEVICE double accumulation_error(int64_t depth, Accumulation accumulation) {
  const double mv = static_cast<double>((accumulation == Accumulation::kTruncating ? 3 : 1) * (depth + 2)) * 0x1p-24;
  return mv <= 0.5 ? inflate(mv / subtract(1.0, mv), 2) : INFINITY;
}

// The accumulator's start: the float nearest to -n_y / 2.
PATCHCORE_HOST_DEVICE float float_start(double squared_norm_y) { return static_cast<float>(-0.5 * squared_norm_y); }

// Lambda such that skipping A <= Lambda is sound. WRITE THE TEST AS "survives iff !(A <= Lambda)": a NaN on either side must survive. n_x, n_y: sums
// of squared operands in float64, any order; r_y, n_y may be a tile's maxima; depth = K; kappa = accumulation_error(depth, ...).
// Proof. ||a_x - a_y||^2 = n_x - 2 (t - n_y / 2) >= n_x - 2 A - 2 (kappa B + (K + 2) 2^-124), so it is >= R^2 if
//   A <= (n_x - R^2) / 2 - kappa B - (K + 2) 2^-124.
// Each piece is bounded on its safe side. Products of floats are exact in float64 and far from its limits (operands are 0 or in [2^-126, 2^128)), so
// the sums carry at most K factors: n_x (1 - (K + 2) 2^-52), rounded, is below the true n_x (as in `inflate`); B takes K / 2 factors from n_x and
// from n_y, then product, root and sum: inflate by K + 4. R^2 as in int8_skip_limit. The three subtractions err by less than 4 u (n_x + R^2 + error);
// 8 u times that is taken off and the float is rounded down. The error term is > 0 and over-estimated, so the inequality is strict: > R.
// B >= 2^126 or NaN gives NaN: a sum that overflowed may end at -infinity and must not be skipped. Otherwise every A is finite, and Lambda =
// -infinity (an infinite reach) skips nothing.
PATCHCORE_HOST_DEVICE float float_skip_limit(double reach, double residual_y, double squared_norm_x, double squared_norm_y, int64_t depth,
                                             double kappa) {
  if (reach < 0) return INFINITY;
  const double magnitude = inflate(add(rounded_root(multiply(squared_norm_x, squared_norm_y)), multiply(0.5, squared_norm_y)), depth + 4);
  if (!(magnitude < 0x1p126)) return NAN;
  const double radius = add(reach, residual_y);
  const double bound = inflate(multiply(radius, radius), 3);
  const double error = inflate(add(multiply(kappa, magnitude), static_cast<double>(depth + 2) * 0x1p-124), 2);
  const double low = multiply(squared_norm_x, 1.0 - static_cast<double>(depth + 2) * 0x1p-52);
  const double limit = subtract(multiply(0.5, subtract(low, bound)), error);
  return round_down_to_float(subtract(limit, multiply(0x1p-50, add(add(squared_norm_x, bound), error))));
}

// The difference test, for the few pairs before the canonical one: h = sum_j (x_j - y_j)^2 in float32 on the rows themselves, any order, fused or
// not. Returns the limit such that skipping h > limit is sound ("survives iff !(h > limit)").
// Proof. A term passes the difference (2 factors), the product and at most dim additions: m = dim + 3 factors (1 + e), |e| <= v. A subnormal product
// is too large by at most 2^-150, amplified by at most 2 (flushing it to zero is safe): h <= D^2 / (1 - m v) + dim 2^-149. So h > limit, with limit
// >= U2 (1 + 2 gamma) / (1 - m v) + dim 2^-148, gives D^2 > U2 (1 + 2 gamma) >= U2 / (1 - gamma), hence c > U2. If h overflows, the value that was
// rounded to infinity is above FLT_MAX, so the same inequality holds for it while limit <= FLT_MAX; a larger limit rounds up to infinity, and then
// nothing is skipped (comparing with U2 itself in float64 would skip everything at 1e30). Roundings: 1 + 2 gamma, product, quotient, sum: 4.
PATCHCORE_HOST_DEVICE float difference_skip_limit(double squared_distance, int64_t dim, double slack) {
  if (squared_distance < 0) return -INFINITY;
  const double mv = static_cast<double>(dim + 3) * 0x1p-24;
  if (!(mv <= 0.5)) return INFINITY;
  const double largest = multiply(squared_distance, add(1.0, multiply(2.0, slack))) / subtract(1.0, mv);
  return round_up_to_float(inflate(add(largest, static_cast<double>(dim) * 0x1p-148), 4));
}

// ---- 7. Contractions and the residual coordinate --------------------------------------------------------------------------------------------------

// Lemma. Let P be linear with sigma_max(P) <= 1 (enough: every row of |P P^T| sums to at most 1, by Gershgorin). With g(x)^2 = ||x||^2 - ||P x||^2,
// g(x) >= 0, the map x -> (P x, g(x)) does not enlarge distances. Proof. I - P^T P is positive semidefinite; let Q be its square root. Then
// ||Q x||^2 = x^T (I - P^T P) x = g(x)^2, so |g(x) - g(y)| <= ||Q (x - y)||, and ||P (x - y)||^2 + ||Q (x - y)||^2 = ||x - y||^2.
// (x stands for x - mu. The stored coordinate may be shifted by a constant. A prefix of an orthogonal rotation is such a P.)

// The computed coordinate: squared_norm = fl(||x - mu||^2), projected = fl(||z||^2) of the projection z AS COMPUTED; both in float64, any order.
PATCHCORE_HOST_DEVICE double residual_coordinate(double squared_norm, double projected_squared_norm) {
  const double difference = subtract(squared_norm, projected_squared_norm);
  return difference > 0 ? rounded_root(difference) : 0.0;
}

// A bound of |g - g*|, g = residual_coordinate(...) and g* the exact one. z_norm >= ||z||; delta >= ||z - P x||, the projection's own error; dim of
// x. A row's error in the theorem is E_x = delta + this one, and E = E_x + E_y.
// Proof. (i) |g^2 - g*^2| <= W. The projection gives | ||z||^2 - ||P x||^2 | <= delta (2 ||z|| + delta). The float64 sums carry at most dim + 3
// factors each (P has at most dim rows): (dim + 4) u (||x||^2 + ||z||^2). Clamping at 0 moves towards g*^2 >= 0. Difference and root: 4 u g^2. And
// ||x||^2 is at most (g^2 + ||z||^2) (1 + (dim + 8) u). Together less than 2 (dim + 8) u (g^2 + 2 ||z||^2), half of it slack for the second order.
// (ii) |g - g*| <= sqrt(W), because |g - g*|^2 <= |g - g*| (g + g*) = |g^2 - g*^2|.
// (iii) |g - g*| <= (W / 2g) (1 + W / g^2). Let q = W / g^2. Downwards, for q <= 1: 1 - sqrt(1 - q) = sum_k c_k q^k with c_1 = 1/2 and the other c_k
// > 0 of sum 1/2, so it is at most (q + q^2) / 2. Upwards: sqrt(1 + q) - 1 <= q / 2. For q > 1 use (ii): sqrt(q) <= (q + q^2) / 2.
// The smaller one is taken; for g = 0, (iii) is NaN or infinite and leaves (ii). Upwards matters: a row in the span of P has g* = 0 or tiny, and g
// may be 0 while g* = sqrt(W). Roundings: 5 in W, at most 15 on every path. 2^-800 covers squares that underflow and the domain of `inflate`.
PATCHCORE_HOST_DEVICE double residual_coordinate_error(double g, double z_norm, double delta, int64_t dim) {
  const double g_squares = multiply(g, g);
  const double rounding = multiply(static_cast<double>(dim + 8) * 0x1p-52, add(g_squares, multiply(2.0, multiply(z_norm, z_norm))));
  const double w = add(add(multiply(delta, add(multiply(2.0, z_norm), delta)), rounding), 0x1p-800);
  const double by_root = rounded_root(w);
  const double by_series = multiply(w / multiply(2.0, g), add(1.0, w / g_squares));
  return inflate(by_series < by_root ? by_series : by_root, 16);
}

// ---- 8. Integer contractions ----------------------------------------------------------------------------------------------------------------------

// P = A / 2^14 with A of int16, applied to y^ = the int16 steps nearest to y = clip(S (x - mu)). The product A y^ is exact: no bound is needed for
// it, and every machine has the same bits. What is left of section 7 is the rounding of y: with e = residual_bound(...) >= ||y - y^||,
//   ||(P y, g(y)) - (P y^, g(y^))|| <= e,   as the map of the lemma does not enlarge distances; and g(y^) is known to residual_coordinate_error(g,
// ||z||, 0, dim). So E_x = e + that error, in steps; S of the theorem is S times the codes per step.
// Range: every row of A has a norm of at most 2^14 (a row of P of at most 1), and ||y^|| <= sqrt(dim) m for steps clipped to [-m, m]. So
// |sum_j A_oj y^_j| <= 2^14 sqrt(dim) m < 2^31 for m = largest_step(dim). Partial sums may wrap around in 32 bits: the whole sum is right modulo
// 2^32 and in range. (No product of two pairs is -2^15 times -2^15: |A_oj| <= 2^14.)
//
// Codes of two steps. Where some coordinates are larger than the others, they are quantised by a step that is 2^b times as large: their codes c stand
// for a_j = 2^b c_j, and clip reaches to 127 * 2^b. Section 5 asks no more of a_x than that it is made of integers, and of clip that it enlarges no
// distance: squared norms and dot products of a are those of the codes, with 4^b times the part of these coordinates, and r_x = ||clip(S f) - a_x||
// as ever. Range: with b <= kMostCoarseBits and at most 1024 coordinates of each kind, ||a_x||^2 <= 127^2 * (16 * 1024 + 1025) < 2^29 and ||a_x -
// a_y||^2 < 2^31.
//
// Codes of steps. Where nothing is projected, the steps y^ themselves are cut to int8: with C = clip to +-127 * 2^b, code c_j = (y^_j + 2^(b - 1)) >>
// b within +-127. As C does not enlarge distances, ||C(y) - C(y^)|| <= e, so in units of 2^b steps r_x = (e + ||C(y^) - 2^b c||) / 2^b. The second
// norm squared is an integer: its terms are at most 2^(b - 1), squared and summed over kMaxFilterDim coordinates less than 2^31 for b <=
// kMostStepBits.
constexpr int kMostStepBits = 7;
struct StepCode {
  int32_t code;
  int32_t error;  // C(step) - 2^bits * code
};
PATCHCORE_HOST_DEVICE StepCode step_code(int32_t step, int bits) {
  const int32_t half = (1 << bits) >> 1, most = kMaxCode << bits;
  const int32_t nearest = (step + half) >> bits;  // >> floors
  const int32_t code = nearest > kMaxCode ? kMaxCode : (nearest < -kMaxCode ? -kMaxCode : nearest);
  const int32_t clipped = step > most ? most : (step < -most ? -most : step);
  return {code, clipped - code * (1 << bits)};
}

constexpr int kContractionBits = 14;
constexpr int kMostCoarseBits = 2;
PATCHCORE_HOST_DEVICE double largest_step(int64_t dim) {
  const double most = multiply(0.999, 131072.0 / rounded_root(static_cast<double>(dim)));
  return most < 16383 ? static_cast<double>(static_cast<int32_t>(most)) : 16383.0;
}

}  // namespace patchcore
