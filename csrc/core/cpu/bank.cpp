#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/bank_layout.h"
#include "cpu/float_environment.h"
#include "cpu/search.h"
#include "cpu/stage_starts.h"
#include "filter.h"

namespace patchcore {

namespace {

constexpr int64_t kSampleRows = 2048;
constexpr double kStepPercentile = 0.999;  // steps are fine enough to spare some; clipping would blunt the bound
constexpr double kCodePercentile = 0.8;    // filter.h, int8_scale
constexpr double kStepOverflow = 1.4;      // what the largest coordinate of most rows may exceed the codes of steps by; measured on ResNet18 features
constexpr double kNormPercentile = 0.95;   // of rows that a scan in stages has a scale for

// One slot's memory while packing.
struct Slot {
  EncoderMemory encoder;
  float* widened;  // [dim]
  float* rows;     // [kBlockQueries, dim], gathered
  uint8_t* codes;  // of one row
};

Slot slot_at(const Rows& bank, int64_t outputs, Pieces* pieces) {
  Slot slot = {};
  slot.encoder = encoder_memory(bank.dim, outputs, pieces);
  slot.widened = pieces->take<float>(float_scratch(bank, 1));
  slot.rows = pieces->take<float>(kBlockQueries * bank.dim);
  slot.codes = pieces->take<uint8_t>(std::max(bank.dim, outputs) + 72);
  return slot;
}

// Copies rows which[0 .. count) of the bank to slot.rows.
FloatRows gather(const Rows& bank, const int32_t* which, int64_t count, const Slot& slot) {
  for (int64_t i = 0; i < count; ++i) {
    const FloatRows row = float_rows(bank, which[i], 1, slot.widened);
    std::memcpy(slot.rows + i * bank.dim, row.data, static_cast<size_t>(bank.dim) * sizeof(float));
  }
  return {slot.rows, bank.dim};
}

double percentile(double* values, int64_t count, double share) {
  double* at = values + static_cast<int64_t>(static_cast<double>(count - 1) * share);
  std::nth_element(values, at, values + count);
  return *at;
}

struct Packer {
  const Rows& rows;
  const Parallel& parallel;
  PreparedBank bank;
  BankHeader* header;
  double* sample;        // [kSampleRows]
  const int32_t* order;  // [count]
  char* slots;
  int64_t slot_bytes;
  double largest_coordinate = 0;  // of most rows

  Slot slot(int64_t s) const {
    Pieces pieces(slots + s * slot_bytes);
    return slot_at(rows, bank.projection.outputs, &pieces);
  }

  // Calls visit(encoder, row, index in the sample, index in the encoder's block) for the rows of a sample; returns their number.
  template <class F>
  int64_t sample_rows(F&& visit) const {
    const Slot memory = slot(0);
    const int64_t step = std::max<int64_t>(1, rows.count / kSampleRows), total = std::min(kSampleRows, (rows.count + step - 1) / step);
    for (int64_t begin = 0; begin < total; begin += kBlockQueries) {
      const int64_t count = std::min(kBlockQueries, total - begin);
      int32_t which[kBlockQueries];
      for (int64_t i = 0; i < count; ++i) which[i] = static_cast<int32_t>((begin + i) * step);
      Encoder encoder(bank.projection, memory.encoder);
      const FloatRows block = gather(rows, which, count, memory);
      encoder.take(block, count, true);
      for (int64_t i = 0; i < count; ++i) visit(encoder, block.data + i * block.stride, begin + i, i);
    }
    return total;
  }

  void choose_step_scale() {
    const int64_t count = sample_rows([&](const Encoder&, const float* row, int64_t index, int64_t) {
      double most = 0;
      for (int64_t j = 0; j < rows.dim; ++j) most = std::max(most, std::abs(row[j] - bank.projection.center[j]));
      sample[index] = most;
    });
    const double magnitude = percentile(sample, count, kStepPercentile);
    largest_coordinate = percentile(sample, count, kCodePercentile);
    // As int8_scale (filter.h): any scale is sound, and that of a usable magnitude keeps products in range.
    header->step_scale = magnitude >= 0x1p-150 && magnitude <= 0x1p130 ? largest_step(rows.dim) / magnitude : 1.0;
    if (bank.second.view.from_steps) choose_step_bits(&bank.second.view);
    bank.projection.step_scale = header->step_scale;
  }

  // As int8_scale (filter.h), by a power of two: most rows fit the codes, or clip few coordinates by little, which blunts less than coarser steps do.
  // Steps are made coarser, by less than two times, so that the codes are used up: their error is small beside that of the codes.
  void choose_step_bits(View* view) {
    const double largest = std::min(largest_coordinate * header->step_scale, largest_step(rows.dim));
    double reach = kStepOverflow * kMaxCode;
    for (; view->step_bits < kMostStepBits && 2 * reach <= largest; reach *= 2) ++view->step_bits;
    if (largest > reach) header->step_scale *= reach / largest;
    view->codes_per_unit = header->step_scale / static_cast<double>(1 << view->step_bits);
  }

  // A scale by which coordinates begin .. end of most rows fit the codes.
  double scale_of(const View& view, int64_t begin, int64_t end) const {
    double error;
    const int64_t count = sample_rows([&](const Encoder& encoder, const float*, int64_t index, int64_t i) {
      const double* values = encoder.coordinates(view, i, &error);
      double most = 0;
      for (int64_t k = begin; k < end; ++k) most = std::max(most, std::abs(values[k]));
      sample[index] = most;
    });
    return int8_scale(percentile(sample, count, kCodePercentile)) * view.most / kMaxCode;
  }

  // A scale by which squared distances of most rows, about the sum of their squared norms, stay within what sums of 16 bits tell apart.
  double largest_staged_scale(const View& view) const {
    double error;
    const int64_t count = sample_rows([&](const Encoder& encoder, const float*, int64_t index, int64_t i) {
      const double* values = encoder.coordinates(view, i, &error);
      sample[index] = 0;
      for (int64_t k = 0; k < view.coordinates(rows.dim); ++k) sample[index] += values[k] * values[k];
    });
    return std::sqrt(kMostRoom / std::max(percentile(sample, count, kNormPercentile), 1e-300));
  }

  void choose_scale(View* view) {
    const int64_t coordinates = view->coordinates(rows.dim);
    if (view->outputs > 0) {
      double error, sum = 0;
      const int64_t count =
          sample_rows([&](const Encoder& encoder, const float*, int64_t, int64_t i) { sum += encoder.coordinates(*view, i, &error)[view->outputs]; });
      view->shift = sum / static_cast<double>(count);
    }
    view->scale = scale_of(*view, view->coarse, coordinates);
    if (view->coarse > 0) {
      // Of the steps that fit both kinds of coordinates, those of the smallest error.
      const double fine = view->scale, coarse = scale_of(*view, 0, view->coarse);
      double least = INFINITY;
      for (int64_t bits = 0; bits <= kMostCoarseBits; ++bits) {
        const double factor = static_cast<double>(1 << bits), scale = std::min(fine, factor * coarse);
        const double error =
            (factor * factor * static_cast<double>(view->coarse) + static_cast<double>(coordinates - view->coarse)) / (scale * scale);
        if (!(error < least)) continue;
        least = error;
        view->scale = scale;
        view->coarse_bits = bits;
      }
    }
    if (view->staged && level().stage_bytes == 2) view->scale = std::min(view->scale, largest_staged_scale(*view));
    view->codes_per_unit = view->outputs == 0 ? view->scale : inflate(view->scale * header->step_scale, 1);
  }

  // Calls visit(encoder, memory, tile, rows in it) for each tile, whose rows the encoder then holds.
  template <class F>
  void encode_all(F&& visit) const {
    parallel([&](int64_t s) {
      const Slot memory = slot(s);
      Encoder encoder(bank.projection, memory.encoder);
      const Share share = share_of(tiles_of(rows.count), s, parallel.num_slots);
      for (int64_t tile = share.begin; tile < share.end; ++tile) {
        const int64_t begin = tile * kTileOperands, count = std::min(kTileOperands, rows.count - begin);
        encoder.take(gather(rows, bank.order + begin, count, memory), count, true);
        visit(encoder, memory, tile, count);
      }
    });
  }

  void pack_tile(const Encoder& encoder, const Slot& memory, int64_t tile, int64_t count, TileFilter* filter) const {
    const bool staged = filter->view.staged;
    const int64_t length = 4 * filter->words, group = staged ? level().stage_bytes : 4;
    int8_t* codes = filter->tiles + tile * length * kTileOperands;
    std::memset(codes, 0, static_cast<size_t>(length * kTileOperands));
    int32_t* start = staged ? nullptr : filter->start + tile * kTileOperands;
    if (!staged) std::fill(start, start + kTileOperands, kInt8PaddingStart);
    const int32_t zero = filter->view.most + 1;
    double largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const RowCodes row = encoder.encode(filter->view, i, memory.codes);
      int32_t sum = 0;
      for (int64_t k = 0; k < length; ++k) {
        const int8_t code = static_cast<int8_t>(memory.codes[k] - zero);
        codes[(k / group * kTileOperands + i) * group + k % group] = code;
        sum += code;
      }
      if (staged) {
        level_stage_starts(memory.codes, length, zero, zero, filter->stage_starts, tile * num_stages(length) * kTileOperands + i);
      } else {
        start[i] = int8_start(row.squared_norm) - zero * sum;
      }
      largest = std::max(largest, row.residual);
    }
    filter->tile_residuals[tile] = largest;
  }

  void pack_rows(const Encoder& encoder, const Slot& memory, int64_t tile, int64_t count) const {
    const RowFilter& filter = bank.second;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = tile * kTileOperands + i;
      const RowCodes encoded = encoder.encode(filter.view, i, memory.codes);
      int8_t* codes = filter.codes + row * 4 * filter.words;
      int32_t sum = 0, coarse_sum = 0;
      for (int64_t k = 0; k < 4 * filter.words; ++k) {
        codes[k] = static_cast<int8_t>(memory.codes[k] - (kMaxCode + 1));
        (k < 4 * filter.view.coarse_words() ? coarse_sum : sum) += codes[k];
      }
      sum += coarse_sum * (1 << 2 * filter.view.coarse_bits);
      filter.offsets[row] = encoded.squared_norm + 2 * (kMaxCode + 1) * sum;
      filter.residuals[row] = round_up_to_float(encoded.residual);
    }
  }

  void pack() {
    if (bank.projection.outputs > 0) choose_step_scale();
    choose_scale(&bank.full.view);
    if (bank.prefix.words > 0) {
      choose_scale(&bank.prefix.view);
      if (!bank.second.view.from_steps) choose_scale(&bank.second.view);
    }
    for (int64_t i = 0; i < tiles_of(rows.count) * kTileOperands; ++i) bank.order[i] = i < rows.count ? order[i] : order[0];
    for (int64_t i = 0; bank.places != nullptr && i < rows.count; ++i) bank.places[order[i]] = static_cast<int32_t>(i);
    encode_all([&](const Encoder& encoder, const Slot& memory, int64_t tile, int64_t count) {
      pack_tile(encoder, memory, tile, count, &bank.full);
      if (bank.prefix.words == 0) return;
      pack_tile(encoder, memory, tile, count, &bank.prefix);
      pack_rows(encoder, memory, tile, count);
    });
    for (int64_t row = 0; bank.prefix.words > 0 && row < rows.count; ++row) {
      header->largest_residual = std::max<double>(header->largest_residual, bank.second.residuals[row]);
    }
    header->prefix = bank.prefix.view;
    header->second = bank.second.view;
    header->full = bank.full.view;
  }

  bool prefix_pays(Pieces* memory) const;
};

// Whether the prefix is worth scanning first: rows of the bank look for another one by it.
bool Packer::prefix_pays(Pieces* memory) const {
  constexpr int64_t kAsked = kBlockQueries, kNeighbors = 2;  // the nearest row is the row itself
  SearchOptions options;
  options.prefix = 1;
  const SearchMemory search = search_memory(rows, rows, bank, kNeighbors, memory);
  const Slot gathered = slot(0);
  int32_t which[kAsked];
  for (int64_t i = 0; i < kAsked; ++i) which[i] = static_cast<int32_t>(i * rows.count / kAsked);
  BlockSearch block(rows, bank, kNeighbors, options, search);
  block.search(gather(rows, which, kAsked, gathered), kAsked, nullptr);
  return block.prefix_pays(block.statistics());
}

// Matrix [outputs, dim] as the tiles of IntegerProjection.
void tile_matrix(const BankRotation& rotation, int64_t dim, int64_t outputs, int16_t* tiles) {
  std::memset(tiles, 0, static_cast<size_t>(padded_outputs(outputs) * 2 * pairs_of(dim)) * sizeof(int16_t));
  for (int64_t o = 0; o < outputs; ++o) {
    int16_t* tile = tiles + o / kTileOperands * kTileOperands * 2 * pairs_of(dim);
    for (int64_t j = 0; j < dim; ++j) tile[(j / 2 * kTileOperands + o % kTileOperands) * 2 + j % 2] = rotation.matrix[o * dim + j];
  }
}

}  // namespace

int64_t prepare_bank_workspace_bytes(const Rows& bank, const BankRotation& rotation, const Parallel& parallel) {
  Pieces slot(nullptr), all(nullptr);
  slot_at(bank, rotation.short_outputs + rotation.long_outputs, &slot);
  all.take<double>(kSampleRows);
  all.take<char>(parallel.num_slots * slot.used());
  Pieces nothing(nullptr);
  search_memory(bank, bank, lay_out(header_of(bank, rotation), &nothing), 2, &all);
  return all.used() + 64;
}

void prepare_bank_cpu(const Rows& bank, const BankRotation& rotation, const Parallel& parallel, void* workspace, void* prepared) {
  const FloatEnvironment ieee;  // samples are taken on the caller's thread
  BankHeader header = header_of(bank, rotation);
  Pieces pieces(prepared), memory(aligned_start(workspace)), slot(nullptr);
  PreparedBank layout = lay_out(header, &pieces);
  std::memcpy(const_cast<double*>(layout.projection.center), rotation.center, static_cast<size_t>(bank.dim) * sizeof(double));
  if (layout.projection.outputs > 0) tile_matrix(rotation, bank.dim, layout.projection.outputs, const_cast<int16_t*>(layout.projection.tiles));
  slot_at(bank, layout.projection.outputs, &slot);
  double* sample = memory.take<double>(kSampleRows);
  Packer packer = {bank, parallel, layout, &header, sample, rotation.order, memory.take<char>(parallel.num_slots * slot.used()), slot.used()};
  packer.pack();
  header.prefix_first = layout.prefix.words > 0 && packer.prefix_pays(&memory);
  std::memcpy(prepared, &header, sizeof(BankHeader));
}

}  // namespace patchcore
