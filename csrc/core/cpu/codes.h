// Int8 copies of feature rows for the filters (filter.h): all coordinates, or a short prefix of a rotation with the norm of the rest as one more
// coordinate.
#pragma once

#include "filter.h"
#include "parallel.h"
#include "types.h"

namespace patchcore {

// A linear contraction: projected = matrix^T (x - center). Its largest singular value must not exceed 1 (see filter.h, section 7).
struct Contraction {
  int64_t dim;
  int64_t outputs;
  int64_t columns;       // outputs rounded up to a multiple of 8
  const double* matrix;  // [dim, columns]; columns beyond `outputs` are zero
};

// Codes of N rows. A row is `words` groups of four codes; missing coordinates have code 0.
struct Codes {
  int64_t words = 0;
  double scale = 1;                  // codes per unit of distance: S of filter.h
  int32_t most = kMaxCode;           // codes lie within +-most
  uint8_t* codes = nullptr;          // [N, 4 * words], code + most + 1
  int32_t* squared_norms = nullptr;  // [N]
  float* residuals = nullptr;        // [N], in codes; contains the row's share S E_x of the contraction's error
};

// Words of a row of `coordinates` coordinates.
inline int64_t code_words(int64_t coordinates) { return (coordinates + 3) / 4; }

// Bytes of the three arrays for `num_rows` rows, and where they lie in `memory` (64-byte aligned).
int64_t codes_bytes(int64_t num_rows, int64_t words);
Codes codes_at(int64_t num_rows, int64_t words, double scale, int32_t most, void* memory);

int64_t pack_codes_workspace_bytes(const Rows& rows, int64_t coordinates, const Parallel& parallel);

// Quantises all rows about `center` [dim] and sets out->scale. contraction == nullptr: coordinates are those of x - center (words = code_words(dim)).
// Else: the contraction's outputs and the residual coordinate (words = code_words(outputs + 1)).
// The scale is chosen from a sample of rows: it puts the 80th percentile of the rows' largest coordinates at the largest code. Rows beyond are
// clipped, which is sound (filter.h) and measured better than a higher percentile.
void pack_codes_cpu(const Rows& rows, const double* center, const Contraction* contraction, const Parallel& parallel, void* workspace, Codes* out);

// The copies that pack_coreset_codes_cpu (coreset.h) put into `codes`; prefix->words is 0 where there is none.
void coreset_codes_inside(const Rows& rows, const void* codes, Codes* prefix, Codes* full);

}  // namespace patchcore
