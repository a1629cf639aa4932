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
  NeighborHeap() = default;
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

  bool full() const { return end_ == limit_; }

  bool contains(int64_t index) const {
    return std::any_of(begin_, end_, [index](const Neighbor& kept) { return kept.index == index; });
  }

  // The worst of those kept; there is one.
  const Neighbor& worst() const { return *begin_; }

  // Ascending order; the heap is spent. Returns the number of neighbours.
  int64_t sort() {
    std::sort_heap(begin_, end_);
    return end_ - begin_;
  }

 private:
  Neighbor* begin_ = nullptr;
  Neighbor* end_ = nullptr;
  Neighbor* limit_ = nullptr;
};

}  // namespace patchcore
