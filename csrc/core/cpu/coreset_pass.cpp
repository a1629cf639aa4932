// The pass of the batched coreset: all rows against a batch of new centres, filtered by codes, the rest evaluated canonically.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu/coreset_run.h"
#include "cpu/rows.h"

namespace patchcore {

namespace {

constexpr int64_t kGroupTiles = 8;  // tiles between two rounds of canonical evaluation
constexpr int64_t kGroupOperands = kGroupTiles * kTileOperands;
constexpr int64_t kRowBlock = 48;  // rows whose codes stay in the first-level cache with a tile
// A dot product of one pair costs as much as the scan spends on so many words: measured 8 ns against 0.02 ns.
constexpr double kDotWords = 400;
constexpr int64_t kSampleBlocks = 4;  // blocks of rows on which a filter is tried

// A slot's scratch memory for the pass.
struct SlotMemory {
  int32_t* survivors;  // [kRowBlock, kGroupOperands]
  int32_t* dots;       // [kGroupOperands]
  float* row;          // [dim], widened
  uint8_t* codes;      // [kRowBlock, 4 * words], of rows that do not lie together
};

SlotMemory slot_memory(const CoresetRun& run, int64_t slot) {
  int32_t* begin = reinterpret_cast<int32_t*>(run.slots + slot * run.slot_bytes);
  int32_t* dots = begin + kRowBlock * kGroupOperands;
  float* row = reinterpret_cast<float*>(dots + kGroupOperands);
  return {begin, dots, row, reinterpret_cast<uint8_t*>(row + (run.rows.dim + 15) / 16 * 16)};
}

// ---- The pass
// Bits of the operands of a tile that the first comparison leaves for each row of a block.
void scan_block(const CoresetRun& run, const Operands& operands, int64_t tile, const uint8_t* codes, int64_t count, const int32_t* floors,
                uint64_t* survivors) {
  const int64_t stride = 4 * run.first.words, at = tile * kTileOperands;
  if (operands.count > kFewPicks || run.first.codes != run.second.codes) {
    level().scan_rows(codes, stride, count, operands.tiles + tile * stride * kTileOperands, operands.start + at, 1, run.first.words, floors,
                      survivors, 1);
    return;
  }
  static constexpr int32_t kAll[kFewPicks] = {0, 1, 2, 3};
  for (int64_t r = 0; r < count; ++r) {
    int32_t dots[kFewPicks];
    level().dots(codes + r * stride, operands.codes, stride, kAll, operands.count, run.first.words, 0, 0, dots);
    survivors[r] = 0;
    for (int64_t o = 0; o < operands.count; ++o) survivors[r] |= static_cast<uint64_t>(dots[o] + operands.start[o] >= floors[r]) << o;
  }
}

// Evaluates what is left for one row, nearest by the second codes first, so that the others face the lowest value. Returns the canonical evaluations.
int64_t rescue(CoresetRun* run, const Operands& operands, int64_t row, const int32_t* survivors, int64_t count, const SlotMemory& memory) {
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
    level().dots(codes.codes + row * stride, operands.codes, stride, survivors, count, codes.words, 0, 0, memory.dots);
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

// Rows which[0 .. count).
void load_block(const CoresetRun& run, const int32_t* which, int64_t count, Block* block) {
  for (int64_t r = 0; r < kRowBlock; ++r) {  // rows beyond the last want nothing
    block->reach[r] = r < count ? run.reach[which[r]] : -INFINITY;
    block->norms[r] = r < count ? run.first.squared_norms[which[r]] : 0;
  }
}

// The first codes of rows which[0 .. count), one behind the other: where they are, or copied to `memory`.
const uint8_t* codes_of(const CoresetRun& run, const int32_t* which, int64_t count, uint8_t* memory) {
  const int64_t bytes = 4 * run.first.words;
  bool together = true;
  for (int64_t r = 0; r < count; ++r) together &= which[r] == which[0] + r;
  if (together) return run.first.codes + which[0] * bytes;
  for (int64_t r = 0; r < count; ++r) std::memcpy(memory + r * bytes, run.first.codes + which[r] * bytes, static_cast<size_t>(bytes));
  return memory;
}

// Lowers rows which[0 .. count), count <= kRowBlock.
void update_block(CoresetRun* run, const Operands& operands, const int32_t* which, int64_t count, const SlotMemory& memory,
                  CoresetStatistics* statistics) {
  Block block;
  load_block(*run, which, count, &block);
  const uint8_t* codes = codes_of(*run, which, count, memory.codes);
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
      statistics->canonical += rescue(run, operands, which[r], memory.survivors + r * kGroupOperands, block.counts[r], memory);
      block.reach[r] = run->reach[which[r]];
    }
  }
}

// The share of pairs that the first comparison leaves, on a few blocks of rows.
double survivor_share(const CoresetRun& run, const Operands& operands) {
  int64_t left = 0, pairs = 0;
  for (int64_t b = 0; b < kSampleBlocks; ++b) {
    const int64_t begin = b * run.rows.count / kSampleBlocks;
    const int64_t count = std::min(kRowBlock, run.rows.count - begin);
    int32_t which[kRowBlock];
    for (int64_t r = 0; r < count; ++r) which[r] = static_cast<int32_t>(begin + r);
    Block block;
    load_block(run, which, count, &block);
    for (int64_t t = 0; t < num_tiles(operands.count); ++t) {
      level().int8_floors(block.reach, block.norms, kRowBlock, operands.tile_residuals[t], block.floors);
      const uint8_t* codes = run.first.codes + begin * 4 * run.first.words;
      const int64_t words = run.first.words;
      level().scan_rows(codes, 4 * words, count, operands.tiles + t * 4 * words * kTileOperands, operands.start + t * kTileOperands, 1, words,
                        block.floors, block.survivors, 1);
      for (int64_t r = 0; r < count; ++r) left += __builtin_popcountll(block.survivors[r]);
    }
    pairs += count * operands.count;
  }
  return static_cast<double>(left) / static_cast<double>(std::max<int64_t>(pairs, 1));
}

}  // namespace

int64_t slot_memory_bytes(const Rows& rows) {
  const int64_t row = (rows.dim + 15) / 16 * 16;  // codes of a row are at most as many
  return (kRowBlock + 1) * kGroupOperands * static_cast<int64_t>(sizeof(int32_t)) + row * 4 + kRowBlock * row;
}

void use_filter(CoresetRun* run, const Codes& first) {
  const bool same = run->first.codes == first.codes;
  run->first = first;
  run->second = run->full;
  if (same) return;
  run->parallel([&](int64_t slot) {
    const Share share = share_of(run->rows.count, slot, run->parallel.num_slots);
    for (int64_t i = share.begin; i < share.end; ++i) run->reach[i] = reach_of(*run, first, i);
  });
}

void choose_filter(CoresetRun* run, const CoresetOptions& options, const int64_t* which, int64_t count, Operands* operands) {
  if (run->prefix.words == 0 || options.prefix < 0) return use_filter(run, run->full);
  use_filter(run, run->prefix);
  if (options.prefix > 0) return;
  const int64_t tried = std::min<int64_t>(count, kGroupOperands);
  gather_operands(run->rows, run->first, run->second, which, tried, StartWith::kNorm, run->parallel, operands);
  if (survivor_share(*run, *operands) * kDotWords > static_cast<double>(run->full.words - run->prefix.words)) use_filter(run, run->full);
}

void update_rows(CoresetRun* run, const Operands& operands, const int32_t* which, int64_t num_rows) {
  std::atomic<int64_t> survivors{0}, canonical{0};
  run->parallel([&](int64_t slot) {
    const SlotMemory memory = slot_memory(*run, slot);
    CoresetStatistics counted;
    // Blocks in turn: rows that lie together are alike, and the slots shall have the same share of the rows that take long.
    for (int64_t begin = slot * kRowBlock; begin < num_rows; begin += run->parallel.num_slots * kRowBlock) {
      update_block(run, operands, which + begin, std::min(kRowBlock, num_rows - begin), memory, &counted);
    }
    survivors += counted.survivors;
    canonical += counted.canonical;
  });
  ++run->statistics.passes;
  run->statistics.pairs += num_rows * operands.count;
  run->statistics.survivors += survivors;
  run->statistics.canonical += canonical;
}

}  // namespace patchcore
