// The batched coreset (coreset.h): batches of candidates, and the rows that are left behind.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/coreset_run.h"
#include "cpu/float_environment.h"

namespace patchcore {

namespace {

constexpr int64_t kFirstBatch = 2048;
constexpr int64_t kSinglePicks = 64;      // after a full batch that gave hardly any: one pick a pass for so many
constexpr double kThresholdShare = 0.85;  // of the largest value, squared: 0.8 to 0.9 measured alike, 0.94 worse
constexpr int64_t kMissedPicks = 1024;    // that rows catch up by at a time

// The first of the active rows in the order of picks.
Candidate best_active(const CoresetRun& run) {
  Candidate best = kNoCandidate;
  for (int64_t a = 0; a < run.num_active; ++a) {
    const Candidate candidate = {run.state[run.active[a]], run.active[a]};
    if (candidate.squared_distance != kPicked && candidate.before(best)) best = candidate;
  }
  return best;
}

// One pick a pass while the best row is not below the threshold, at most `count` picks: where a batch yields hardly any, the pass by the shortest
// codes alone is the cheapest. Returns their number.
int64_t pick_singly(CoresetRun* run, double threshold, int64_t count, Operands* operands, int64_t* indices, double* squared_distances) {
  use_filter(run, run->prefix.words == 0 ? run->full : run->prefix);
  run->second = run->first;
  for (int64_t p = 0; p < count; ++p) {
    const Candidate best = best_active(*run);
    if (best.squared_distance < threshold) return p;
    indices[p] = best.index;
    squared_distances[p] = best.squared_distance;
    run->state[best.index] = kPicked;
    run->reach[best.index] = -INFINITY;
    gather_operands(run->rows, run->first, run->second, &best.index, 1, StartWith::kNorm, serial(), operands);
    update_rows(run, *operands, run->active, run->num_active);
  }
  return count;
}

// How the workspace is cut: [reach N][candidates N][active N][returning N][places N + 1][history N][operands][operands of the chain][chain values,
// floors, rows][picked][slots].
struct Layout {
  int64_t reach, candidates, active, returning, places, history, operands, chain_operands, values, floors, rows, order, slots, total;
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
  layout.active = take(rows.count * 4);
  layout.returning = take(rows.count * 4);
  layout.places = take((rows.count + 1) * 4);
  layout.history = take(rows.count * 8);
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

// A run and the memory of its operands.
struct Workspace {
  CoresetRun run;
  Layout layout;
  char* memory;

  Operands operands(int64_t capacity) const { return operands_at(capacity, run.rows.dim, run.first, run.second, memory + layout.operands); }
};

Workspace start(const Rows& rows, const void* codes, const Parallel& parallel, void* workspace, double* min_squared_distances) {
  char* memory = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(workspace) + 63) / 64 * 64);
  CoresetRun run = {rows,
                    parallel,
                    min_squared_distances,
                    nullptr,
                    nullptr,
                    nullptr,
                    rows.count,
                    {},
                    {},
                    {},
                    {},
                    canonical_slack(rows.dim),
                    nullptr,
                    slot_memory_bytes(rows),
                    {}};
  coreset_codes_inside(rows, codes, &run.prefix, &run.full);
  const Layout layout = lay_out(rows, run.full, parallel);
  run.reach = reinterpret_cast<double*>(memory + layout.reach);
  run.candidates = reinterpret_cast<Candidate*>(memory + layout.candidates);
  run.active = reinterpret_cast<int32_t*>(memory + layout.active);
  for (int64_t i = 0; i < rows.count; ++i) run.active[i] = static_cast<int32_t>(i);
  run.slots = memory + layout.slots;
  run.second = run.full;
  return {run, layout, memory};
}

// Lowers rows which[0 .. num_rows) by the picks, at most kLargestBatch of them. Tiles hold operands of like residuals, so that the largest of a tile
// is not much larger than the others.
void lower_by(Workspace* work, const int64_t* picks, int64_t count, const int32_t* which, int64_t num_rows) {
  CoresetRun& run = work->run;
  int64_t* order = reinterpret_cast<int64_t*>(work->memory + work->layout.order);
  std::copy(picks, picks + count, order);
  std::sort(order, order + count, [&](int64_t a, int64_t b) {
    const float residual_a = run.first.residuals[a], residual_b = run.first.residuals[b];
    return residual_a < residual_b || (residual_a == residual_b && a < b);
  });
  Operands operands = work->operands(count);
  gather_operands(run.rows, run.first, run.second, order, count, StartWith::kNorm, run.parallel, &operands);
  update_rows(&run, operands, which, num_rows);
}

// ---- Rows left behind -----------------------------------------------------------------------------------------------------------------------------

// Keeps the threshold, and who is active (coreset.h).
class Followers {
 public:
  Followers(Workspace* work, const CoresetBehind* behind)
      : work_(*work),
        lowered_(behind == nullptr ? nullptr : behind->lowered),
        history_(reinterpret_cast<int64_t*>(work->memory + work->layout.history)),
        returning_(reinterpret_cast<int32_t*>(work->memory + work->layout.returning)),
        places_(reinterpret_cast<int32_t*>(work->memory + work->layout.places)) {
    if (lowered_ == nullptr) return;
    num_picks_ = behind->count;
    std::copy(behind->picks, behind->picks + num_picks_, history_);
    CoresetRun& run = work_.run;
    run.num_active = 0;
    for (int64_t i = 0; i < run.rows.count; ++i) {
      if (lowered_[i] == kUpToDate) {
        run.active[run.num_active++] = static_cast<int32_t>(i);
      } else if (run.state[i] >= threshold_) {
        threshold_ = std::nextafter(run.state[i], INFINITY);  // above the values of all rows left behind
      }
    }
  }

  // What a row must not be below to be picked.
  double threshold() const { return threshold_; }

  // Active rows have been lowered by these picks.
  void add(const int64_t* picks, int64_t count) {
    if (lowered_ == nullptr) return;
    std::copy(picks, picks + count, history_ + num_picks_);
    num_picks_ += count;
  }

  // Makes the largest value that of an active row. Rows below the threshold are left behind.
  void settle() {
    if (lowered_ == nullptr) return;
    double largest = leave_behind();
    if (threshold_ == -INFINITY && largest >= 0) threshold_ = kThresholdShare * largest;
    while (largest < threshold_) {
      const double bound = largest_behind();
      threshold_ = bound >= 0 ? kThresholdShare * bound : -INFINITY;  // no rows but picks
      catch_up();
      largest = leave_behind();
    }
  }

 private:
  // Drops active rows below the threshold, and picks; returns the largest value of the others, kPicked if there are none.
  double leave_behind() {
    CoresetRun& run = work_.run;
    double largest = kPicked;
    int64_t left = 0;
    for (int64_t a = 0; a < run.num_active; ++a) {
      const int32_t i = run.active[a];
      const double value = run.state[i];
      if (value == kPicked) continue;
      if (value < threshold_) {
        lowered_[i] = static_cast<int32_t>(num_picks_);
        continue;
      }
      run.active[left++] = i;
      largest = std::max(largest, value);
    }
    run.num_active = left;
    return largest;
  }

  double largest_behind() const {
    double largest = kPicked;
    for (int64_t i = 0; i < work_.run.rows.count; ++i) {
      if (lowered_[i] != kUpToDate) largest = std::max(largest, work_.run.state[i]);
    }
    return largest;
  }

  // Lowers the rows behind with values from the threshold on by the picks that they have missed: those that have missed most come first, and the
  // others join them.
  void catch_up() {
    CoresetRun& run = work_.run;
    std::fill(places_, places_ + num_picks_ + 1, 0);
    const auto returns = [&](int64_t i) { return lowered_[i] != kUpToDate && run.state[i] >= threshold_; };
    for (int64_t i = 0; i < run.rows.count; ++i) {
      if (returns(i)) ++places_[lowered_[i]];
    }
    int32_t count = 0;
    for (int64_t p = 0; p <= num_picks_; ++p) {
      const int32_t here = places_[p];
      places_[p] = count;
      count += here;
    }
    for (int64_t i = 0; i < run.rows.count; ++i) {
      if (returns(i)) returning_[places_[lowered_[i]]++] = static_cast<int32_t>(i);
    }
    int64_t joined = 0;
    for (int64_t begin = count > 0 ? lowered_[returning_[0]] : num_picks_; begin < num_picks_; begin += kMissedPicks) {
      const int64_t end = std::min(begin + kMissedPicks, num_picks_);
      while (joined < count && lowered_[returning_[joined]] < end) ++joined;
      lower_by(&work_, history_ + begin, end - begin, returning_, joined);
    }
    for (int64_t r = 0; r < count; ++r) {
      lowered_[returning_[r]] = kUpToDate;
      run.active[run.num_active++] = returning_[r];
    }
  }

  Workspace& work_;
  int32_t* lowered_;  // [N], or null: no row is left behind
  int64_t* history_;  // [N], the picks so far
  int32_t* returning_;
  int32_t* places_;  // [N + 1]
  int64_t num_picks_ = 0;
  double threshold_ = -INFINITY;
};

}  // namespace

int64_t batched_coreset_workspace_bytes(const Rows& rows, const void* codes, const Parallel& parallel) {
  Codes prefix, full;
  coreset_codes_inside(rows, codes, &prefix, &full);
  return lay_out(rows, full, parallel).total;
}

void batched_add_picks_cpu(const Rows& rows, const void* codes, const int64_t* picks, int64_t count, const Parallel& parallel, void* workspace,
                           double* min_squared_distances, CoresetStatistics* statistics) {
  const FloatEnvironment ieee;  // the chain and the choice of a plan run on the caller's thread
  Workspace work = start(rows, codes, parallel, workspace, min_squared_distances);
  Operands tried = operands_at(kLargestBatch, rows.dim, work.run.full, work.run.full, work.memory + work.layout.operands);
  for (int64_t done = 0; done < count; done += kLargestBatch) {
    const int64_t added = std::min(kLargestBatch, count - done);
    choose_filter(&work.run, {}, picks + done, added, &tried);
    lower_by(&work, picks + done, added, work.run.active, rows.count);
  }
  for (int64_t i = 0; i < count; ++i) min_squared_distances[picks[i]] = kPicked;
  if (statistics != nullptr) *statistics = work.run.statistics;
}

void batched_greedy_coreset_cpu(const Rows& rows, const void* codes, int64_t count, const CoresetOptions& options, const Parallel& parallel,
                                void* workspace, double* min_squared_distances, const CoresetBehind* behind, int64_t* indices,
                                double* squared_distances, CoresetStatistics* statistics) {
  const FloatEnvironment ieee;  // the chain and the choice of a plan run on the caller's thread
  Workspace work = start(rows, codes, parallel, workspace, min_squared_distances);
  CoresetRun& run = work.run;
  Chain chain = {{},
                 reinterpret_cast<double*>(work.memory + work.layout.values),
                 reinterpret_cast<int32_t*>(work.memory + work.layout.floors),
                 reinterpret_cast<int64_t*>(work.memory + work.layout.rows)};
  Operands tried = operands_at(kLargestBatch, rows.dim, run.full, run.full, work.memory + work.layout.operands);
  int64_t batch = std::min(options.batch > 0 ? options.batch : kFirstBatch, kLargestBatch);
  int64_t done = 0;
  Followers followers(&work, behind);
  if (behind != nullptr) use_filter(&run, run.prefix.words == 0 ? run.full : run.prefix);  // rows may have to catch up before anything is picked
  const auto singly = [&](int64_t picks) {
    const int64_t accepted = pick_singly(&run, followers.threshold(), picks, &tried, indices + done, squared_distances + done);
    followers.add(indices + done, accepted);
    done += accepted;
  };
  followers.settle();
  while (done < count) {
    if (options.single > 0) {
      singly(count - done);
      followers.settle();
      continue;
    }
    const Selection selection = select_candidates(&run, batch);
    for (int64_t i = 0; i < selection.count; ++i) chain.rows[i] = run.candidates[i].index;
    choose_filter(&run, options, chain.rows, selection.count, &tried);
    chain.operands = operands_at(selection.count, rows.dim, run.first, run.second, work.memory + work.layout.chain_operands);
    gather_operands(rows, run.first, run.second, chain.rows, selection.count, StartWith::kNothing, parallel, &chain.operands);
    const int64_t accepted = run_chain(&run, selection, followers.threshold(), count - done, &chain, indices + done, squared_distances + done);
    lower_by(&work, indices + done, accepted, run.active, run.num_active);
    followers.add(indices + done, accepted);
    done += accepted;
    followers.settle();
    if (options.batch > 0) continue;
    if (accepted < kFewPicks && batch == kLargestBatch) {
      singly(std::min(kSinglePicks, count - done));
      followers.settle();
    }
    if (accepted < batch / 16) batch = std::min(2 * batch, kLargestBatch);
  }
  if (statistics != nullptr) *statistics = run.statistics;
}

}  // namespace patchcore
