// Memory as the kernels want it, and the kernels called as the bindings call them: on the CPU by the SIMT runner, or with PATCHCORE_GPU on a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/kernels.h"
#include "data.h"

namespace device {

using namespace patchcore;
using data::Vector;

// One value that kernels write: *value after `finished`.
template <class T>
class Value {
 public:
  explicit Value(T value = {}) : memory_(1, value) {}
  T* get() { return memory_.data(); }
  const T& operator*() const { return memory_[0]; }

 private:
  Vector<T> memory_;
};

#if defined(PATCHCORE_GPU)

// Whether the kernels were launched and ended well; the CPU may then read what they wrote.
inline bool finished(cudaError_t launched) {
  const cudaError_t ended = cudaDeviceSynchronize();
  if (launched != cudaSuccess) std::cerr << "launch: " << cudaGetErrorString(launched) << "\n";
  if (ended != cudaSuccess) std::cerr << "kernels: " << cudaGetErrorString(ended) << "\n";
  return launched == cudaSuccess && ended == cudaSuccess;
}

// A GPU has its own order, and as many multiprocessors as it has.
inline void set_order(uint64_t) {}
inline void set_multiprocessors(int) {}

// `bytes` of device memory, filled with what makes no sense, or with PATCHCORE_GPU_UNWRITTEN set not at all (compute-sanitizer tells who reads it).
class Block {
 public:
  explicit Block(int64_t bytes) {
    data::must(cudaMalloc(&memory_, static_cast<size_t>(bytes > 0 ? bytes : 1)), "cudaMalloc");
    if (std::getenv("PATCHCORE_GPU_UNWRITTEN") == nullptr) data::must(cudaMemset(memory_, 0xa5, static_cast<size_t>(bytes)), "cudaMemset");
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { data::must(cudaFree(memory_), "cudaFree"); }
  void* data() { return memory_; }

 private:
  void* memory_ = nullptr;
};

#else

inline bool finished(cudaError_t launched) { return launched == cudaSuccess; }
inline void set_order(uint64_t seed) { simt::set_order(seed); }
inline void set_multiprocessors(int count) { simt::device().multiprocessors = count; }

// `bytes` of memory aligned to 256 bytes, filled with what makes no sense.
class Block {
 public:
  explicit Block(int64_t bytes) : memory_(static_cast<size_t>(bytes) + 256, static_cast<char>(0xa5)) {}
  void* data() { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.data()) + 255) / 256 * 256); }

 private:
  std::vector<char> memory_;
};

#endif

// Written and shuffled orders in turn: a mistake may show in some of them only, and data that differ see different ones.
inline void next_order() {
  static uint64_t order = 0;
  set_order(order++ % 4);
}

struct Neighbors {
  Vector<double> squared_distances;
  Vector<int64_t> indices;
  int32_t flags = 0;

  bool operator==(const Neighbors& other) const { return squared_distances == other.squared_distances && indices == other.indices; }
};

// A bank prepared with random directions as prefixes, however bad they are for the data, and a shuffled order.
class Prepared {
 public:
  Prepared(const Rows& bank, bool with_prefixes)
      : with_prefixes_(with_prefixes), memory_(cuda::prepared_bank_bytes(bank.count, bank.dim, with_prefixes)) {
    const Vector<double> center = data::widened(bank, bank.count / 2);
    std::mt19937_64 random(5);
    Vector<int32_t> order;
    for (int64_t i = 0; i < bank.count; ++i) order.push_back(static_cast<int32_t>(i));
    std::shuffle(order.begin(), order.end(), random);
    Block workspace(cuda::prepare_bank_workspace_bytes(bank.count, bank.dim, with_prefixes));
    std::normal_distribution<double> normal;
    // A row of |A A^T| is the square of one row and about 190 products of two; a few retries where that is not enough.
    const double share = static_cast<double>(bank.dim) + 152 * std::sqrt(static_cast<double>(bank.dim));
    for (double size = 15500 / std::sqrt(share); true; size *= 0.95) {
      Vector<int16_t> matrix;
      for (int64_t i = 0; with_prefixes && i < (cuda::kSeedPrefix + cuda::kLongPrefix) * bank.dim; ++i)
        matrix.push_back(static_cast<int16_t>(std::max(-16000.0, std::min(16000.0, size * normal(random)))));
      Value<int32_t> flags;
      CHECK(finished(cuda::prepare_bank_cuda(bank, center.data(), matrix.data(), order.data(), with_prefixes, workspace.data(), memory_.data(),
                                             flags.get(), nullptr)));
      CHECK((*flags & cuda::kNonFinite) == 0);
      if (*flags == 0) break;  // else the matrix is no contraction
    }
  }

  Neighbors search(const Rows& queries, const Rows& bank, int64_t k, int prefix, cuda::SearchCounters* counters = nullptr) {
    return nearest(queries, bank, memory_.data(), with_prefixes_, k, prefix, counters);
  }

  Vector<float> scores(const Neighbors& found, const Rows& queries, const Rows& bank, int64_t batch, int64_t num_neighbors) {
    return image_scores(found, queries, bank, memory_.data(), with_prefixes_, batch, num_neighbors);
  }

  static Neighbors nearest(const Rows& queries, const Rows& bank, const void* prepared, bool with_prefixes, int64_t k, int prefix,
                           cuda::SearchCounters* counters = nullptr) {
    Neighbors found;
    found.squared_distances.assign(static_cast<size_t>(queries.count * k), -7);
    found.indices.assign(static_cast<size_t>(queries.count * k), -7);
    Value<int32_t> flags;
    Block workspace(cuda::nearest_neighbors_workspace_bytes(queries, bank, prepared != nullptr, with_prefixes, k));
    CHECK(finished(cuda::nearest_neighbors_cuda(queries, bank, prepared, with_prefixes, k, prefix, workspace.data(), found.squared_distances.data(),
                                                found.indices.data(), counters, flags.get(), nullptr)));
    found.flags = *flags;
    return found;
  }

  static Vector<float> image_scores(const Neighbors& found, const Rows& queries, const Rows& bank, const void* prepared, bool with_prefixes,
                                    int64_t batch, int64_t num_neighbors, int32_t* flags_out = nullptr) {
    Vector<float> scores(static_cast<size_t>(batch), -7);
    Block workspace(cuda::image_scores_workspace_bytes(bank, prepared != nullptr, with_prefixes, batch, num_neighbors));
    Value<int32_t> flags;
    CHECK(finished(cuda::image_scores_cuda(found.squared_distances.data(), found.indices.data(), queries, bank, prepared, with_prefixes, batch,
                                           queries.count / batch, num_neighbors, workspace.data(), scores.data(), flags.get(), nullptr)));
    if (flags_out != nullptr)
      *flags_out = *flags;
    else
      CHECK_EQ(*flags, 0);
    return scores;
  }

 private:
  bool with_prefixes_;
  Block memory_;
};

struct Picks {
  Vector<double> state;
  Vector<int64_t> indices;
  Vector<double> squared_distances;

  bool operator==(const Picks& other) const {
    return state == other.state && indices == other.indices && squared_distances == other.squared_distances;
  }
};

class CoresetCodes {
 public:
  explicit CoresetCodes(const Rows& rows) : rows_(rows), memory_(cuda::coreset_codes_bytes(rows.count, rows.dim)) {
    const Vector<double> center = data::widened(rows, 0);
    Block workspace(cuda::coreset_codes_workspace_bytes(rows.dim));
    Value<int32_t> flags;
    CHECK(finished(cuda::coreset_codes_cuda(rows, center.data(), workspace.data(), memory_.data(), flags.get(), nullptr)));
    CHECK_EQ(*flags, 0);
  }

  // `count` further picks; passes are enqueued `chunk` at a time until all are made. Returns the number of passes enqueued.
  int64_t select(int64_t count, int64_t batch, int64_t chunk, Picks* picks) {
    Block workspace(cuda::coreset_workspace_bytes(rows_));
    const size_t before = picks->indices.size();
    picks->indices.resize(before + static_cast<size_t>(count));
    picks->squared_distances.resize(before + static_cast<size_t>(count));
    Vector<int64_t> progress = {-1, -1};
    int64_t passes = 0;
    CHECK(finished(cuda::start_coreset_cuda(rows_, count, batch, workspace.data(), progress.data(), nullptr)));
    while (progress[1] == 0 && passes <= count) {
      CHECK(finished(cuda::coreset_passes_cuda(rows_, memory_.data(), chunk, workspace.data(), picks->state.data(), picks->indices.data() + before,
                                               picks->squared_distances.data() + before, progress.data(), nullptr)));
      passes += chunk;
    }
    CHECK_EQ(progress[0], count);
    CHECK_EQ(progress[1], 1);
    return passes;
  }

  void add(const Vector<int64_t>& picks, Vector<double>* state) {
    Block workspace(cuda::coreset_workspace_bytes(rows_));
    CHECK(finished(
        cuda::add_picks_cuda(rows_, memory_.data(), picks.data(), static_cast<int64_t>(picks.size()), workspace.data(), state->data(), nullptr)));
  }

  void* data() { return memory_.data(); }

 private:
  Rows rows_;
  Block memory_;
};

}  // namespace device
