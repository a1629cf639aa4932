// The k smallest (squared distance, index) pairs seen so far, as a binary heap in the caller's memory with the worst of them on top.
#pragma once

#include <algorithm>
#include <cstdint>

namespace patchcore {

struct Neighbor {
  double squared_distance;
  int64_t index;

  bool operator<(const Neighbor& other) const {
    return squared_distance < other.squared_distance || (squared_distance == other.squared_distance && index < other.index);
  }
};

class NeighborHeap {
 public:
  NeighborHeap(Neighbor* storage, int64_t capacity) : begin_(storage), end_(storage), limit_(storage + capacity) {}

  void offer(Neighbor candidate) {
    if (end_ != limit_) {
      *end_++ = candidate;
      std::push_heap(begin_, end_);
    } else if (candidate < *begin_) {
      std::pop_heap(begin_, end_);
      end_[-1] = candidate;
      std::push_heap(begin_, end_);
    }
  }

  // Ascending order; the heap is spent. Returns the number of neighbours.
  int64_t sort() {
    std::sort_heap(begin_, end_);
    return end_ - begin_;
  }

 private:
  Neighbor* begin_;
  Neighbor* end_;
  Neighbor* limit_;
};

}  // namespace patchcore
