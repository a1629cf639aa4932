// The portable level: the definition itself (distance.h). Every other level must equal it bit for bit.
#include <cstring>

#include "cpu/stages.h"
#include "distance.h"
#include "filter.h"

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

int32_t dot(const uint8_t* row, const int8_t* operand, int64_t operand_step, int64_t words) {
  int32_t sum = 0;
  for (int64_t w = 0; w < words; ++w) {
    for (int64_t b = 0; b < 4; ++b) sum += row[4 * w + b] * operand[w * operand_step + b];
  }
  return sum;
}

uint64_t scan_tile(const uint8_t* row, const int8_t* tile, const int32_t* start, int64_t words, const int32_t* floors, int32_t offset) {
  uint64_t survivors = 0;
  for (int64_t o = 0; o < kTileOperands; ++o) {
    const int32_t value = start[o] + dot(row, tile + 4 * o, 4 * kTileOperands, words);
    survivors |= static_cast<uint64_t>(value >= floors[o] + offset) << o;
  }
  return survivors;
}

void scan_rows(const uint8_t* rows, int64_t stride, int64_t count, const int8_t* tiles, const int32_t* starts, int64_t num_tiles, int64_t words,
               const int32_t* floors, uint64_t* survivors, int64_t mask_stride) {
  for (int64_t t = 0; t < num_tiles; ++t, tiles += 4 * words * kTileOperands, starts += kTileOperands, ++survivors) {
    for (int64_t r = 0; r < count; ++r) {
      uint64_t left = 0;
      for (int64_t o = 0; o < kTileOperands; ++o) {
        const int32_t value = starts[o] + dot(rows + r * stride, tiles + 4 * o, 4 * kTileOperands, words);
        left |= static_cast<uint64_t>(value >= floors[r]) << o;
      }
      survivors[r * mask_stride] = left;
    }
  }
}

void scan_stages(const uint8_t* rows, int64_t stride, int64_t count, const void* row_starts, const int8_t* tiles, const void* starts,
                 int64_t num_tiles, int64_t words, const int32_t* floors, uint64_t* survivors, int64_t mask_stride) {
  const int32_t* tile_starts = static_cast<const int32_t*>(starts);
  const int64_t stages = num_stages(4 * words);
  for (int64_t t = 0; t < num_tiles; ++t, tiles += 4 * words * kTileOperands, tile_starts += stages * kTileOperands) {
    for (int64_t r = 0; r < count; ++r) {
      uint64_t left = 0;
      for (int64_t o = 0; o < kTileOperands; ++o) {
        int32_t sum = -floors[r];
        for (int64_t stage = 0, w = 0; stage < stages && (stage == 0 || sum >= 0); ++stage) {
          const int64_t end = stage_end(stage, 4 * words) / 4;
          sum += static_cast<const int32_t*>(row_starts)[stage * kTileOperands + r] + tile_starts[stage * kTileOperands + o] +
                 dot(rows + r * stride + 4 * w, tiles + (w * kTileOperands + o) * 4, 4 * kTileOperands, end - w);
          w = end;
        }
        left |= static_cast<uint64_t>(sum >= 0) << o;
      }
      survivors[r * mask_stride + t] = left;
    }
  }
}

void dots(const uint8_t* row, const int8_t* operands, int64_t stride, const int32_t* which, int64_t count, int64_t words, int64_t coarse,
          int64_t shift, int32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int8_t* operand = operands + which[i] * stride;
    out[i] = dot(row, operand, 4, coarse) * (1 << shift) + dot(row + 4 * coarse, operand + 4 * coarse, 4, words - coarse);
  }
}

void int8_floors(const double* reach, const int32_t* squared_norms, int64_t count, double residual, int32_t* floors) {
  for (int64_t r = 0; r < count; ++r) floors[r] = int8_floor(squared_norms[r], int8_skip_limit(reach[r], residual));
}

int64_t first_largest(const double* values, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; ++i) best = values[i] > values[best] ? i : best;
  return best;
}

int32_t quantize(const double* coordinates, int64_t count, double scale, int32_t most, uint8_t* codes, double* error_squares) {
  int32_t squared_norm = 0;
  double errors = 0;
  for (int64_t k = 0; k < count; ++k) {
    const Int8Code code = int8_code(multiply(scale, coordinates[k]), most);
    codes[k] = static_cast<uint8_t>(most + 1 + code.code);
    squared_norm += code.code * code.code;
    errors += code.error * code.error;
  }
  *error_squares = errors;
  return squared_norm;
}

void multiply_matrix(const double* x, const double* matrix, int64_t dim, int64_t outputs, double* products) {
  for (int64_t o = 0; o < outputs; ++o) products[o] = 0;
  for (int64_t k = 0; k < dim; ++k) {
    for (int64_t o = 0; o < outputs; ++o) products[o] = add(products[o], multiply(x[k], matrix[k * outputs + o]));
  }
}

void multiply_int16(const int16_t* rows, int64_t stride, int64_t count, const int16_t* tile, int64_t pairs, int64_t outputs, int32_t* products,
                    int64_t products_stride) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t o = 0; o < outputs; ++o) {
      uint32_t sum = 0;  // wraps
      for (int64_t j = 0; j < 2 * pairs; ++j) {
        sum += static_cast<uint32_t>(rows[r * stride + j] * tile[(j / 2 * kTileOperands + o) * 2 + j % 2]);
      }
      products[r * products_stride + o] = static_cast<int32_t>(sum);
    }
  }
}

double round_to_steps(const float* x, const double* center, int64_t count, double scale, double most, int16_t* steps, double* error_squares) {
  double squared_norm = 0, errors = 0;
  for (int64_t j = 0; j < count; ++j) {
    const RoundedCode rounded = rounded_code(scaled_coordinate(x[j], center[j], scale), most);
    steps[j] = static_cast<int16_t>(rounded.code);
    squared_norm += rounded.code * rounded.code;
    errors += rounded.error * rounded.error;
  }
  *error_squares = errors;
  return squared_norm;
}

int32_t coarsen_steps(const int16_t* steps, int64_t count, int64_t bits, uint8_t* codes, int32_t* error_squares) {
  int32_t squared_norm = 0, errors = 0;
  for (int64_t j = 0; j < count; ++j) {
    const StepCode code = step_code(steps[j], static_cast<int>(bits));
    codes[j] = static_cast<uint8_t>(kMaxCode + 1 + code.code);
    squared_norm += code.code * code.code;
    errors += code.error * code.error;
  }
  *error_squares = errors;
  return squared_norm;
}

int64_t take_marked(const uint64_t* words, int64_t count, int32_t first, int32_t* found) {
  int64_t taken = 0;
  for (int64_t m = 0; m < count; ++m) {
    for (uint64_t left = words[m]; left != 0; left &= left - 1) found[taken++] = first + static_cast<int32_t>(64 * m) + __builtin_ctzll(left);
  }
  return taken;
}

bool all_finite(const float* values, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i] - values[i];
  return sum == 0;
}

float squared_difference(const float* a, const float* b, int64_t dim) {
  float sum = 0;
  for (int64_t j = 0; j < dim; ++j) sum += (a[j] - b[j]) * (a[j] - b[j]);
  return sum;
}

}  // namespace

const Level kScalarLevel = {"scalar",
                            kMaxCode,
                            squared_distances,
                            float16_to_float,
                            bfloat16_to_float,
                            scan_rows,
                            4,
                            kAlwaysStaged,
                            4,
                            scan_stages,
                            scan_tile,
                            dots,
                            int8_floors,
                            first_largest,
                            quantize,
                            multiply_matrix,
                            multiply_int16,
                            round_to_steps,
                            coarsen_steps,
                            all_finite,
                            take_marked,
                            squared_difference,
                            {1.25, 5, 0.5, 0.9}};

}  // namespace patchcore
