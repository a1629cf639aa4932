// The candidates of the batched coreset and the greedy chain among them (coreset.h).
#include <algorithm>
#include <cmath>

#include "cpu/coreset_run.h"

namespace patchcore {

Selection select_candidates(CoresetRun* run, int64_t batch) {
  const int64_t wanted = batch + 1;  // one more: the best excluded
  const auto before = [](const Candidate& a, const Candidate& b) { return a.before(b); };
  constexpr int64_t kMostSlots = 256;
  int64_t kept[kMostSlots];
  const int64_t slots = std::min(run->parallel.num_slots, kMostSlots);
  run->parallel([&](int64_t slot) {
    if (slot >= slots) return;
    const Share share = share_of(run->num_active, slot, slots);
    Candidate* begin = run->candidates + share.begin;
    Candidate* end = begin;
    for (int64_t a = share.begin; a < share.end; ++a) {
      const int64_t i = run->active[a];
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
    const Candidate* begin = run->candidates + share_of(run->num_active, slot, slots).begin;
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

int64_t run_chain(CoresetRun* run, const Selection& selection, double threshold, int64_t count, Chain* chain, int64_t* indices,
                  double* squared_distances) {
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
    if (pick.squared_distance == kPicked || pick.squared_distance < threshold || !pick.before(selection.excluded)) break;
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

}  // namespace patchcore
