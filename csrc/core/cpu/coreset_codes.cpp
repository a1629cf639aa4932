// The int8 copy of the rows that the batched coreset works with: a header, the codes of the prefix where there is one, the codes of all coordinates.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "coreset.h"
#include "cpu/codes.h"
#include "cpu/dispatch.h"
#include "filter.h"

namespace patchcore {

namespace {

struct Header {
  double prefix_scale, full_scale;
  int64_t prefix_words, full_words;  // no prefix: 0 words
  int32_t most;                      // both kinds of codes lie within +-most: level().scanned_code
  char padding[28];
};
static_assert(sizeof(Header) == 64, "the codes behind the header must stay aligned");

// What the filter's arithmetic relies on: a usable scale, norms of int8 codes, residuals that are numbers.
bool plausible(const Codes& codes, int64_t count) {
  const int64_t largest_norm = int64_t{kMaxCode} * kMaxCode * 4 * codes.words;
  bool good = codes.scale > 0 && codes.scale < INFINITY && codes.most == level().scanned_code;
  for (int64_t r = 0; r < count; ++r) good &= codes.squared_norms[r] >= 0 && codes.squared_norms[r] <= largest_norm && codes.residuals[r] >= 0;
  return good;
}

}  // namespace

int64_t coreset_codes_bytes(const Rows& rows, const CoresetRotation& rotation) {
  const int64_t prefix = rotation.outputs == 0 ? 0 : codes_bytes(rows.count, code_words(rotation.outputs + 1));
  return static_cast<int64_t>(sizeof(Header)) + prefix + codes_bytes(rows.count, code_words(rows.dim));
}

int64_t coreset_codes_workspace_bytes(const Rows& rows, const CoresetRotation& rotation, const Parallel& parallel) {
  return pack_codes_workspace_bytes(rows, std::max(rows.dim, rotation.columns + 1), parallel);
}

void pack_coreset_codes_cpu(const Rows& rows, const CoresetRotation& rotation, const Parallel& parallel, void* workspace, void* codes) {
  Header header = {};
  header.most = level().scanned_code;
  char* memory = static_cast<char*>(codes) + sizeof(Header);
  if (rotation.outputs > 0) {
    header.prefix_words = code_words(rotation.outputs + 1);
    Codes prefix = codes_at(rows.count, header.prefix_words, 1, header.most, memory);
    const Contraction contraction = {rows.dim, rotation.outputs, rotation.columns, rotation.matrix};
    pack_codes_cpu(rows, rotation.center, &contraction, parallel, workspace, &prefix);
    header.prefix_scale = prefix.scale;
    memory += codes_bytes(rows.count, header.prefix_words);
  }
  header.full_words = code_words(rows.dim);
  Codes full = codes_at(rows.count, header.full_words, 1, header.most, memory);
  pack_codes_cpu(rows, rotation.center, nullptr, parallel, workspace, &full);
  header.full_scale = full.scale;
  std::memcpy(codes, &header, sizeof(Header));
}

void coreset_codes_inside(const Rows& rows, const void* codes, Codes* prefix, Codes* full) {
  Header header;
  std::memcpy(&header, codes, sizeof(Header));
  char* memory = const_cast<char*>(static_cast<const char*>(codes)) + sizeof(Header);  // read only: Codes serves the packer as well
  if (header.prefix_words > 0) {
    *prefix = codes_at(rows.count, header.prefix_words, header.prefix_scale, header.most, memory);
    memory += codes_bytes(rows.count, header.prefix_words);
  }
  *full = codes_at(rows.count, header.full_words, header.full_scale, header.most, memory);
}

bool coreset_codes_fit(const Rows& rows, const void* codes, int64_t bytes) {
  Header header;
  if (bytes < static_cast<int64_t>(sizeof(Header))) return false;
  std::memcpy(&header, codes, sizeof(Header));
  if (rows.dim > kMaxFilterDim || header.full_words != code_words(rows.dim) || header.prefix_words < 0 || header.prefix_words > header.full_words)
    return false;
  const int64_t prefix_bytes = header.prefix_words == 0 ? 0 : codes_bytes(rows.count, header.prefix_words);
  if (bytes != static_cast<int64_t>(sizeof(Header)) + prefix_bytes + codes_bytes(rows.count, header.full_words)) return false;
  Codes prefix, full;
  coreset_codes_inside(rows, codes, &prefix, &full);
  return plausible(full, rows.count) && (prefix.words == 0 || plausible(prefix, rows.count));
}

}  // namespace patchcore
