// Small kernels, each right as written and wrong in one way: the runner must show every mistake, as an Error or as a wrong result in some order, and
// must not complain about what is right.
#include <simt_mma.h>

#include <string>

#include "check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sys/wait.h>
#include <unistd.h>
#endif

using namespace patchcore::cuda;

namespace {

constexpr uint64_t kOrders = 10;
constexpr int kThreads = 96;

// What happens in all orders together.
struct Outcome {
  int wrong = 0;  // orders with a wrong result
  int reported = 0;
  std::string report;  // the last one
};

// Runs launch() under every order; it returns whether the result is right.
template <class F>
Outcome outcome_of(F&& launch) {
  Outcome outcome;
  for (uint64_t order = 0; order < kOrders; ++order) {
    simt::set_order(order);
    try {
      outcome.wrong += !launch();
    } catch (const simt::Error& error) {
      ++outcome.reported;
      outcome.report = error.what();
    }
  }
  return outcome;
}

template <class F>
void check_right(F&& launch) {
  const Outcome outcome = outcome_of(launch);
  CHECK_EQ(outcome.wrong, 0);
  CHECK_EQ(outcome.reported, 0);
  if (outcome.reported != 0) std::cerr << outcome.report << "\n";
}

template <class F>
void check_wrong_result(F&& launch) {
  CHECK(outcome_of(launch).wrong > 0);
}

// Reported under every order, with `part` in the message.
template <class F>
void check_reported(const char* part, F&& launch) {
  const Outcome outcome = outcome_of(launch);
  CHECK_EQ(outcome.reported, static_cast<int>(kOrders));
  CHECK(outcome.report.find("_kernel") != std::string::npos && outcome.report.find("block (") != std::string::npos);
  CHECK(outcome.report.find(part) != std::string::npos);
  if (outcome.report.find(part) == std::string::npos) std::cerr << outcome.report << "\n";
}

bool equals_reversed(const std::vector<int>& out) {
  bool equal = true;
  for (int t = 0; t < kThreads; ++t) equal &= out[static_cast<size_t>(t)] == kThreads - 1 - t;
  return equal;
}

enum class Mistake {
  kNone,
  kNoBarrier,
  kNoSecondBarrier,
  kNotWritten,
  kSomeSkipBarrier,
  kTwoBarriers,
  kOneBarrierMore,
  kPastTheEnd,
  kNoSyncwarp,
  kLaneMissing,
  kLaneReturned,
  kOutsideMask,
  kOtherCollective,
  kOtherMask,
  kNoWait,
  kOneGroupTooFew,
  kBarrierBeforeWait,
  kOverwritten,
  kUnaligned,
  kNotShared,
  kHalfAWarp,
};

// Reverses the threads' numbers through shared memory, twice.
template <Mistake kMistake>
__global__ void barrier_kernel(int* out) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  int* values = reinterpret_cast<int*>(shared);
  const int t = static_cast<int>(threadIdx.x);
  if (kMistake != Mistake::kNotWritten || t != 7) values[t] = t;
  if (kMistake == Mistake::kPastTheEnd && t == 50) shared[kThreads * 4 + 3] = 1;
  if (kMistake == Mistake::kTwoBarriers && t >= 32) {
    __syncthreads();
  } else if (kMistake == Mistake::kSomeSkipBarrier ? t != 5 : kMistake != Mistake::kNoBarrier) {
    __syncthreads();
  }
  const int once = values[kThreads - 1 - t];
  if constexpr (kMistake != Mistake::kNoSecondBarrier) __syncthreads();
  values[t] = once ^ 1000;
  __syncthreads();
  if (kMistake == Mistake::kOneBarrierMore && t < 64) __syncthreads();
  out[t] = values[t] ^ 1000;
}

// Reverses within a warp by shared memory, and between the warps by reading elsewhere.
template <Mistake kMistake>
__global__ void warp_kernel(int* out) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  int* values = reinterpret_cast<int*>(shared);
  const int t = static_cast<int>(threadIdx.x);
  const int lane = t % 32;
  const unsigned full = 0xffffffffu;
  values[t] = kThreads - 1 - t;
  if constexpr (kMistake != Mistake::kNoSyncwarp) __syncwarp();
  int value = values[t - lane + 31 - lane];
  if (kMistake == Mistake::kLaneReturned && lane == 9) return;
  if (kMistake == Mistake::kOtherCollective && lane == 9) {
    value = static_cast<int>(__ballot_sync(full, value));
  } else if (kMistake == Mistake::kOtherMask && lane < 4) {
    value = __shfl_sync(0xffffu, value, 31 - lane);
  } else if (kMistake == Mistake::kOutsideMask) {
    value = __shfl_sync(0xfffffffeu, value, 31 - lane);
  } else if (kMistake != Mistake::kLaneMissing || lane != 9) {
    value = __shfl_sync(full, value, 31 - lane);
  }
  out[t] = value;
}

// Reverses what asynchronous copies bring in `kRounds` groups, 16 bytes a thread and round, two rounds in flight.
constexpr int kRounds = 4;
template <Mistake kMistake>
__global__ void copy_kernel(const int4* in, int* out) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  const int t = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int round) {
    if (round < kRounds) cp_async16(shared + (round % 2 * kThreads + t) * 16 + (kMistake == Mistake::kUnaligned ? 4 : 0), in + round * kThreads + t);
    cp_async_commit();
  };
  fetch(0);
  unsigned sum = 0;  // poison may add up to more than an int
  for (int round = 0; round < kRounds; ++round) {
    if (kMistake == Mistake::kOverwritten) fetch(round + 1);
    if constexpr (kMistake == Mistake::kBarrierBeforeWait) __syncthreads();
    if constexpr (kMistake == Mistake::kOneGroupTooFew) {
      cp_async_wait<1>();
    } else if constexpr (kMistake != Mistake::kNoWait) {
      if (kMistake == Mistake::kOverwritten) {
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
    }
    if constexpr (kMistake != Mistake::kBarrierBeforeWait) __syncthreads();
    if (kMistake != Mistake::kOverwritten) fetch(round + 1);
    sum += reinterpret_cast<const uint4*>(shared)[round % 2 * kThreads + kThreads - 1 - t].y;
  }
  if constexpr (kMistake == Mistake::kOneGroupTooFew) cp_async_wait<0>();
  out[t] = static_cast<int>(sum);
}

template <Mistake kMistake>
__global__ void matrix_kernel(int* out) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  alignas(16) char local[16] = {};
  const int t = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 16; ++i) shared[t * 16 + i] = static_cast<char>(t);
  __syncwarp();
  if (kMistake == Mistake::kHalfAWarp && t % 32 >= 16) return;
  uint32_t r[4];
  ldmatrix_x4(r, kMistake == Mistake::kNotShared && t == 3 ? local : shared + t * 16 + (kMistake == Mistake::kUnaligned ? 2 : 0));
  if (kMistake == Mistake::kNotShared || kMistake == Mistake::kUnaligned) return;
  out[t] = static_cast<int>(r[t % 4] % 256);
}

// One thread's value is missing where it is not the one that decides the minimum and the maximum.
enum class Reduction { kSum, kMinimum, kMaximum };
template <Reduction kReduction, Mistake kMistake>
__global__ void reduction_kernel(double* out) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  double* values = reinterpret_cast<double*>(shared);
  const int t = static_cast<int>(threadIdx.x);
  if (kMistake != Mistake::kNotWritten || t != 7) values[t] = 1 + t;
  __syncthreads();
  double result = values[0];
  for (int i = 1; i < kThreads; ++i) {
    if constexpr (kReduction == Reduction::kSum) result += values[i];
    if constexpr (kReduction == Reduction::kMinimum) result = fmin(result, values[i]);
    if constexpr (kReduction == Reduction::kMaximum) result = fmax(result, values[i]);
  }
  if (t == 0) *out = result;
}

template <Reduction kReduction, Mistake kMistake>
bool run_reduction() {
  double out = -1;
  PATCHCORE_LAUNCH((reduction_kernel<kReduction, kMistake>), 1, kThreads, kThreads * 8, nullptr, &out);
  return out == (kReduction == Reduction::kSum ? kThreads * (kThreads + 1) / 2 : kReduction == Reduction::kMinimum ? 1 : kThreads);
}

template <Reduction kReduction>
void check_reduction() {
  check_right(run_reduction<kReduction, Mistake::kNone>);
  check_wrong_result(run_reduction<kReduction, Mistake::kNotWritten>);
}

template <Mistake kMistake>
bool run_barrier() {
  std::vector<int> out(kThreads, -1);
  PATCHCORE_LAUNCH(barrier_kernel<kMistake>, 1, kThreads, kThreads * 4, nullptr, out.data());
  return equals_reversed(out);
}

template <Mistake kMistake>
bool run_warp() {
  std::vector<int> out(kThreads, -1);
  PATCHCORE_LAUNCH(warp_kernel<kMistake>, 1, kThreads, kThreads * 4, nullptr, out.data());
  return equals_reversed(out);
}

template <Mistake kMistake>
bool run_copy() {
  std::vector<int4> in(kRounds * kThreads);
  for (int round = 0; round < kRounds; ++round) {
    for (int t = 0; t < kThreads; ++t) in[static_cast<size_t>(round * kThreads + t)] = {-1, round == 2 ? t : 0, -1, -1};
  }
  std::vector<int> out(kThreads, -1);
  PATCHCORE_LAUNCH(copy_kernel<kMistake>, 1, kThreads, 2 * kThreads * 16, nullptr, in.data(), out.data());
  return equals_reversed(out);
}

template <Mistake kMistake>
bool run_matrix() {
  std::vector<int> out(kThreads, -1);
  PATCHCORE_LAUNCH(matrix_kernel<kMistake>, 1, kThreads, kThreads * 16, nullptr, out.data());
  bool equal = true;
  for (int t = 0; t < kThreads; ++t) equal &= out[static_cast<size_t>(t)] == t / 32 * 32 + t % 4 * 8 + t % 32 / 4;
  return equal;
}

}  // namespace

TEST(right_kernels_pass) {
  check_right(run_barrier<Mistake::kNone>);
  check_right(run_warp<Mistake::kNone>);
  check_right(run_copy<Mistake::kNone>);
  check_right(run_matrix<Mistake::kNone>);
}

TEST(missing_barriers_show) {
  check_wrong_result(run_barrier<Mistake::kNoBarrier>);
  check_wrong_result(run_barrier<Mistake::kNoSecondBarrier>);
  check_wrong_result(run_warp<Mistake::kNoSyncwarp>);
}

TEST(shared_memory_never_written_shows) {
  check_wrong_result(run_barrier<Mistake::kNotWritten>);
  check_reduction<Reduction::kSum>();
  check_reduction<Reduction::kMinimum>();
  check_reduction<Reduction::kMaximum>();
}

TEST(barriers_that_only_some_reach_are_reported) {
  check_reported("threads meet in different barriers", run_barrier<Mistake::kSomeSkipBarrier>);
  check_reported("threads meet in different barriers", run_barrier<Mistake::kTwoBarriers>);
  check_reported("reached by 64 of 96 threads; the others have returned", run_barrier<Mistake::kOneBarrierMore>);
}

TEST(collectives_with_a_lane_missing_are_reported) {
  check_reported("returned 0x00000200", run_warp<Mistake::kLaneMissing>);
  check_reported("of these 0x00000200 never came", run_warp<Mistake::kLaneReturned>);
  check_reported("not in its own mask", run_warp<Mistake::kOutsideMask>);
  check_reported("different collectives", run_warp<Mistake::kOtherCollective>);
  check_reported("deadlock: __shfl_sync at", run_warp<Mistake::kOtherMask>);
  check_reported("never came", run_matrix<Mistake::kHalfAWarp>);
}

TEST(mistakes_with_asynchronous_copies_show) {
  check_reported("asynchronous copies in flight", run_copy<Mistake::kNoWait>);
  check_wrong_result(run_copy<Mistake::kOneGroupTooFew>);
  check_wrong_result(run_copy<Mistake::kBarrierBeforeWait>);
  check_wrong_result(run_copy<Mistake::kOverwritten>);
}

TEST(addresses_are_checked) {
  check_reported("cp_async16: not aligned", run_copy<Mistake::kUnaligned>);
  check_reported("ldmatrix_x4: a row is not aligned", run_matrix<Mistake::kUnaligned>);
  check_reported("not in the block's dynamic shared memory", run_matrix<Mistake::kNotShared>);
}

TEST(the_runner_goes_on_after_a_report) {
  for (int i = 0; i < 3; ++i) {
    check_reported("__syncthreads", run_barrier<Mistake::kSomeSkipBarrier>);
    check_right(run_barrier<Mistake::kNone>);
  }
}

TEST(writes_past_the_end_of_shared_memory_are_caught) {
#if defined(__SANITIZE_ADDRESS__)
  // AddressSanitizer ends the process: a child's, whose last words come through a pipe.
  int ends[2];
  CHECK_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    run_barrier<Mistake::kPastTheEnd>();
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char buffer[4096];
  for (ssize_t bytes; (bytes = read(ends[0], buffer, sizeof buffer)) > 0;) said.append(buffer, static_cast<size_t>(bytes));
  close(ends[0]);
  int status = 0;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(!(WIFEXITED(status) && WEXITSTATUS(status) == 0));
  CHECK(said.find("heap-buffer-overflow") != std::string::npos);
#else
  check_reported("past the end of the 384 bytes of dynamic shared memory", run_barrier<Mistake::kPastTheEnd>);
#endif
}

TEST_MAIN()
