#include "cpu/encoder.h"

#include <algorithm>
#include <cmath>

#include "filter.h"

namespace patchcore {

EncoderMemory encoder_memory(int64_t dim, int64_t outputs, Pieces* pieces) {
  EncoderMemory memory = {};
  if (outputs > 0) {
    memory.steps = pieces->take<int16_t>(kBlockQueries * 2 * pairs_of(dim));
    memory.products = pieces->take<int32_t>(kBlockQueries * padded_outputs(outputs));
  }
  memory.step_norms = pieces->take<double>(kBlockQueries);
  memory.step_errors = pieces->take<double>(kBlockQueries);
  memory.coordinates = pieces->take<double>(std::max(dim, outputs + 1) + 8);
  return memory;
}

bool Encoder::take(const FloatRows& rows, int64_t count, bool project) {
  rows_ = rows;
  const int64_t dim = projection_.dim, outputs = projection_.outputs, pairs = pairs_of(dim);
  const bool by_steps = project && outputs > 0;
  const double most = largest_step(dim);
  bool finite = true;
  for (int64_t r = 0; r < count; ++r) {
    finite &= level().all_finite(rows.data + r * rows.stride, dim);
    if (!by_steps) continue;
    int16_t* steps = memory_.steps + r * 2 * pairs;
    steps[2 * pairs - 1] = 0;  // beyond the last coordinate where dim is odd
    double error_squares;
    memory_.step_norms[r] =
        level().round_to_steps(rows.data + r * rows.stride, projection_.center, dim, projection_.step_scale, most, steps, &error_squares);
    memory_.step_errors[r] = residual_bound(error_squares, memory_.step_norms[r], dim);
  }
  for (int64_t o = 0; by_steps && o < outputs; o += kTileOperands) {
    level().multiply_int16(memory_.steps, 2 * pairs, count, projection_.tiles + o * 2 * pairs, pairs, outputs - o <= 32 ? 32 : kTileOperands,
                           memory_.products + o, padded_outputs(outputs));
  }
  return finite;
}

const double* Encoder::coordinates(const View& view, int64_t r, double* error) const {
  double* out = memory_.coordinates;
  if (view.outputs == 0) {
    for (int64_t j = 0; j < projection_.dim; ++j) out[j] = subtract(rows_.data[r * rows_.stride + j], projection_.center[j]);
    *error = 0;
    return out;
  }
  const int32_t* products = memory_.products + r * padded_outputs(projection_.outputs);
  double squares[4] = {};  // four sums side by side
  int64_t k = 0;
  for (; k + 4 <= view.outputs; k += 4) {
    for (int64_t l = 0; l < 4; ++l) {
      out[k + l] = products[k + l] * 0x1p-14;
      squares[l] += out[k + l] * out[k + l];
    }
  }
  for (; k < view.outputs; ++k) {
    out[k] = products[k] * 0x1p-14;
    squares[0] += out[k] * out[k];
  }
  const double squared_norm = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  const double g = residual_coordinate(memory_.step_norms[r], squared_norm);
  out[view.outputs] = subtract(g, view.shift);
  const double z_norm = inflate(std::sqrt(squared_norm), view.outputs + 4);
  const double shifted = inflate((g + std::abs(view.shift)) * 0x1p-53, 4);  // the rounding of g - shift
  *error = inflate(memory_.step_errors[r] + residual_coordinate_error(g, z_norm, 0, projection_.dim) + shifted, 4);
  return out;
}

RowCodes Encoder::encode_steps(const View& view, int64_t r, uint8_t* codes) const {
  const int64_t dim = projection_.dim;
  int32_t error_squares;
  const int32_t squared_norm = level().coarsen_steps(memory_.steps + r * 2 * pairs_of(dim), dim, view.step_bits, codes, &error_squares);
  for (int64_t k = dim; k < 4 * view.words(dim); ++k) codes[k] = kMaxCode + 1;
  const double steps = inflate(memory_.step_errors[r] + std::sqrt(static_cast<double>(error_squares)), 2);
  return {squared_norm, steps / static_cast<double>(1 << view.step_bits)};
}

RowCodes Encoder::encode(const View& view, int64_t r, uint8_t* codes) const {
  if (view.from_steps) return encode_steps(view, r, codes);
  const uint8_t zero = static_cast<uint8_t>(view.most + 1);
  double error, error_squares;
  const double* values = coordinates(view, r, &error);
  const int64_t count = view.coordinates(projection_.dim), begin = 4 * view.coarse_words();
  int32_t squared_norm = level().quantize(values + view.coarse, count - view.coarse, view.scale, view.most, codes + begin, &error_squares);
  for (int64_t k = begin + count - view.coarse; k < 4 * view.words(projection_.dim); ++k) codes[k] = zero;
  if (view.coarse > 0) {
    const double step = static_cast<double>(1 << view.coarse_bits);
    double coarse_squares;
    squared_norm += level().quantize(values, view.coarse, view.scale / step, view.most, codes, &coarse_squares) << 2 * view.coarse_bits;
    error_squares += step * step * coarse_squares;
    for (int64_t k = view.coarse; k < begin; ++k) codes[k] = zero;
  }
  return {squared_norm, inflate(residual_bound(error_squares, squared_norm, count) + view.scale * error, 2)};
}

}  // namespace patchcore
