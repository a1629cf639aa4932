// The caller's threads. Core code starts none of its own: the PyTorch binding hands in torch's intra-op pool, the C++ tests a few std::threads.
//
// Kernels split their work into `num_slots` shares; a slot is a share of the work together with its part of the workspace. Which thread runs which
// slot, and when, must not matter, and it does not: slots write disjoint outputs, or partial results that are merged under a total order.
#pragma once

#include <cstdint>

#include "cpu/float_environment.h"

namespace patchcore {

struct Parallel {
  using Body = void (*)(void* context, int64_t slot);

  // Runs body(context, slot) once for every slot in [0, num_slots), in any order, and returns when all are done.
  void (*run)(void* pool, int64_t num_slots, Body body, void* context);
  void* pool;
  int64_t num_slots;

  template <class F>
  void operator()(F&& body) const {
    struct Context {
      F& body;
    } context{body};
    run(
        pool, num_slots,
        [](void* data, int64_t slot) {
          const FloatEnvironment ieee;
          static_cast<Context*>(data)->body(slot);
        },
        &context);
  }
};

// The share [begin, end) of `count` items that belongs to `slot`.
struct Share {
  int64_t begin;
  int64_t end;
};

inline Share share_of(int64_t count, int64_t slot, int64_t num_slots) {
  const int64_t each = count / num_slots;
  const int64_t rest = count % num_slots;
  const int64_t begin = slot * each + (slot < rest ? slot : rest);
  return {begin, begin + each + (slot < rest ? 1 : 0)};
}

// One thread, the caller's.
inline Parallel serial() {
  return {[](void*, int64_t num_slots, Parallel::Body body, void* context) {
            for (int64_t slot = 0; slot < num_slots; ++slot) body(context, slot);
          },
          nullptr, 1};
}

}  // namespace patchcore
