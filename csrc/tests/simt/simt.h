// Runs CUDA kernels, compiled unchanged by a C++ compiler, on the CPU: what their tests need on a machine without a GPU.
//
// A launch runs its grid at once, block after block. The threads of a block are fibers (fiber.h); a thread runs until it waits for others, in
// __syncthreads or in a collective of its warp, and then hands over to a thread that is ready. The lane that comes last to a collective works out
// the results of all lanes and goes on, so that a collective costs one change of stacks a lane.
//
// The order in which threads run is an accident on a GPU, and here it is set_order's: 0 is the order as written (blocks, warps and lanes by index; a
// warp runs until it waits for the block); any other number seeds a shuffled order, in which lanes, warps and blocks come at random, change at
// collectives and atomics, and asynchronous copies land at any time. A correct kernel gives the same result under every order, so tests run a few.
//
// Mistakes that are reported, as an Error thrown by the launch: waiting for threads that never come, lanes of a warp meeting in different
// collectives, __syncthreads at different places at once, writing past the end of dynamic shared memory, addresses that an instruction cannot
// take, asynchronous copies never waited for. Mistakes that show as wrong results, in some order: missing barriers, reading shared memory that
// nobody wrote (each block starts with poison in every byte), copies waited for too late.
//
// Stricter than a device: a lane that has returned may not be named in the mask of a collective that others enter, nor may a thread have returned
// when others enter __syncthreads. A device lets both pass where nothing depends on them. Lanes that a block's last warp lacks may be named.
//
// Not shown: races between plain accesses without a barrier or atomic between them to change threads at, memory order, speed, registers, what inline
// PTX does (simt_mma.h has twins for it), and waiting by spinning, which never ends here. One host thread may launch at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

constexpr int kLanes = 32;
constexpr int kMostThreads = 1024;

// What a launch throws when the kernel is wrong: "simt: <kernel>: block (x, y, z), thread (x, y, z): <what>".
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// 0: as written; else the seed of a shuffled order.
void set_order(uint64_t seed);

// The device that the host code sees; tests may change it.
struct Device {
  int multiprocessors = 3;
  int major = 8;
  int minor = 0;
  int shared_bytes_optin = 227 << 10;  // dynamic shared memory of a block, after cudaFuncSetAttribute
};
Device& device();

// A place in the source; here() as a default argument is the place of the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// 16 bytes on their way from global to shared memory.
struct Copy {
  void* to;
  const void* from;
  int group;
  bool landed;
};

struct Warp;

struct Thread {
  Fiber* fiber;  // null: not started
  uint3 index;   // threadIdx
  Warp* warp;
  unsigned lane;
  const char* waits_in;  // the barrier or collective
  Site site;
  std::vector<Copy> copies;
  int groups;  // committed groups of copies
};

// Works out the results of a collective: items[lane] is what each lane of `mask` brought.
using Complete = void (*)(void* const* items, uint32_t mask);

// Sets of lanes; the running thread is in none of the last four.
struct Warp {
  uint32_t lanes;  // those that exist: a block's last warp may lack some
  uint32_t ready;
  uint32_t waiting;  // in a collective
  uint32_t at_barrier;
  uint32_t returned;
  uint32_t mask[kLanes];  // of the collective that the lane waits in
  Complete complete[kLanes];
  void* item[kLanes];
};

struct State {
  Thread* current = nullptr;
  uint3 block{};  // blockIdx
  dim3 block_dim, grid_dim;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  uint64_t order = 0;
  uint64_t random = 1;
  uint32_t ready_warps = 0;  // a set bit may be out of date, a clear one may not
  uint32_t turn = 0;         // the warp that ran last
  Warp warps[kMostThreads / kLanes];
};
extern State state;

// Reports a mistake of the running thread; the launch throws.
[[noreturn]] void fail(const std::string& what);

// Hands over to a thread that is ready; the caller has put the running one into the set in which it waits.
void rest();

// __syncthreads and its kin: waits for all threads of the block; how many brought a true value.
int barrier(bool value, const char* name, Site site);

// Reports lanes that do not agree in what they do; whether all lanes of `mask` wait in the collective in which the running lane is.
bool complete_meeting(const Warp& warp, uint32_t mask, uint32_t present);

// What memory holds before it is written: as a float, double or int a large negative number under even orders and a large positive one under odd
// ones, so that a sum, a minimum or a maximum that takes it in is wrong under one of any two neighbouring orders.
inline int poison() { return state.order % 2 == 0 ? 0xf0 : 0x7f; }

inline uint32_t random_below(uint32_t count) {  // xorshift64
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  state.random ^= state.random << 17;
  return static_cast<uint32_t>(((state.random >> 32) * count) >> 32);
}

inline void make_ready(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (lanes != 0) state.ready_warps |= 1u << (&warp - state.warps);
}

// A place where a shuffled order may change threads although nothing is waited for.
inline void interrupt() {
  if (state.order == 0 || random_below(4) != 0) return;
  make_ready(*state.current->warp, 1u << state.current->lane);
  rest();
}

// A collective of the warp: waits for all lanes of `mask`; the last one calls complete.
inline void meet(uint32_t mask, void* item, Complete complete, const char* name, Site site) {
  Thread& self = *state.current;
  Warp& warp = *self.warp;
  const uint32_t bit = 1u << self.lane;
  self.waits_in = name;
  self.site = site;
  warp.mask[self.lane] = mask;
  warp.complete[self.lane] = complete;
  warp.item[self.lane] = item;
  warp.waiting |= bit;
  const uint32_t present = mask & warp.lanes;
  if ((mask & bit) != 0 && (warp.waiting & present) != present) {
    rest();
    return;
  }
  if (!complete_meeting(warp, mask, present)) {
    rest();
    return;
  }
  complete(warp.item, present);
  warp.waiting &= ~present;
  make_ready(warp, present & ~bit);
  interrupt();
}

// Whether [address, address + bytes) is dynamic shared memory of the block.
inline bool is_shared(const void* address, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(state.shared);
  return at < state.shared_bytes && bytes <= state.shared_bytes - at;
}

// The host's side of a launch. A configuration that a device would refuse sets the error that cudaGetLastError returns, and nothing runs.
struct Configuration {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
};
void launch(const Configuration& configuration, void (*body)(const void* context), const void* context);

template <class... Parameters>
struct Launch {
  void (*kernel)(Parameters...);
  Configuration configuration;

  void operator()(Parameters... arguments) const {
    const auto body = [&] { kernel(arguments...); };
    launch(configuration, [](const void* context) { (*static_cast<decltype(&body)>(context))(); }, &body);
  }
};

template <class... Parameters>
Launch<Parameters...> prepare_launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, const void*) {
  return {kernel, {name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes}};
}

}  // namespace simt
