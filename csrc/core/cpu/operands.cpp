#include "cpu/operands.h"

#include <algorithm>
#include <cstring>

#include "cpu/pieces.h"
#include "cpu/rows.h"
#include "filter.h"

namespace patchcore {

namespace {

Operands lay_out(int64_t capacity, int64_t dim, const Codes& first, const Codes& second, Pieces* pieces) {
  const int64_t tiles = num_tiles(capacity), padded = tiles * kTileOperands;
  Operands operands;
  operands.count = 0;
  operands.tiles = pieces->take<int8_t>(padded * 4 * first.words);
  operands.start = pieces->take<int32_t>(padded);
  operands.residuals = pieces->take<float>(padded);
  operands.tile_residuals = pieces->take<double>(tiles);
  operands.codes = pieces->take<int8_t>(capacity * 4 * second.words);
  operands.squared_norms = pieces->take<int32_t>(capacity);
  operands.biases = pieces->take<int32_t>(capacity);
  operands.code_residuals = pieces->take<float>(capacity);
  operands.rows = pieces->take<float>(capacity * dim);
  return operands;
}

// Signed codes of row r; returns what is added to the others' codes times their sum.
int32_t signed_codes(const Codes& codes, int64_t r, int8_t* out) {
  const uint8_t* in = codes.codes + r * 4 * codes.words;
  int32_t sum = 0;
  for (int64_t k = 0; k < 4 * codes.words; ++k) {
    out[k] = static_cast<int8_t>(in[k] - (codes.most + 1));
    sum += out[k];
  }
  return (codes.most + 1) * sum;
}

// Operand i, which is row r of all.
void gather_one(const Rows& rows, const Codes& first, const Codes& second, int64_t r, StartWith start, int64_t i, Operands* out) {
  int8_t* tile = out->tiles + i / kTileOperands * 4 * first.words * kTileOperands + i % kTileOperands * 4;
  const uint8_t* codes = first.codes + r * 4 * first.words;
  int32_t sum = 0;
  for (int64_t w = 0; w < first.words; ++w) {
    for (int64_t b = 0; b < 4; ++b) {
      const int8_t code = static_cast<int8_t>(codes[4 * w + b] - (first.most + 1));
      tile[w * 4 * kTileOperands + b] = code;
      sum += code;
    }
  }
  out->start[i] = (start == StartWith::kNorm ? int8_start(first.squared_norms[r]) : 0) - (first.most + 1) * sum;
  out->residuals[i] = first.residuals[r];
  out->biases[i] = signed_codes(second, r, out->codes + i * 4 * second.words);
  out->squared_norms[i] = second.squared_norms[r];
  out->code_residuals[i] = second.residuals[r];
  float* row = out->rows + i * rows.dim;
  const FloatRows widened = float_rows(rows, r, 1, row);
  if (widened.data != row) std::memcpy(row, widened.data, static_cast<size_t>(rows.dim) * sizeof(float));
}

}  // namespace

int64_t operands_bytes(int64_t capacity, int64_t dim, const Codes& first, const Codes& second) {
  Pieces pieces(nullptr);
  lay_out(capacity, dim, first, second, &pieces);
  return pieces.used();
}

Operands operands_at(int64_t capacity, int64_t dim, const Codes& first, const Codes& second, void* memory) {
  Pieces pieces(memory);
  return lay_out(capacity, dim, first, second, &pieces);
}

void gather_operands(const Rows& rows, const Codes& first, const Codes& second, const int64_t* which, int64_t count, StartWith start,
                     const Parallel& parallel, Operands* out) {
  const int64_t tiles = num_tiles(count), tile_bytes = 4 * first.words * kTileOperands;
  out->count = count;
  parallel([&](int64_t slot) {
    const Share share = share_of(tiles, slot, parallel.num_slots);
    for (int64_t t = share.begin; t < share.end; ++t) {
      const int64_t begin = t * kTileOperands, end = begin + kTileOperands, last = std::min(count, end);
      if (last < end) std::memset(out->tiles + t * tile_bytes, 0, static_cast<size_t>(tile_bytes));
      for (int64_t i = begin; i < last; ++i) gather_one(rows, first, second, which[i], start, i, out);
      std::fill(out->start + last, out->start + end, kInt8PaddingStart);
      std::fill(out->residuals + last, out->residuals + end, 0.0f);
      out->tile_residuals[t] = *std::max_element(out->residuals + begin, out->residuals + end);
    }
  });
}

}  // namespace patchcore
