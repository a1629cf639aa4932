// Rows of features as int8 codes, all coordinates or a prefix of an integer contraction (filter.h, section 8): the bank's rows once, when it is
// prepared, and every block of queries on its way into the search.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/pieces.h"
#include "cpu/rows.h"

namespace patchcore {

constexpr int64_t kBlockQueries = 64;  // rows that are encoded, and searched for, together

// How coordinates come from features: x -> steps of `step_scale` about `center`, clipped, times an integer matrix.
struct IntegerProjection {
  int64_t dim = 0;
  int64_t outputs = 0;             // 0: no projection
  double step_scale = 1;           // steps per unit of distance
  const double* center = nullptr;  // [dim]
  const int16_t* tiles = nullptr;  // [ceil(outputs / 64)] tiles as Level::multiply_int16 wants them
};

inline int64_t pairs_of(int64_t dim) { return (dim + 1) / 2; }
inline int64_t padded_outputs(int64_t outputs) { return (outputs + kTileOperands - 1) / kTileOperands * kTileOperands; }

// One kind of codes: the first `outputs` of the projection, with the norm of the rest as one more coordinate; or, where outputs is 0, all coordinates
// of x - center, or of its steps. The codes of the first `coarse` coordinates, which are large, count 2^coarse_bits times as much (filter.h, section
// 8), and end with zeros on a multiple of 16 codes. Codes lie within +-most; the rows to be looked for have most + 1 added to theirs.
struct View {
  int64_t outputs = 0;
  int64_t coarse = 0;
  int64_t coarse_bits = 0;
  int64_t step_bits = 0;
  bool staged = false;      // scanned in stages (stages.h)
  bool from_steps = false;  // all coordinates, as steps cut to codes of 2^step_bits steps (filter.h, section 8)
  int32_t most = kMaxCode;
  double shift = 0;           // subtracted from the residual coordinate
  double scale = 1;           // codes per step, or per unit where there is no projection
  double codes_per_unit = 1;  // S of filter.h: not below the codes per unit of distance

  int64_t coordinates(int64_t dim) const { return outputs == 0 ? dim : outputs + 1; }
  int64_t coarse_words() const { return (coarse + 15) / 16 * 4; }
  int64_t words(int64_t dim) const { return coarse_words() + (coordinates(dim) - coarse + 3) / 4; }
};

// Memory of a block of rows on their way to codes.
struct EncoderMemory {
  int16_t* steps;       // [kBlockQueries, 2 * pairs], of the rows that were projected
  int32_t* products;    // [kBlockQueries, padded outputs]
  double* step_norms;   // [kBlockQueries], squared
  double* step_errors;  // [kBlockQueries], filter.h: e
  double* coordinates;  // [largest number of coordinates + 8]
};

EncoderMemory encoder_memory(int64_t dim, int64_t outputs, Pieces* pieces);

// One row's codes in a view.
struct RowCodes {
  int32_t squared_norm;
  double residual;  // r_x of filter.h, with S E_x in it
};

class Encoder {
 public:
  Encoder(const IntegerProjection& projection, const EncoderMemory& memory) : projection_(projection), memory_(memory) {}

  // Takes `count` <= kBlockQueries rows, which must stay where they are, and projects them if asked to: views with outputs need that. False when a
  // value is not finite.
  bool take(const FloatRows& rows, int64_t count, bool project);

  // Coordinates of row r in a view, and what their error adds to the residual, both in steps (or units).
  const double* coordinates(const View& view, int64_t r, double* error) const;

  // codes: [4 * view.words], code + view.most + 1.
  RowCodes encode(const View& view, int64_t r, uint8_t* codes) const;

 private:
  RowCodes encode_steps(const View& view, int64_t r, uint8_t* codes) const;

  const IntegerProjection& projection_;
  EncoderMemory memory_;
  FloatRows rows_ = {nullptr, 0};
};

}  // namespace patchcore
