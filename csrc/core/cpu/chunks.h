// The tiles of a bank in chunks: small ones first, while the bound is loose, then larger and larger ones.
#pragma once

#include <algorithm>
#include <cstdint>

namespace patchcore {

constexpr int64_t kChunkTiles = 64;  // most tiles of a chunk

class Chunks {
 public:
  // tight: the bound is a good one from the start, so the first chunk need not be small.
  Chunks(int64_t num_tiles, bool tight) : num_tiles_(num_tiles), end_(0), size_(tight ? 16 : 1) {}

  // Moves on to the next chunk; false behind the last. Boundaries are 0, 1, 2, 4, ..., 64, 128, 192, ...; a tight start leaves out those below 16.
  bool next() {
    begin_ = end_;
    if (begin_ == num_tiles_) return false;
    end_ = std::min(num_tiles_, begin_ + size_);
    size_ = std::min(kChunkTiles, end_);
    return true;
  }

  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

 private:
  int64_t num_tiles_, begin_ = 0, end_, size_;
};

}  // namespace patchcore
