// Cuts a block of memory into aligned pieces.
#pragma once

#include <cstdint>

namespace patchcore {

// Hands out pieces aligned to 64 bytes, one behind the other; with a null block it only counts.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// The first address in `memory` that is aligned to 64 bytes.
inline void* aligned_start(void* memory) { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64); }

}  // namespace patchcore
