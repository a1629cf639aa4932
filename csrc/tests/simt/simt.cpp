// The scheduler of the SIMT runner: which thread goes on when one waits, what is reported when none can, and the host's side of a launch.
#include "simt.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <unordered_map>
#include <utility>

namespace simt {

State state;

namespace {

// What the scheduler alone needs.
Fiber host;
Fiber* entered_from = nullptr;                 // what changed to a fiber that starts
std::vector<std::unique_ptr<Thread>> threads;  // of the block; more may lie ready
std::vector<std::unique_ptr<Fiber>> fibers;    // as many as threads ever were under way at once
std::vector<Fiber*> free_fibers;
size_t num_threads = 0;
size_t num_returned = 0;
size_t num_at_barrier = 0;
const Thread* first_at_barrier = nullptr;
int barrier_sum = 0;  // true values brought so far
int barrier_result = 0;
std::string failure;
const Configuration* running = nullptr;
void (*kernel_body)(const void*) = nullptr;
const void* kernel_context = nullptr;

cudaError_t last_error = cudaSuccess;
std::unordered_map<const void*, int> shared_attribute;  // cudaFuncAttributeMaxDynamicSharedMemorySize of each kernel

constexpr size_t kSharedWithoutAttribute = size_t{48} << 10;
// Without AddressSanitizer, bytes behind the dynamic shared memory that must keep their poison.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kFence = 0;
#else
constexpr size_t kFence = 64;
#endif

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

std::string name_of(const Thread& thread) { return text("thread (%u, %u, %u)", thread.index.x, thread.index.y, thread.index.z); }

std::string place_of(const Thread& thread) { return text("%s at %s:%d", thread.waits_in, thread.site.file, thread.site.line); }

Thread& thread_of(const Warp& warp, unsigned lane) { return *threads[static_cast<size_t>(&warp - state.warps) * kLanes + lane]; }

unsigned first_of(uint32_t lanes) { return static_cast<unsigned>(__builtin_ctz(lanes)); }

// One of the set bits.
unsigned any_of(uint32_t bits) {
  const uint32_t turn = random_below(32);
  const uint32_t turned = turn == 0 ? bits : bits >> turn | bits << (32 - turn);
  return (first_of(turned) + turn) % 32;
}

// A thread that can run, or null.
Thread* next_thread() {
  uint32_t turn = state.turn;
  const bool leave = state.order != 0 && random_below(4) == 0;
  while (leave || state.warps[turn].ready == 0) {
    if (state.warps[turn].ready == 0) state.ready_warps &= ~(1u << turn);
    if (state.ready_warps == 0) return nullptr;
    if (state.order != 0) {
      turn = any_of(state.ready_warps);
    } else {
      const uint32_t later = state.ready_warps & ~((2u << turn) - 1);
      turn = first_of(later != 0 ? later : state.ready_warps);
    }
    if (state.warps[turn].ready != 0) break;
  }
  state.turn = turn;
  Warp& warp = state.warps[turn];
  const unsigned lane = state.order != 0 ? any_of(warp.ready) : first_of(warp.ready);
  warp.ready &= ~(1u << lane);
  return &thread_of(warp, lane);
}

// Unwinds the fiber that reports; the others are given up as they stand, and kernels own nothing that would be lost with them.
struct GivenUp {};
[[noreturn]] void give_up(const std::string& what) {
  failure = what;
  throw GivenUp();
}

std::string about(const std::string& where, const std::string& what) {
  return text("simt: %s: block (%u, %u, %u), ", running->name, state.block.x, state.block.y, state.block.z) + where + ": " + what;
}

// Why nobody can run although threads are left.
[[noreturn]] void report_deadlock() {
  for (const Warp& warp : state.warps) {
    if (warp.waiting == 0) continue;
    const unsigned lane = first_of(warp.waiting);
    const Thread& thread = thread_of(warp, lane);
    const uint32_t mask = warp.mask[lane];
    uint32_t same = 0;
    for (unsigned l = 0; l < kLanes; ++l) same |= static_cast<uint32_t>((warp.waiting >> l & 1) != 0 && warp.mask[l] == mask) << l;
    give_up(about(name_of(thread), text("deadlock: %s waits for lanes 0x%08" PRIx32 "; of these 0x%08" PRIx32 " never came (returned 0x%08" PRIx32
                                        ", in __syncthreads 0x%08" PRIx32 ", in collectives with another mask 0x%08" PRIx32 ")",
                                        place_of(thread).c_str(), mask, mask & ~same & warp.lanes, mask & warp.returned, mask & warp.at_barrier,
                                        mask & warp.waiting & ~same)));
  }
  for (const Warp& warp : state.warps) {
    if (warp.at_barrier == 0) continue;
    const Thread& thread = thread_of(warp, first_of(warp.at_barrier));
    give_up(about(name_of(thread),
                  text("%s reached by %zu of %zu threads; the others have returned", place_of(thread).c_str(), num_at_barrier, num_threads)));
  }
  give_up(about(name_of(*state.current), "no thread can run"));
}

// In a shuffled order one of the running thread's copies may land now.
void land_some(Thread& self) {
  if (self.copies.empty() || random_below(2) != 0) return;
  Copy& copy = self.copies[random_below(static_cast<uint32_t>(self.copies.size()))];
  if (!copy.landed) std::memcpy(copy.to, copy.from, 16);
  copy.landed = true;
}

size_t number_of(const Thread& thread) { return static_cast<size_t>(thread.warp - state.warps) * kLanes + thread.lane; }

void begin(Thread& thread, Fiber* fiber) {
  const size_t t = number_of(thread);
  const dim3 block = state.block_dim;
  thread.fiber = fiber;
  thread.index = {static_cast<unsigned>(t % block.x), static_cast<unsigned>(t / block.x % block.y),
                  static_cast<unsigned>(t / (size_t{block.x} * block.y))};
  thread.copies.clear();
  thread.groups = 0;
}

// The running thread has come to its end: who goes on, or null if it was the last.
Thread* finish_thread() {
  Thread& self = *state.current;
  if (!self.copies.empty()) fail(text("returned with %zu asynchronous copies in flight: cp_async_wait is missing", self.copies.size()));
  self.warp->returned |= 1u << self.lane;
  ++num_returned;
  Thread* next = next_thread();
  if (next == nullptr && num_returned < num_threads) report_deadlock();
  return next;
}

// Runs threads one after the other as long as the next one has not started, so that a block whose threads return at once needs one fiber.
void fiber_main() {
  Fiber::entered(*entered_from);
  Fiber& self = *state.current->fiber;
  Thread* next = nullptr;
  do {
    try {
      kernel_body(kernel_context);
      next = finish_thread();
    } catch (const GivenUp&) {
      next = nullptr;
    }
    if (next == nullptr) break;
    state.current = next;
    if (next->fiber == nullptr) begin(*next, &self);
  } while (next->fiber == &self);
  free_fibers.push_back(&self);
  entered_from = &self;
  Fiber::change(self, next != nullptr ? *next->fiber : host, true);
  std::abort();  // a fiber that has ended is not resumed
}

// Gives a thread that starts a fiber of its own.
void start(Thread& thread) {
  if (free_fibers.empty()) {
    fibers.push_back(std::make_unique<Fiber>());
    free_fibers.push_back(fibers.back().get());
  }
  Fiber* fiber = free_fibers.back();
  free_fibers.pop_back();
  fiber->prepare(fiber_main, number_of(thread) % 16 * 272);
  begin(thread, fiber);
}

void prepare_block() {
  num_returned = num_at_barrier = 0;
  barrier_sum = 0;
  state.ready_warps = 0;
  if (free_fibers.size() != fibers.size()) {  // some were given up
    free_fibers.clear();
    for (const std::unique_ptr<Fiber>& fiber : fibers) free_fibers.push_back(fiber.get());
  }
  for (Warp& warp : state.warps) warp.lanes = warp.ready = warp.waiting = warp.at_barrier = warp.returned = 0;
  for (size_t t = 0; t < num_threads; ++t) {
    Thread& thread = *threads[t];
    thread.fiber = nullptr;
    thread.warp = &state.warps[t / kLanes];
    thread.lane = static_cast<unsigned>(t % kLanes);
    thread.warp->lanes |= 1u << thread.lane;
  }
  for (Warp& warp : state.warps) make_ready(warp, warp.lanes);
  std::memset(state.shared, poison(), state.shared_bytes + kFence);
}

void run_block() {
  prepare_block();
  state.turn = 0;
  Thread* first = next_thread();
  start(*first);
  state.current = first;
  entered_from = &host;
  Fiber::change(host, *first->fiber);
  state.current = nullptr;
  if (failure.empty() && std::any_of(state.shared + state.shared_bytes, state.shared + state.shared_bytes + kFence,
                                     [](char byte) { return byte != static_cast<char>(poison()); })) {
    failure = about("some thread", text("wrote past the end of the %zu bytes of dynamic shared memory", state.shared_bytes));
  }
  if (!failure.empty()) throw Error(std::exchange(failure, std::string()));
}

cudaError_t check_configuration(const Configuration& c) {
  const uint64_t block = uint64_t{c.block.x} * c.block.y * c.block.z;
  const bool empty = block == 0 || c.grid.x == 0 || c.grid.y == 0 || c.grid.z == 0;
  const bool large_block = c.block.x > kMostThreads || c.block.y > kMostThreads || c.block.z > 64 || block > kMostThreads;
  const bool large_grid = c.grid.x > 0x7fffffffu || c.grid.y > 65535 || c.grid.z > 65535;
  if (empty || large_block || large_grid) return cudaErrorInvalidConfiguration;
  const auto attribute = shared_attribute.find(c.kernel);
  const size_t asked = attribute == shared_attribute.end() ? 0 : static_cast<size_t>(attribute->second);
  const size_t allowed = std::max(kSharedWithoutAttribute, std::min(asked, static_cast<size_t>(device().shared_bytes_optin)));
  return c.shared_bytes > allowed ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

Device& device() {
  static Device the_device;
  return the_device;
}

void set_order(uint64_t seed) { state.order = seed; }

void fail(const std::string& what) {
  if (state.current == nullptr) throw Error("simt: " + what);
  give_up(about(name_of(*state.current), what));
}

void rest() {
  Thread& self = *state.current;
  if (state.order != 0) land_some(self);
  Thread* next = next_thread();
  if (next == nullptr) report_deadlock();
  if (next == &self) return;
  if (next->fiber == nullptr) start(*next);
  state.current = next;
  entered_from = self.fiber;
  Fiber::change(*self.fiber, *next->fiber);
}

bool complete_meeting(const Warp& warp, uint32_t mask, uint32_t present) {
  const Thread& self = *state.current;
  if ((mask >> self.lane & 1) == 0) fail(place_of(self) + text(": the lane is not in its own mask 0x%08" PRIx32, mask));
  uint32_t other_mask = 0;
  for (unsigned l = 0; l < kLanes; ++l) other_mask |= (warp.mask[l] ^ mask) & -(present >> l & 1);
  if (other_mask != 0) return false;
  for (uint32_t left = present; left != 0; left &= left - 1) {
    const unsigned lane = first_of(left);
    if (warp.complete[lane] == warp.complete[self.lane]) continue;
    fail(text("lanes meet in different collectives: %s and lane %u in %s", place_of(self).c_str(), lane, place_of(thread_of(warp, lane)).c_str()));
  }
  return true;
}

int barrier(bool value, const char* name, Site site) {
  Thread& self = *state.current;
  self.waits_in = name;
  self.site = site;
  if (num_at_barrier == 0) first_at_barrier = &self;
  const Thread* first = first_at_barrier;
  if (site.line != first->site.line || std::strcmp(site.file, first->site.file) != 0) {
    fail(text("threads meet in different barriers: %s, but %s in %s", place_of(self).c_str(), name_of(*first).c_str(), place_of(*first).c_str()));
  }
  self.warp->at_barrier |= 1u << self.lane;
  barrier_sum += value;
  if (++num_at_barrier == num_threads) {
    barrier_result = std::exchange(barrier_sum, 0);
    num_at_barrier = 0;
    for (Warp& warp : state.warps) make_ready(warp, std::exchange(warp.at_barrier, 0u));
    state.turn = 0;
  }
  rest();
  return barrier_result;  // the next barrier is not complete before all have read this
}

void launch(const Configuration& configuration, void (*body)(const void*), const void* context) {
  if (const cudaError_t error = check_configuration(configuration); error != cudaSuccess) {
    last_error = error;
    return;
  }
  if (state.current != nullptr) fail("a kernel launches a kernel");
  running = &configuration;
  kernel_body = body;
  kernel_context = context;
  state.grid_dim = configuration.grid;
  state.block_dim = configuration.block;
  num_threads = size_t{configuration.block.x} * configuration.block.y * configuration.block.z;
  while (threads.size() < num_threads) threads.push_back(std::make_unique<Thread>());
  const std::unique_ptr<char[]> shared(new char[configuration.shared_bytes + kFence]);
  state.shared = shared.get();
  state.shared_bytes = configuration.shared_bytes;
  state.random = (state.order + 1) * 0x9e3779b97f4a7c15u;

  const dim3 grid = configuration.grid;
  const size_t num_blocks = size_t{grid.x} * grid.y * grid.z;
  std::vector<size_t> order(state.order != 0 ? num_blocks : 0);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(static_cast<uint32_t>(i))]);
  for (size_t i = 0; i < num_blocks; ++i) {
    const size_t b = order.empty() ? i : order[i];
    state.block = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / (size_t{grid.x} * grid.y))};
    run_block();
  }
}

cudaError_t set_shared_attribute(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > device().shared_bytes_optin) return last_error = cudaErrorInvalidValue;
  shared_attribute[kernel] = bytes;
  return cudaSuccess;
}

}  // namespace simt

cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return simt::last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unrecognized error code";
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  if (bytes != 0) std::memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes != 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return simt::last_error = cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = simt::device().multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = simt::device().major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = simt::device().minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(simt::kSharedWithoutAttribute);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = simt::device().shared_bytes_optin;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = simt::kMostThreads;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = simt::kLanes;
      return cudaSuccess;
  }
  return simt::last_error = cudaErrorInvalidValue;
}
