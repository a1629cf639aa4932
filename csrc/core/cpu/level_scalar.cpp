// The portable level: the definition itself (distance.h). Every other level must equal it bit for bit.
#include <cstring>

#include "cpu/dispatch.h"
#include "distance.h"

namespace patchcore {

namespace {

void squared_distances(const float* query, const float* rows, int64_t stride, int64_t count, int64_t dim, double* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = squared_distance(query, rows + i * stride, dim);
}

float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float widen_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0x1f) return float_from_bits(sign | 0x7f800000u | mantissa << 13);  // infinity, NaN
  if (exponent != 0) return float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * float_from_bits(103u << 23);  // subnormal: mantissa * 2^-24, exact
  return sign != 0 ? -magnitude : magnitude;
}

void float16_to_float(const uint16_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = widen_float16(in[i]);
}

void bfloat16_to_float(const uint16_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = float_from_bits(static_cast<uint32_t>(in[i]) << 16);
}

}  // namespace

const Level kScalarLevel = {"scalar", squared_distances, float16_to_float, bfloat16_to_float};

}  // namespace patchcore
