#include "cpu/bank_layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/stages.h"
#include "filter.h"

namespace patchcore {

namespace {

constexpr int64_t kMostOutputs = 1024;  // of a prefix

void lay_out_tiles(const View& view, int64_t count, int64_t dim, Pieces* pieces, TileFilter* filter) {
  filter->view = view;
  filter->words = view.words(dim);
  filter->tiles = pieces->take<int8_t>(tiles_of(count) * filter->words * 4 * kTileOperands);
  if (view.staged) {
    filter->stage_starts = pieces->take<char>(tiles_of(count) * num_stages(4 * filter->words) * kTileOperands * level().stage_bytes);
  } else {
    filter->start = pieces->take<int32_t>(tiles_of(count) * kTileOperands);
  }
  filter->tile_residuals = pieces->take<double>(tiles_of(count));
}

bool rows_are_contraction(const int16_t* matrix, int64_t outputs, int64_t dim) {
  for (int64_t a = 0; a < outputs; ++a) {
    int64_t sum = 0;
    for (int64_t b = 0; b < outputs; ++b) {
      int64_t product = 0;
      for (int64_t j = 0; j < dim; ++j) product += matrix[a * dim + j] * matrix[b * dim + j];
      sum += product < 0 ? -product : product;
    }
    if (sum > int64_t{1} << (2 * kContractionBits)) return false;
  }
  return true;
}

}  // namespace

PreparedBank lay_out(const BankHeader& header, Pieces* pieces) {
  PreparedBank bank;
  bank.count = header.count;
  bank.dim = header.dim;
  bank.prefix_first = header.prefix_first != 0;
  const int64_t outputs = header.short_outputs + header.long_outputs;
  pieces->take<BankHeader>(1);
  double* center = pieces->take<double>(header.dim);
  int16_t* tiles = outputs > 0 ? pieces->take<int16_t>(padded_outputs(outputs) * 2 * pairs_of(header.dim)) : nullptr;
  bank.projection = {header.dim, outputs, header.step_scale, center, tiles};
  bank.order = pieces->take<int32_t>(tiles_of(header.count) * kTileOperands);
  lay_out_tiles(header.full, header.count, header.dim, pieces, &bank.full);
  if (outputs > 0) {
    lay_out_tiles(header.prefix, header.count, header.dim, pieces, &bank.prefix);
    bank.places = pieces->take<int32_t>(header.count);
    bank.second.view = header.second;
    bank.second.words = header.second.words(header.dim);
    const int64_t padded = tiles_of(header.count) * kTileOperands;  // so that no place in the tiles lies outside, whatever `start` says
    bank.second.codes = pieces->take<int8_t>(padded * 4 * bank.second.words);
    bank.second.offsets = pieces->take<int32_t>(padded);
    bank.second.residuals = pieces->take<float>(padded);
    bank.second.largest_residual = header.largest_residual;
  }
  return bank;
}

BankHeader header_of(const Rows& bank, const BankRotation& rotation) { return header_of(bank, rotation, bank.count >= level().fewest_staged_rows); }

BankHeader header_of(const Rows& bank, const BankRotation& rotation, bool staged) {
  BankHeader header = {};
  header.count = bank.count;
  header.dim = bank.dim;
  header.short_outputs = rotation.short_outputs;
  header.long_outputs = rotation.short_outputs == 0 ? 0 : rotation.long_outputs;
  header.step_scale = 1;
  header.full.most = header.prefix.most = level().scanned_code;
  header.prefix.outputs = header.short_outputs;
  header.prefix.staged = staged;
  header.second.from_steps = header.long_outputs == 0;
  if (header.second.from_steps) return header;
  header.second.outputs = header.short_outputs + header.long_outputs;
  header.second.coarse = staged ? std::min(header.short_outputs, kStageCodes[0]) : header.short_outputs;  // the largest, in coarser steps
  return header;
}

bool is_contraction(const BankRotation& rotation, int64_t dim) {
  return rotation.short_outputs <= kMostOutputs && rotation.long_outputs <= kMostOutputs &&
         rows_are_contraction(rotation.matrix, rotation.short_outputs + rotation.long_outputs, dim);  // and so is the beginning of it
}

int64_t prepared_bank_bytes(const Rows& bank, const BankRotation& rotation) {
  Pieces pieces(nullptr);
  lay_out(header_of(bank, rotation), &pieces);
  return pieces.used();
}

bool prepared_bank_fits(const Rows& bank, const void* prepared, int64_t bytes) {
  BankHeader header;
  if (bytes < static_cast<int64_t>(sizeof(BankHeader))) return false;
  std::memcpy(&header, prepared, sizeof(BankHeader));
  // Levels whose codes are as large run each other's banks, in stages or not.
  const BankHeader expected = header_of(bank, {nullptr, header.short_outputs, header.long_outputs, nullptr, nullptr}, header.prefix.staged);
  const auto usable = [](const View& view, const View& like) {
    return view.outputs == like.outputs && view.coarse == like.coarse && view.staged == like.staged && view.from_steps == like.from_steps &&
           view.step_bits >= 0 && view.step_bits <= kMostStepBits && view.most == like.most && view.coarse_bits >= 0 &&
           view.coarse_bits <= kMostCoarseBits && view.scale > 0 && view.codes_per_unit > 0 && view.codes_per_unit < INFINITY;
  };
  if (bank.dim > kMaxFilterDim || header.count != bank.count || header.dim != bank.dim || header.short_outputs < 0 || header.long_outputs < 0 ||
      header.short_outputs > kMostOutputs || header.long_outputs > kMostOutputs || !usable(header.full, expected.full))
    return false;
  if (header.short_outputs > 0 && !(usable(header.prefix, expected.prefix) && usable(header.second, expected.second))) return false;
  Pieces pieces(const_cast<void*>(prepared));
  const PreparedBank inside = lay_out(header, &pieces);
  if (bytes != pieces.used()) return false;
  bool good = true;  // what is used as an index
  for (int64_t i = 0; i < tiles_of(bank.count) * kTileOperands; ++i) good &= inside.order[i] >= 0 && inside.order[i] < bank.count;
  for (int64_t i = 0; inside.places != nullptr && i < bank.count; ++i) good &= inside.places[i] >= 0 && inside.places[i] < bank.count;
  return good;
}

PreparedBank prepared_bank_at(const void* prepared) {
  BankHeader header;
  std::memcpy(&header, prepared, sizeof(BankHeader));
  Pieces pieces(const_cast<void*>(prepared));  // read only: PreparedBank serves the packer as well
  return lay_out(header, &pieces);
}

}  // namespace patchcore
