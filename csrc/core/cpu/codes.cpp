#include "cpu/codes.h"

#include <algorithm>
#include <cmath>

#include "cpu/float_environment.h"
#include "cpu/rows.h"
#include "filter.h"

namespace patchcore {

namespace {

constexpr int64_t kSampleRows = 2048;
constexpr int64_t kScalePercentile = 80;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// One slot's workspace: the centred row, its coordinates, the widened row.
struct Slot {
  double* centered;     // [dim]
  double* coordinates;  // [coordinates + 8]
  float* widened;       // [dim]
};

int64_t slot_doubles(const Rows& rows, int64_t coordinates) { return rows.dim + coordinates + 8 + (float_scratch(rows, 1) + 1) / 2; }

Slot slot_of(const Rows& rows, int64_t coordinates, void* workspace, int64_t slot) {
  double* begin = static_cast<double*>(workspace) + kSampleRows + slot * slot_doubles(rows, coordinates);
  return {begin, begin + rows.dim, reinterpret_cast<float*>(begin + rows.dim + coordinates + 8)};
}

struct Packer {
  const Rows& rows;
  const double* center;
  const Contraction* contraction;
  int64_t coordinates;
  double residual_center = 0;  // subtracted from the residual coordinate, a constant

  // Coordinates of row r; returns E_x, the error of the contraction (filter.h, section 7), 0 without one.
  double evaluate(int64_t r, const Slot& slot) const {
    const float* x = float_rows(rows, r, 1, slot.widened).data;
    if (contraction == nullptr) {
      for (int64_t j = 0; j < rows.dim; ++j) slot.coordinates[j] = subtract(x[j], center[j]);
      return 0;
    }
    double squared_norm = 0, projected_squared_norm = 0;
    for (int64_t j = 0; j < rows.dim; ++j) {
      slot.centered[j] = subtract(x[j], center[j]);
      squared_norm += slot.centered[j] * slot.centered[j];
    }
    level().multiply_matrix(slot.centered, contraction->matrix, rows.dim, contraction->columns, slot.coordinates);
    for (int64_t k = 0; k < contraction->outputs; ++k) projected_squared_norm += slot.coordinates[k] * slot.coordinates[k];
    const double g = residual_coordinate(squared_norm, projected_squared_norm);
    slot.coordinates[contraction->outputs] = subtract(g, residual_center);
    // The projection's error. A product of dim terms errs by (dim + 1) u sum |p_j| |x_j| <= (dim + 1) u ||p|| ||x||, the centring by u more; ||p|| <=
    // 1 for each of the outputs, whose errors add as squares. The norm of x is known to (dim + 2) u.
    const double x_norm = inflate(std::sqrt(squared_norm), rows.dim + 4);
    const double delta = inflate(std::sqrt(static_cast<double>(contraction->outputs)) * static_cast<double>(rows.dim + 4) * 0x1p-53 * x_norm, 8);
    const double z_norm = inflate(std::sqrt(projected_squared_norm), contraction->outputs + 4);
    // residual_center is subtracted once more: a rounding of u |g - residual_center|, less than u (|g| + |residual_center|).
    const double shift = inflate((g + std::abs(residual_center)) * 0x1p-53, 4);
    return inflate(delta + residual_coordinate_error(g, z_norm, delta, rows.dim) + shift, 4);
  }

  // Largest magnitude of a row's coordinates.
  double largest(const Slot& slot) const {
    double most = 0;
    for (int64_t k = 0; k < coordinates; ++k) most = std::max(most, std::abs(slot.coordinates[k]));
    return most;
  }

  // Codes of row r, whose coordinates `slot` holds.
  void quantize(int64_t r, double error, const Slot& slot, Codes* out) const {
    uint8_t* codes = out->codes + r * 4 * out->words;
    double error_squares;
    const int32_t squared_norm = level().quantize(slot.coordinates, coordinates, out->scale, out->most, codes, &error_squares);
    for (int64_t k = coordinates; k < 4 * out->words; ++k) codes[k] = static_cast<uint8_t>(out->most + 1);
    out->squared_norms[r] = squared_norm;
    out->residuals[r] = round_up_to_float(inflate(residual_bound(error_squares, squared_norm, coordinates) + out->scale * error, 2));
  }
};

}  // namespace

int64_t codes_bytes(int64_t num_rows, int64_t words) { return aligned(num_rows * 4 * words) + 2 * aligned(num_rows * 4); }

Codes codes_at(int64_t num_rows, int64_t words, double scale, int32_t most, void* memory) {
  char* bytes = static_cast<char*>(memory);
  char* norms = bytes + aligned(num_rows * 4 * words);
  return {words,
          scale,
          most,
          reinterpret_cast<uint8_t*>(bytes),
          reinterpret_cast<int32_t*>(norms),
          reinterpret_cast<float*>(norms + aligned(num_rows * 4))};
}

int64_t pack_codes_workspace_bytes(const Rows& rows, int64_t coordinates, const Parallel& parallel) {
  return (kSampleRows + parallel.num_slots * slot_doubles(rows, coordinates)) * static_cast<int64_t>(sizeof(double));
}

void pack_codes_cpu(const Rows& rows, const double* center, const Contraction* contraction, const Parallel& parallel, void* workspace, Codes* out) {
  const FloatEnvironment ieee;  // the sample is taken on the caller's thread
  const int64_t coordinates = contraction == nullptr ? rows.dim : contraction->outputs + 1;
  Packer packer = {rows, center, contraction, coordinates};
  double* sample = static_cast<double*>(workspace);
  const int64_t step = std::max<int64_t>(1, rows.count / kSampleRows);
  int64_t num_sampled = 0;
  const Slot first = slot_of(rows, coordinates, workspace, 0);
  if (contraction != nullptr) {
    double sum = 0;
    for (int64_t r = 0; r < rows.count && num_sampled < kSampleRows; r += step, ++num_sampled) {
      packer.evaluate(r, first);
      sum += first.coordinates[contraction->outputs];
    }
    packer.residual_center = sum / static_cast<double>(num_sampled);
    num_sampled = 0;
  }
  for (int64_t r = 0; r < rows.count && num_sampled < kSampleRows; r += step) {
    packer.evaluate(r, first);
    sample[num_sampled++] = packer.largest(first);
  }
  double* percentile = sample + (num_sampled - 1) * kScalePercentile / 100;
  std::nth_element(sample, percentile, sample + num_sampled);
  out->scale = int8_scale(*percentile) * out->most / kMaxCode;
  parallel([&](int64_t s) {
    const Slot slot = slot_of(rows, coordinates, workspace, s);
    const Share share = share_of(rows.count, s, parallel.num_slots);
    for (int64_t r = share.begin; r < share.end; ++r) {
      const double error = packer.evaluate(r, slot);
      packer.quantize(r, error, slot, out);
    }
  });
}

}  // namespace patchcore
