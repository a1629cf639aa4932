#include "cpu/search.h"

#include <algorithm>
#include <cmath>

#include "cpu/stage_starts.h"
#include "filter.h"

namespace patchcore {

namespace {

// Scanning all coordinates leaves rows, too, about as many as double its cost.
constexpr double kFullScanFactor = 2;
constexpr int64_t kMostWaiting = 15;    // blocks, before the prefix is tried again: twice as many and one whenever it did not pay once more
constexpr int64_t kMostSeeded = 32;     // for more neighbours, seeds cost more than they save
constexpr int64_t kSampledTiles = 256;  // where nothing better is known, seeds come from one of at most so many tiles

int64_t num_tiles(const PreparedBank& bank) { return (bank.count + kTileOperands - 1) / kTileOperands; }
static_assert(3 * kMostSeeded <= kChunkTiles * kTileOperands && kSampledTiles <= kChunkTiles * kTileOperands, "seeds must fit the memory of a chunk");

}  // namespace

SearchMemory search_memory(const Rows& queries, const Rows& rows, const PreparedBank& bank, int64_t k, Pieces* pieces) {
  SearchMemory memory = {};
  memory.encoder = encoder_memory(bank.dim, bank.projection.outputs, pieces);
  memory.widened = pieces->take<float>(float_scratch(queries, kBlockQueries));
  memory.widened_row = pieces->take<float>(float_scratch(rows, 1));
  memory.scanned_codes = pieces->take<uint8_t>(kBlockQueries * 4 * std::max(bank.full.words, bank.prefix.words));
  memory.row_starts = pieces->take<char>(kMostStages * kBlockQueries * level().stage_bytes);
  memory.second_codes = pieces->take<uint8_t>(kBlockQueries * 4 * bank.second.words);
  memory.masks = pieces->take<uint64_t>(kBlockQueries * kMaskStride);
  memory.left = pieces->take<int32_t>(kChunkTiles * kTileOperands + 4);
  memory.dots = pieces->take<int32_t>(kChunkTiles * kTileOperands);
  memory.keys = pieces->take<int64_t>(kChunkTiles * kTileOperands);
  memory.neighbors = pieces->take<Neighbor>(block_queries(k) * k);
  return memory;
}

BlockSearch::BlockSearch(const Rows& rows, const PreparedBank& bank, int64_t k, const SearchOptions& options, const SearchMemory& memory)
    : rows_(rows),
      bank_(bank),
      k_(k),
      options_(options),
      memory_(memory),
      encoder_(bank.projection, memory.encoder),
      slack_(canonical_slack(bank.dim)) {}

double BlockSearch::bound(int64_t q) const { return heaps_[q].full() ? heaps_[q].worst().squared_distance : INFINITY; }

double BlockSearch::canonical(int64_t q, int64_t row) {
  const FloatRows features = float_rows(rows_, row, 1, memory_.widened_row);
  double squared_distance;
  level().squared_distances(queries_.data + q * queries_.stride, features.data, features.stride, 1, bank_.dim, &squared_distance);
  ++statistics_.canonical;
  return squared_distance;
}

// Asks for the features of the row at a place, which lie anywhere in the bank.
void BlockSearch::prefetch(int64_t place) const {
  const int64_t size = rows_.type == ScalarType::kFloat32 ? 4 : 2;
  const char* row = static_cast<const char*>(rows_.data) + bank_.order[place] * rows_.stride * size;
  for (int64_t b = 0; b < rows_.dim * size; b += 64) __builtin_prefetch(row + b);
}

// Offers the row at a place to the heap of a query, unless float32 tells that it is too far.
void BlockSearch::evaluate(int64_t q, int64_t place) {
  const int64_t row = bank_.order[place];
  if (seeded_ && heaps_[q].contains(row)) return;
  if (bound(q) < INFINITY) {
    const FloatRows features = float_rows(rows_, row, 1, memory_.widened_row);
    ++statistics_.differences;
    const float difference = level().squared_difference(queries_.data + q * queries_.stride, features.data, bank_.dim);
    if (difference > difference_skip_limit(bound(q), bank_.dim, slack_)) return;
  }
  heaps_[q].offer({canonical(q, row), row});
}

// Keys of those of memory_.left[0 .. count) whose second codes have a squared distance to query q's below a limit, into memory_.keys: that distance
// above the place. Returns their number.
int64_t BlockSearch::look_up(int64_t q, int64_t count, int32_t limit) {
  const RowFilter& second = bank_.second;
  level().dots(memory_.second_codes + q * 4 * second.words, second.codes, 4 * second.words, memory_.left, count, second.words,
               second.view.coarse_words(), 2 * second.view.coarse_bits, memory_.dots);
  const int32_t norm = second_[q].squared_norm;
  int64_t left = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t place = memory_.left[i], apart = norm + second.offsets[place] - 2 * memory_.dots[i];
    memory_.keys[left] = static_cast<int64_t>(apart) << 32 | place;
    left += apart < limit ? 1 : 0;
  }
  return left;
}

// The places to start from for query q into memory_.left: those near the patch above and its neighbours, or a sample of the bank and then the tile
// in which the best of it lies. Returns their number.
int64_t BlockSearch::gather_seeds(int64_t q, const int64_t* above, int64_t count) {
  int64_t seeds = 0;
  if (above != nullptr) {
    const int64_t neighbors[3] = {q, q > 0 ? q - 1 : q, q + 1 < count ? q + 1 : q};
    for (const int64_t neighbor : neighbors) {
      for (int64_t i = 0; i < k_; ++i) memory_.left[seeds++] = bank_.places[above[neighbor * k_ + i]];
    }
    return seeds;
  }
  const int64_t step = (num_tiles(bank_) + kSampledTiles - 1) / kSampledTiles * kTileOperands;
  for (int64_t place = 0; place < bank_.count; place += step) memory_.left[seeds++] = static_cast<int32_t>(place);
  look_up(q, seeds, kNeverSkip);
  const int64_t best = *std::min_element(memory_.keys, memory_.keys + seeds) & INT32_MAX;
  const int64_t begin = best / kTileOperands * kTileOperands, end = std::min(bank_.count, begin + kTileOperands);
  seeds = 0;
  for (int64_t place = begin; place < end; ++place) memory_.left[seeds++] = static_cast<int32_t>(place);
  return seeds;
}

// Fills the heap of query q with the nearest seeds by the second codes, so that the scan begins with a bound.
void BlockSearch::start_from_seeds(int64_t q, const int64_t* above, int64_t count) {
  int64_t seeds = look_up(q, gather_seeds(q, above, count), kNeverSkip);
  if (k_ == 1) {
    memory_.keys[0] = *std::min_element(memory_.keys, memory_.keys + seeds);
  } else if (seeds > k_) {
    std::sort(memory_.keys, memory_.keys + seeds);
    seeds = std::unique(memory_.keys, memory_.keys + seeds) - memory_.keys;
  }
  for (int64_t i = 0; i < std::min(seeds, k_); ++i) {
    const int64_t row = bank_.order[memory_.keys[i] & INT32_MAX];
    heaps_[q].offer({canonical(q, row), row});
  }
}

void BlockSearch::encode_scanned(int64_t count) {
  const TileFilter& filter = prefix_ ? bank_.prefix : bank_.full;
  for (int64_t q = 0; q < count; ++q) {
    uint8_t* codes = memory_.scanned_codes + q * 4 * filter.words;
    const RowCodes encoded = encoder_.encode(filter.view, q, codes);
    norms_[q] = encoded.squared_norm;
    residuals_[q] = encoded.residual;
    if (!filter.view.staged) continue;
    norms_[q] = 0;  // the row's starts contain it
    level_stage_starts(codes, 4 * filter.words, filter.view.most + 1, 0, memory_.row_starts, q);
  }
}

// Bits of the rows that the scan leaves, for all queries of the block and the tiles of a chunk.
void BlockSearch::scan(const Chunks& chunks, int64_t count) {
  const TileFilter& filter = prefix_ ? bank_.prefix : bank_.full;
  const int64_t padded = (count + 7) / 8 * 8;
  alignas(64) int32_t floors[kBlockQueries];
  for (int64_t q = 0; q < count; ++q) reach_[q] = search_reach(bound(q), 0, residuals_[q], filter.view.codes_per_unit, slack_);
  for (int64_t q = count; q < padded; ++q) {
    reach_[q] = -INFINITY;
    norms_[q] = 0;
  }
  const double residual = *std::max_element(filter.tile_residuals + chunks.begin(), filter.tile_residuals + chunks.end());
  level().int8_floors(reach_, norms_, padded, residual, floors);
  if (filter.view.staged) return scan_in_stages(filter, chunks, count, floors);
  const int64_t length = 4 * filter.words, begin = chunks.begin();
  level().scan_rows(memory_.scanned_codes, length, count, filter.tiles + begin * length * kTileOperands, filter.start + begin * kTileOperands,
                    chunks.end() - begin, filter.words, floors, memory_.masks, kMaskStride);
}

void BlockSearch::scan_in_stages(const TileFilter& filter, const Chunks& chunks, int64_t count, const int32_t* floors) {
  const int64_t length = 4 * filter.words, begin = chunks.begin();
  level().scan_stages(memory_.scanned_codes, length, count, memory_.row_starts, filter.tiles + begin * length * kTileOperands,
                      filter.stage_starts + begin * num_stages(length) * kTileOperands * level().stage_bytes, chunks.end() - begin, filter.words,
                      floors, memory_.masks, kMaskStride);
  const int64_t padding = chunks.end() * kTileOperands - bank_.count;
  if (padding <= 0) return;
  for (int64_t q = 0; q < count; ++q) memory_.masks[q * kMaskStride + chunks.end() - 1 - begin] &= ~uint64_t{0} >> padding;
}

// The rows that the scan leaves of a chunk; returns their number.
int64_t BlockSearch::rescue(const Chunks& chunks, int64_t count) {
  int64_t survivors = 0;
  if (prefix_) {
    for (int64_t q = 0; q < count; ++q) {
      const int64_t left = take_marked(q, chunks.begin(), chunks.end(), chunks);
      rescue_by_second(q, left);
      survivors += left;
    }
    return survivors;
  }
  // Where many rows are left, those of a tile are still at hand for the next query.
  for (int64_t tile = chunks.begin(); tile < chunks.end(); ++tile) {
    for (int64_t q = 0; q < count; ++q) {
      if (memory_.masks[q * kMaskStride + tile - chunks.begin()] == 0) continue;
      const int64_t left = take_marked(q, tile, tile + 1, chunks);
      for (int64_t i = 0; i < left; ++i) evaluate(q, memory_.left[i]);
      survivors += left;
    }
  }
  return survivors;
}

// Places of the rows that are left for query q of tiles begin .. end into memory_.left; returns their number.
int64_t BlockSearch::take_marked(int64_t q, int64_t begin, int64_t end, const Chunks& chunks) {
  const uint64_t* masks = memory_.masks + q * kMaskStride + begin - chunks.begin();
  return level().take_marked(masks, end - begin, static_cast<int32_t>(begin * kTileOperands), memory_.left);
}

// The longer prefix discards most; the k nearest by it are evaluated first, so that the others face a tight bound.
void BlockSearch::rescue_by_second(int64_t q, int64_t count) {
  const RowFilter& filter = bank_.second;
  const auto skip_limit = [&] {
    const double reach = search_reach(bound(q), 0, second_[q].residual, filter.view.codes_per_unit, slack_);
    return int8_skip_limit(reach, filter.largest_residual);
  };
  const int64_t left = look_up(q, count, skip_limit());
  if (k_ == 1 && left > 1) {
    std::swap(memory_.keys[0], *std::min_element(memory_.keys, memory_.keys + left));
  } else if (left > k_) {
    std::nth_element(memory_.keys, memory_.keys + k_, memory_.keys + left);
  }
  double known = bound(q);
  int64_t limit = INT64_MAX;  // in terms of keys: of these, none is above it yet
  for (int64_t i = 0; i < left; ++i) {
    if (memory_.keys[i] >= limit) continue;
    if (i + 1 < left && memory_.keys[i + 1] < limit) prefetch(memory_.keys[i + 1] & INT32_MAX);
    evaluate(q, memory_.keys[i] & INT32_MAX);
    if (bound(q) < known) {
      known = bound(q);
      limit = skip_limit() * (int64_t{1} << 32);
    }
  }
}

bool BlockSearch::prefix_pays(const SearchStatistics& found) const {
  const Costs& costs = level().costs;
  const double look_up = costs.look_up + costs.look_up_word * static_cast<double>(bank_.second.words);
  const double spent =
      static_cast<double>(found.survivors) * look_up + static_cast<double>(found.differences) * costs.difference_dim * static_cast<double>(bank_.dim);
  return spent < kFullScanFactor * costs.word * static_cast<double>(found.pairs * (bank_.full.words - bank_.prefix.words));
}

bool BlockSearch::search(const FloatRows& queries, int64_t count, const int64_t* above) {
  queries_ = queries;
  prefix_ = bank_.prefix.words > 0 && (options_.prefix > 0 || (options_.prefix == 0 && bank_.prefix_first && blocks_to_wait_ == 0));
  if (blocks_to_wait_ > 0) --blocks_to_wait_;
  const bool tried = prefix_;
  if (!encoder_.take(queries, count, prefix_)) return false;
  seeded_ = prefix_ && k_ <= kMostSeeded;
  encode_scanned(count);
  for (int64_t q = 0; q < count; ++q) {
    heaps_[q] = NeighborHeap(memory_.neighbors + q * k_, k_);
    if (prefix_) second_[q] = encoder_.encode(bank_.second.view, q, memory_.second_codes + q * 4 * bank_.second.words);
    if (seeded_) start_from_seeds(q, above, count);
  }
  SearchStatistics found;
  const int64_t differences_before = statistics_.differences;
  for (Chunks chunks(num_tiles(bank_), seeded_); chunks.next();) {
    scan(chunks, count);
    found.survivors += rescue(chunks, count);
    found.differences = statistics_.differences - differences_before;
    found.pairs += count * (chunks.end() - chunks.begin()) * kTileOperands;
    // Part of the bank tells little: rows that lie together are left together.
    const bool telling = 4 * chunks.end() >= num_tiles(bank_);
    if (prefix_ && telling && options_.prefix == 0 && !prefix_pays(found)) {
      prefix_ = false;
      blocks_to_wait_ = next_wait_;
      next_wait_ = std::min(2 * next_wait_ + 1, kMostWaiting);
      encode_scanned(count);
    }
  }
  if (tried && prefix_) next_wait_ = 0;
  statistics_.pairs += found.pairs;
  statistics_.survivors += found.survivors;
  for (int64_t q = 0; q < count; ++q) heaps_[q].sort();
  return true;
}

}  // namespace patchcore
