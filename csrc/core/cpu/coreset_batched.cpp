// The batched coreset (coreset.h): candidates, the greedy chain among them, one filtered pass over all rows.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "coreset.h"
#include "cpu/candidate.h"
#include "cpu/codes.h"
#include "cpu/operands.h"
#include "cpu/rows.h"
#include "filter.h"

namespace patchcore {

namespace {

constexpr int64_t kFirstBatch = 2048;
constexpr int64_t kLargestBatch = 4096;
constexpr int64_t kFewPicks = 4;  // a pass over so few is done by single dot products; fewer than that from a full batch: one pick a pass for a while
constexpr int64_t kSinglePicks = 64;  // for how many picks
constexpr int64_t kGroupTiles = 8;    // tiles between two rounds of canonical evaluation
constexpr int64_t kGroupOperands = kGroupTiles * kTileOperands;
constexpr int64_t kRowBlock = 48;  // rows whose codes stay in the first-level cache with a tile
// A dot product of one pair costs as much as the scan spends on so many words: measured 8 ns against 0.02 ns.
constexpr double kDotWords = 400;
constexpr int64_t kSampleBlocks = 4;  // blocks of rows on which a filter is tried

struct Header {
  double prefix_scale, full_scale;
  int64_t prefix_words, full_words;  // no prefix: 0 words
  char padding[32];
};
static_assert(sizeof(Header) == 64, "the codes behind the header must stay aligned");

// Everything that the steps of a run share.
struct Run {
  const Rows& rows;
  const Parallel& parallel;
  double* state;          // min_squared_distances
  double* reach;          // [N], of `first` (filter.h, section 4); follows `state`
  Candidate* candidates;  // [N]
  Codes prefix, full;
  Codes first, second;  // the filter in use: prefix then full, or full twice
  double slack;
  char* slots;  // slot_bytes each
  int64_t slot_bytes;
  CoresetStatistics statistics;
};

struct SlotMemory {
  int32_t* survivors;  // [kRowBlock, kGroupOperands]
  int32_t* dots;       // [kGroupOperands]
  float* row;          // [dim], widened
};

int64_t slot_memory_bytes(const Rows& rows) {
  return (kRowBlock + 1) * kGroupOperands * static_cast<int64_t>(sizeof(int32_t)) + (rows.dim * 4 + 63) / 64 * 64;
}

SlotMemory slot_memory(const Run& run, int64_t slot) {
  int32_t* begin = reinterpret_cast<int32_t*>(run.slots + slot * run.slot_bytes);
  int32_t* dots = begin + kRowBlock * kGroupOperands;
  return {begin, dots, reinterpret_cast<float*>(dots + kGroupOperands)};
}

double reach_of(const Run& run, const Codes& codes, int64_t row) {
  return update_reach(run.state[row], 0, codes.residuals[row], codes.scale, run.slack);
}

// Chooses the filter, and brings `reach` up to date when it is another one than before.
void use_filter(Run* run, const Codes& first) {
  const bool same = run->first.codes == first.codes;
  run->first = first;
  run->second = run->full;
  if (same) return;
  run->parallel([&](int64_t slot) {
    const Share share = share_of(run->rows.count, slot, run->parallel.num_slots);
    for (int64_t i = share.begin; i < share.end; ++i) run->reach[i] = reach_of(*run, first, i);
  });
}

// ---- Candidates
// -------------------------------------------------------------------------------------------------------------------------------------

struct Selection {
  int64_t count;       // candidates, ascending by index at the front of run->candidates
  Candidate excluded;  // the best row that is not among them
};

// The first `batch` rows in the order of picks.
Selection select_candidates(Run* run, int64_t batch) {
  const int64_t wanted = batch + 1;  // one more: the best excluded
  const auto before = [](const Candidate& a, const Candidate& b) { return a.before(b); };
  constexpr int64_t kMostSlots = 256;
  int64_t kept[kMostSlots];
  const int64_t slots = std::min(run->parallel.num_slots, kMostSlots);
  run->parallel([&](int64_t slot) {
    if (slot >= slots) return;
    const Share share = share_of(run->rows.count, slot, slots);
    Candidate* begin = run->candidates + share.begin;
    Candidate* end = begin;
    for (int64_t i = share.begin; i < share.end; ++i) {
      if (run->state[i] != kPicked) *end++ = {run->state[i], i};
    }
    if (end - begin > wanted) {
      std::nth_element(begin, begin + wanted, end, before);
      end = begin + wanted;
    }
    kept[slot] = end - begin;
  });
  Candidate* end = run->candidates;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const Candidate* begin = run->candidates + share_of(run->rows.count, slot, slots).begin;
    end = std::copy(begin, begin + kept[slot], end);  // to the front: never past its own beginning
  }
  Selection selection = {end - run->candidates, kNoCandidate};
  if (selection.count > batch) {
    std::nth_element(run->candidates, run->candidates + batch, end, before);
    selection = {batch, run->candidates[batch]};
  }
  std::sort(run->candidates, run->candidates + selection.count, [](const Candidate& a, const Candidate& b) { return a.index < b.index; });
  return selection;
}

// ---- The chain
// --------------------------------------------------------------------------------------------------------------------------------------

// Memory of the candidates beside their operands.
struct Chain {
  Operands operands;
  double* values;   // [padded], kPicked where there is none
  int32_t* floors;  // [padded]
  int64_t* rows;    // [count]
};

// Sequential greedy among the candidates while the best of them comes before `excluded`; at most `count` picks. Returns their number and leaves state
// and reach of the candidates as the picks leave them.
int64_t run_chain(Run* run, const Selection& selection, int64_t count, Chain* chain, int64_t* indices, double* squared_distances) {
  const Codes& codes = run->first;
  const int64_t num_candidates = selection.count, tiles = num_tiles(num_candidates), padded = tiles * kTileOperands;
  double residual = 0;
  for (int64_t i = 0; i < num_candidates; ++i) {
    chain->values[i] = run->candidates[i].squared_distance;
    residual = std::max<double>(residual, codes.residuals[chain->rows[i]]);
  }
  std::fill(chain->values + num_candidates, chain->values + padded, kPicked);
  std::fill(chain->floors + num_candidates, chain->floors + padded, 0);  // a padded operand starts below every floor
  const auto set_floor = [&](int64_t i) {
    const int64_t row = chain->rows[i];
    const double reach = update_reach(chain->values[i], 0, codes.residuals[row], codes.scale, run->slack);
    chain->floors[i] = int8_floor(codes.squared_norms[row], int8_skip_limit(reach, residual));
  };
  for (int64_t i = 0; i < num_candidates; ++i) set_floor(i);

  int64_t accepted = 0;
  while (accepted < count) {
    const int64_t best = level().first_largest(chain->values, padded);
    const Candidate pick = {chain->values[best], best < num_candidates ? chain->rows[best] : 0};
    if (pick.squared_distance == kPicked || !pick.before(selection.excluded)) break;
    indices[accepted] = pick.index;
    squared_distances[accepted] = pick.squared_distance;
    ++accepted;
    chain->values[best] = kPicked;
    set_floor(best);
    const float* center = chain->operands.rows + best * run->rows.dim;
    const uint8_t* center_codes = codes.codes + pick.index * 4 * codes.words;
    const int32_t offset = -int8_start(codes.squared_norms[pick.index]);
    for (int64_t t = 0; t < tiles; ++t) {
      const int8_t* tile = chain->operands.tiles + t * 4 * codes.words * kTileOperands;
      const int64_t at = t * kTileOperands;
      uint64_t survivors = level().scan_tile(center_codes, tile, chain->operands.start + at, codes.words, chain->floors + at, offset);
      for (; survivors != 0; survivors &= survivors - 1) {
        const int64_t i = at + __builtin_ctzll(survivors);
        double squared_distance;
        level().squared_distances(center, chain->operands.rows + i * run->rows.dim, run->rows.dim, 1, run->rows.dim, &squared_distance);
        if (squared_distance < chain->values[i]) {
          chain->values[i] = squared_distance;
          set_floor(i);
        }
      }
    }
  }
  for (int64_t i = 0; i < num_candidates; ++i) {
    run->state[chain->rows[i]] = chain->values[i];
    run->reach[chain->rows[i]] = reach_of(*run, codes, chain->rows[i]);
  }
  return accepted;
}

// ---- The pass
// ---------------------------------------------------------------------------------------------------------------------------------------

// Bits of the operands of a tile that the first comparison leaves for each row of a block.
void scan_block(const Run& run, const Operands& operands, int64_t tile, const uint8_t* codes, int64_t count, const int32_t* floors,
                uint64_t* survivors) {
  const int64_t stride = 4 * run.first.words, at = tile * kTileOperands;
  if (operands.count > kFewPicks || run.first.codes != run.second.codes) {
    level().scan_rows(codes, stride, count, operands.tiles + tile * stride * kTileOperands, operands.start + at, run.first.words, floors, survivors);
    return;
  }
  static constexpr int32_t kAll[kFewPicks] = {0, 1, 2, 3};
  for (int64_t r = 0; r < count; ++r) {
    int32_t dots[kFewPicks];
    level().dots(codes + r * stride, operands.codes, stride, kAll, operands.count, run.first.words, dots);
    survivors[r] = 0;
    for (int64_t o = 0; o < operands.count; ++o) survivors[r] |= static_cast<uint64_t>(dots[o] + operands.start[o] >= floors[r]) << o;
  }
}

// Evaluates what is left for one row, nearest by the second codes first, so that the others face the lowest value. Returns the canonical evaluations.
int64_t rescue(Run* run, const Operands& operands, int64_t row, const int32_t* survivors, int64_t count, const SlotMemory& memory) {
  const float* features = float_rows(run->rows, row, 1, memory.row).data;
  const int64_t dim = run->rows.dim;
  double& value = run->state[row];
  const double before = value;
  int64_t evaluated = 0;
  const auto evaluate = [&](int64_t operand) {
    double squared_distance;
    level().squared_distances(operands.rows + operand * dim, features, dim, 1, dim, &squared_distance);
    ++evaluated;
    if (squared_distance < value) value = squared_distance;
  };
  if (run->first.codes == run->second.codes) {
    for (int64_t i = 0; i < count; ++i) evaluate(survivors[i]);
  } else {
    const Codes& codes = run->second;
    const int64_t stride = 4 * codes.words;
    level().dots(codes.codes + row * stride, operands.codes, stride, survivors, count, codes.words, memory.dots);
    int64_t nearest = 0;
    for (int64_t i = 0; i < count; ++i) {  // from dot products to squared distances of codes
      const int64_t o = survivors[i];
      memory.dots[i] = codes.squared_norms[row] + operands.squared_norms[o] - 2 * (memory.dots[i] - operands.biases[o]);
      if (memory.dots[i] < memory.dots[nearest]) nearest = i;
    }
    double reach = reach_of(*run, codes, row);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i == 0 ? nearest : i - (i <= nearest);  // the nearest, then the others in order
      const int64_t o = survivors[at];
      if (memory.dots[at] >= int8_skip_limit(reach, operands.code_residuals[o])) continue;
      const double was = value;
      evaluate(o);
      if (value < was) reach = reach_of(*run, codes, row);
    }
  }
  if (value < before) run->reach[row] = reach_of(*run, run->first, row);
  return evaluated;
}

struct Block {
  alignas(64) double reach[kRowBlock];
  alignas(64) int32_t norms[kRowBlock];
  alignas(64) int32_t floors[kRowBlock];
  uint64_t survivors[kRowBlock];
  int64_t counts[kRowBlock];
};

void load_block(const Run& run, int64_t begin, int64_t count, Block* block) {
  for (int64_t r = 0; r < kRowBlock; ++r) {  // rows beyond the last want nothing
    block->reach[r] = r < count ? run.reach[begin + r] : -INFINITY;
    block->norms[r] = r < count ? run.first.squared_norms[begin + r] : 0;
  }
}

// Lowers rows [begin, begin + count), count <= kRowBlock.
void update_block(Run* run, const Operands& operands, int64_t begin, int64_t count, const SlotMemory& memory, CoresetStatistics* statistics) {
  Block block;
  load_block(*run, begin, count, &block);
  const uint8_t* codes = run->first.codes + begin * 4 * run->first.words;
  const int64_t tiles = num_tiles(operands.count);
  for (int64_t group = 0; group < tiles; group += kGroupTiles) {
    std::fill(block.counts, block.counts + kRowBlock, 0);
    for (int64_t t = group; t < std::min(tiles, group + kGroupTiles); ++t) {
      level().int8_floors(block.reach, block.norms, kRowBlock, operands.tile_residuals[t], block.floors);
      scan_block(*run, operands, t, codes, count, block.floors, block.survivors);
      for (int64_t r = 0; r < count; ++r) {
        for (uint64_t left = block.survivors[r]; left != 0; left &= left - 1) {
          memory.survivors[r * kGroupOperands + block.counts[r]++] = static_cast<int32_t>(t * kTileOperands + __builtin_ctzll(left));
        }
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      if (block.counts[r] == 0) continue;
      statistics->survivors += block.counts[r];
      statistics->canonical += rescue(run, operands, begin + r, memory.survivors + r * kGroupOperands, block.counts[r], memory);
      block.reach[r] = run->reach[begin + r];
    }
  }
}

// Lowers all rows by the operands.
void update_all(Run* run, const Operands& operands) {
  std::atomic<int64_t> survivors{0}, canonical{0};
  run->parallel([&](int64_t slot) {
    const SlotMemory memory = slot_memory(*run, slot);
    CoresetStatistics counted;
    // Blocks in turn: rows that lie together are alike, and the slots shall have the same share of the rows that take long.
    for (int64_t begin = slot * kRowBlock; begin < run->rows.count; begin += run->parallel.num_slots * kRowBlock) {
      update_block(run, operands, begin, std::min(kRowBlock, run->rows.count - begin), memory, &counted);
    }
    survivors += counted.survivors;
    canonical += counted.canonical;
  });
  ++run->statistics.passes;
  run->statistics.pairs += run->rows.count * operands.count;
  run->statistics.survivors += survivors;
  run->statistics.canonical += canonical;
}

// ---- The plan
// ---------------------------------------------------------------------------------------------------------------------------------------

// The share of pairs that the first comparison leaves, on a few blocks of rows.
double survivor_share(const Run& run, const Operands& operands) {
  int64_t left = 0, pairs = 0;
  for (int64_t b = 0; b < kSampleBlocks; ++b) {
    const int64_t begin = b * run.rows.count / kSampleBlocks;
    const int64_t count = std::min(kRowBlock, run.rows.count - begin);
    Block block;
    load_block(run, begin, count, &block);
    for (int64_t t = 0; t < num_tiles(operands.count); ++t) {
      level().int8_floors(block.reach, block.norms, kRowBlock, operands.tile_residuals[t], block.floors);
      const uint8_t* codes = run.first.codes + begin * 4 * run.first.words;
      const int64_t words = run.first.words;
      level().scan_rows(codes, 4 * words, count, operands.tiles + t * 4 * words * kTileOperands, operands.start + t * kTileOperands, words,
                        block.floors, block.survivors);
      for (int64_t r = 0; r < count; ++r) left += __builtin_popcountll(block.survivors[r]);
    }
    pairs += count * operands.count;
  }
  return static_cast<double>(left) / static_cast<double>(std::max<int64_t>(pairs, 1));
}

// Drops the prefix when it leaves so much that scanning all coordinates is cheaper. `which` are the operands to come.
void choose_filter(Run* run, const CoresetOptions& options, const int64_t* which, int64_t count, Operands* operands) {
  if (run->prefix.words == 0 || options.prefix < 0) return use_filter(run, run->full);
  use_filter(run, run->prefix);
  if (options.prefix > 0) return;
  const int64_t tried = std::min<int64_t>(count, kGroupOperands);
  gather_operands(run->rows, run->first, run->second, which, tried, StartWith::kNorm, run->parallel, operands);
  if (survivor_share(*run, *operands) * kDotWords > static_cast<double>(run->full.words - run->prefix.words)) use_filter(run, run->full);
}

// One pick a pass, for `count` picks: where a batch yields hardly any, the pass by the shortest codes alone is the cheapest.
void pick_singly(Run* run, int64_t count, Operands* operands, int64_t* indices, double* squared_distances) {
  use_filter(run, run->prefix.words == 0 ? run->full : run->prefix);
  run->second = run->first;
  for (int64_t p = 0; p < count; ++p) {
    Candidate best = kNoCandidate;
    for (int64_t i = 0; i < run->rows.count; ++i) {
      if (run->state[i] > best.squared_distance) best = {run->state[i], i};
    }
    indices[p] = best.index;
    squared_distances[p] = best.squared_distance;
    run->state[best.index] = kPicked;
    run->reach[best.index] = -INFINITY;
    gather_operands(run->rows, run->first, run->second, &best.index, 1, StartWith::kNorm, serial(), operands);
    update_all(run, *operands);
  }
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
  char* memory = static_cast<char*>(codes) + sizeof(Header);
  if (rotation.outputs > 0) {
    header.prefix_words = code_words(rotation.outputs + 1);
    Codes prefix = codes_at(rows.count, header.prefix_words, 1, memory);
    const Contraction contraction = {rows.dim, rotation.outputs, rotation.columns, rotation.matrix};
    pack_codes_cpu(rows, rotation.center, &contraction, parallel, workspace, &prefix);
    header.prefix_scale = prefix.scale;
    memory += codes_bytes(rows.count, header.prefix_words);
  }
  header.full_words = code_words(rows.dim);
  Codes full = codes_at(rows.count, header.full_words, 1, memory);
  pack_codes_cpu(rows, rotation.center, nullptr, parallel, workspace, &full);
  header.full_scale = full.scale;
  std::memcpy(codes, &header, sizeof(Header));
}

namespace {

// How the workspace is cut: [reach N][candidates N][operands][operands of the chain][chain values, floors, rows][picked][slots].
struct Layout {
  int64_t reach, candidates, operands, chain_operands, values, floors, rows, order, slots, total;
};

Layout lay_out(const Rows& rows, const Codes& full, const Parallel& parallel) {
  Layout layout = {};
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = used;
    used += (bytes + 63) / 64 * 64;
    return at;
  };
  layout.reach = take(rows.count * 8);
  layout.candidates = take(rows.count * static_cast<int64_t>(sizeof(Candidate)));
  layout.operands = take(operands_bytes(kLargestBatch, rows.dim, full, full));
  layout.chain_operands = take(operands_bytes(kLargestBatch, rows.dim, full, full));
  layout.values = take(kLargestBatch * 8);
  layout.floors = take(kLargestBatch * 4);
  layout.rows = take(kLargestBatch * 8);
  layout.order = take(kLargestBatch * 8);
  layout.slots = take(parallel.num_slots * slot_memory_bytes(rows));
  layout.total = used + 64;
  return layout;
}

}  // namespace

void coreset_codes_inside(const Rows& rows, const void* codes, Codes* prefix, Codes* full) {
  Header header;
  std::memcpy(&header, codes, sizeof(Header));
  char* memory = const_cast<char*>(static_cast<const char*>(codes)) + sizeof(Header);  // read only: Codes serves the packer as well
  if (header.prefix_words > 0) {
    *prefix = codes_at(rows.count, header.prefix_words, header.prefix_scale, memory);
    memory += codes_bytes(rows.count, header.prefix_words);
  }
  *full = codes_at(rows.count, header.full_words, header.full_scale, memory);
}

bool coreset_codes_fit(const Rows& rows, const void* codes, int64_t bytes) {
  Header header;
  if (bytes < static_cast<int64_t>(sizeof(Header))) return false;
  std::memcpy(&header, codes, sizeof(Header));
  if (header.full_words != code_words(rows.dim) || header.prefix_words < 0 || header.prefix_words > header.full_words) return false;
  const int64_t prefix = header.prefix_words == 0 ? 0 : codes_bytes(rows.count, header.prefix_words);
  return bytes == static_cast<int64_t>(sizeof(Header)) + prefix + codes_bytes(rows.count, header.full_words);
}

namespace {

// A run and the memory of its operands.
struct Workspace {
  Run run;
  Layout layout;
  char* memory;

  Operands operands(int64_t capacity) const { return operands_at(capacity, run.rows.dim, run.first, run.second, memory + layout.operands); }
};

Workspace start(const Rows& rows, const void* codes, const Parallel& parallel, void* workspace, double* min_squared_distances) {
  char* memory = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(workspace) + 63) / 64 * 64);
  Run run = {rows, parallel, min_squared_distances, nullptr, nullptr, {}, {}, {}, {}, canonical_slack(rows.dim), nullptr, slot_memory_bytes(rows),
             {}};
  coreset_codes_inside(rows, codes, &run.prefix, &run.full);
  const Layout layout = lay_out(rows, run.full, parallel);
  run.reach = reinterpret_cast<double*>(memory + layout.reach);
  run.candidates = reinterpret_cast<Candidate*>(memory + layout.candidates);
  run.slots = memory + layout.slots;
  run.second = run.full;
  return {run, layout, memory};
}

// Lowers all rows by the picks, at most kLargestBatch of them. Tiles hold operands of like residuals, so that the largest of a tile is not much
// larger than the others.
void lower_by(Workspace* work, const int64_t* picks, int64_t count) {
  Run& run = work->run;
  int64_t* order = reinterpret_cast<int64_t*>(work->memory + work->layout.order);
  std::copy(picks, picks + count, order);
  std::sort(order, order + count, [&](int64_t a, int64_t b) {
    const float residual_a = run.first.residuals[a], residual_b = run.first.residuals[b];
    return residual_a < residual_b || (residual_a == residual_b && a < b);
  });
  Operands operands = work->operands(count);
  gather_operands(run.rows, run.first, run.second, order, count, StartWith::kNorm, run.parallel, &operands);
  update_all(&run, operands);
}

}  // namespace

int64_t batched_coreset_workspace_bytes(const Rows& rows, const void* codes, const Parallel& parallel) {
  Codes prefix, full;
  coreset_codes_inside(rows, codes, &prefix, &full);
  return lay_out(rows, full, parallel).total;
}

void batched_add_picks_cpu(const Rows& rows, const void* codes, const int64_t* picks, int64_t count, const Parallel& parallel, void* workspace,
                           double* min_squared_distances, CoresetStatistics* statistics) {
  Workspace work = start(rows, codes, parallel, workspace, min_squared_distances);
  Operands tried = operands_at(kLargestBatch, rows.dim, work.run.full, work.run.full, work.memory + work.layout.operands);
  for (int64_t done = 0; done < count; done += kLargestBatch) {
    const int64_t added = std::min(kLargestBatch, count - done);
    choose_filter(&work.run, {}, picks + done, added, &tried);
    lower_by(&work, picks + done, added);
  }
  for (int64_t i = 0; i < count; ++i) min_squared_distances[picks[i]] = kPicked;
  if (statistics != nullptr) *statistics = work.run.statistics;
}

void batched_greedy_coreset_cpu(const Rows& rows, const void* codes, int64_t count, const CoresetOptions& options, const Parallel& parallel,
                                void* workspace, double* min_squared_distances, int64_t* indices, double* squared_distances,
                                CoresetStatistics* statistics) {
  Workspace work = start(rows, codes, parallel, workspace, min_squared_distances);
  Run& run = work.run;
  Chain chain = {{},
                 reinterpret_cast<double*>(work.memory + work.layout.values),
                 reinterpret_cast<int32_t*>(work.memory + work.layout.floors),
                 reinterpret_cast<int64_t*>(work.memory + work.layout.rows)};
  Operands tried = operands_at(kLargestBatch, rows.dim, run.full, run.full, work.memory + work.layout.operands);
  int64_t batch = std::min(options.batch > 0 ? options.batch : kFirstBatch, kLargestBatch);
  int64_t done = 0;
  const auto singly = [&](int64_t picks) {
    pick_singly(&run, picks, &tried, indices + done, squared_distances + done);
    done += picks;
  };
  if (options.single > 0) singly(count);
  while (done < count) {
    const Selection selection = select_candidates(&run, batch);
    for (int64_t i = 0; i < selection.count; ++i) chain.rows[i] = run.candidates[i].index;
    choose_filter(&run, options, chain.rows, selection.count, &tried);
    chain.operands = operands_at(selection.count, rows.dim, run.first, run.second, work.memory + work.layout.chain_operands);
    gather_operands(rows, run.first, run.second, chain.rows, selection.count, StartWith::kNothing, parallel, &chain.operands);
    const int64_t accepted = run_chain(&run, selection, count - done, &chain, indices + done, squared_distances + done);
    lower_by(&work, indices + done, accepted);
    done += accepted;
    if (options.batch > 0) continue;
    if (accepted < kFewPicks && batch == kLargestBatch) singly(std::min(kSinglePicks, count - done));
    if (accepted < batch / 16) batch = std::min(2 * batch, kLargestBatch);
  }
  if (statistics != nullptr) *statistics = run.statistics;
}

}  // namespace patchcore
