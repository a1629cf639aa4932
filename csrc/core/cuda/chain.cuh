// The greedy loop among candidates, in parallel rounds instead of pick by pick. One block.
//
// Given: candidates with keys k_i (their squared distance to the picks so far), the best key outside, `excluded`, and for every pair with
// d2(i, j) < min(k_i, k_j) an edge. "Before" is the order of picks: the larger key, the lower row among equals. The sequential loop picks the first
// candidate in that order, lowers the other keys to min(key, d2), and goes on while the first one comes before `excluded`.
//
// A round: an open candidate i with its current key c_i is SAFE when no open j that comes before it has d2(i, j) < c_i. All safe ones are picked
// together; then each lowers its open neighbours that come after it; then whoever does not come before `excluded` any more is out. The accepted ones,
// sorted by (value, row), are the sequential picks, with their values. Why:
//
//  1. Keys only fall, so the sequential picks come in the order of their values: sorting restores the sequence.
//  2. A safe i is picked with the value c_i. Suppose the sequence lowers it further before its turn; let j be the first open one that does:
//     d2(i, j) < c_i, and j is picked before i. At that moment i's key is still c_i (j is the first to lower it), so j's value v_j comes before
//     (c_i, i). Keys fall: c_j >= v_j, so (c_j, j) comes before (c_i, i) too, and i was not safe.
//  3. A resolved pick r, of value v_r, matters to an open j only if (v_r, r) comes before (c_j, j). If j comes before r, then d2(r, j) >= v_r, or r
//     would not have been safe; should j fall behind r later, its key is then at most v_r <= d2(r, j): skipping it once is skipping it for good. So
//     each pick lowers its neighbours once, in the round it is made in, and minima commute: no order of the edges matters.
//  4. Who does not come before `excluded` never will, and lowers nobody who does: it comes after them.
//  5. The first open candidate is always safe: every round makes progress.
//  6. Blocking and lowering are done to the one that comes after the other: its key is then the smaller of the two, and keys only fall. So a pair
//     with d2 >= min(k_i, k_j) changes neither: no edge is missing.
#pragma once

#include "common.cuh"

namespace patchcore::cuda {

constexpr int kChainThreads = 1024;

struct Edge {
  int32_t i, j;  // places among the candidates
  double distance;
};

// kBlocked: open, but an open one before it could still lower it in this round.
enum CandidateState : uint8_t { kOpen, kBlocked, kSafe, kTaken, kOut };

// Shared memory of the block. Keys are the bits of squared distances, which are ordered like them.
struct Chain {
  unsigned long long* keys;  // [candidates]
  int32_t* rows;             // [candidates]
  uint32_t* blocked;         // [candidates / 32] bits
  int32_t* counters;         // [2]: open candidates are left; accepted
  uint16_t* accepted;        // [candidates] places
  uint8_t* states;           // [candidates]
};

constexpr int chain_bytes(int candidates) { return candidates * (8 + 4 + 2 + 1) + candidates / 8 + 16; }  // 4096: less than the 64 KiB of sm_75

__device__ __forceinline__ Chain chain_at(char* shared, int candidates) {
  Chain chain;
  chain.keys = reinterpret_cast<unsigned long long*>(shared);
  chain.rows = reinterpret_cast<int32_t*>(chain.keys + candidates);
  chain.blocked = reinterpret_cast<uint32_t*>(chain.rows + candidates);
  chain.counters = reinterpret_cast<int32_t*>(chain.blocked + candidates / 32);
  chain.accepted = reinterpret_cast<uint16_t*>(chain.counters + 4);
  chain.states = reinterpret_cast<uint8_t*>(chain.accepted + candidates);
  return chain;
}

__device__ __forceinline__ unsigned long long bits_of(double value) { return static_cast<unsigned long long>(__double_as_longlong(value)); }
__device__ __forceinline__ double value_of(unsigned long long bits) { return __longlong_as_double(static_cast<long long>(bits)); }
__device__ __forceinline__ bool before(unsigned long long key_a, int32_t row_a, unsigned long long key_b, int32_t row_b) {
  return key_a > key_b || (key_a == key_b && row_a < row_b);
}

__device__ __forceinline__ void load_chain(const Chain& chain, const double* keys, const int32_t* rows, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kChainThreads) {
    chain.keys[i] = bits_of(keys[i]);
    chain.rows[i] = rows[i];
    chain.states[i] = kOpen;
  }
  for (int i = static_cast<int>(threadIdx.x); i < (count + 31) / 32; i += kChainThreads) chain.blocked[i] = 0;
  if (threadIdx.x < 2) chain.counters[threadIdx.x] = 0;
  __syncthreads();
}

// Lists the accepted candidates: returns their number, to all threads.
__device__ __forceinline__ int list_accepted(const Chain& chain, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kChainThreads) {
    if (chain.states[i] == kTaken) chain.accepted[atomicAdd(&chain.counters[1], 1)] = static_cast<uint16_t>(i);
  }
  __syncthreads();
  return chain.counters[1];
}

// A thread keeps those of its edges, every kChainThreads-th, that can still change something (6): between two open ones, and below the key of the
// later one. They move up among its own, so that nobody else's are overwritten.
__device__ __forceinline__ int run_chain(const Chain& chain, int count, double excluded, int32_t excluded_row, Edge* edges, int num_edges) {
  const int thread = static_cast<int>(threadIdx.x);
  // A picked row's mark, -1, says that there is none outside: 0 with no row, which everything comes before.
  const unsigned long long limit = excluded < 0 ? 0 : bits_of(excluded);
  int end = num_edges;  // of this thread's edges
  for (;;) {
    for (int i = thread; i < count; i += kChainThreads) {
      if (chain.states[i] == kSafe) chain.states[i] = kTaken;
      if (chain.states[i] > kBlocked) continue;
      const bool open = before(chain.keys[i], chain.rows[i], limit, excluded_row);
      chain.states[i] = open ? kOpen : kOut;
      if (open) chain.counters[0] = 1;
    }
    __syncthreads();
    const bool open = chain.counters[0] != 0;
    if (!open) break;  // in all threads alike
    int kept = thread;
    for (int e = thread; e < end; e += kChainThreads) {
      const Edge edge = edges[e];
      if (chain.states[edge.i] != kOpen || chain.states[edge.j] != kOpen) continue;
      const bool first = before(chain.keys[edge.i], chain.rows[edge.i], chain.keys[edge.j], chain.rows[edge.j]);
      const int later = first ? edge.j : edge.i;
      if (!(bits_of(edge.distance) < chain.keys[later])) continue;
      atomicOr(&chain.blocked[later / 32], 1u << (later % 32));
      edges[kept] = edge;
      kept += kChainThreads;
    }
    end = kept;
    __syncthreads();
    if (thread == 0) chain.counters[0] = 0;
    for (int i = thread; i < count; i += kChainThreads) {
      if (chain.states[i] == kOpen) chain.states[i] = (chain.blocked[i / 32] >> (i % 32) & 1) != 0 ? kBlocked : kSafe;
    }
    __syncthreads();
    for (int i = thread; i < (count + 31) / 32; i += kChainThreads) chain.blocked[i] = 0;
    for (int e = thread; e < end; e += kChainThreads) {
      const Edge edge = edges[e];
      // An edge that was kept blocks the later of the two, so a safe one is the earlier. Others may lower the same key meanwhile (point 3).
      if (chain.states[edge.i] == kSafe) atomicMin(&chain.keys[edge.j], bits_of(edge.distance));
      if (chain.states[edge.j] == kSafe) atomicMin(&chain.keys[edge.i], bits_of(edge.distance));
    }
    __syncthreads();
  }
  return list_accepted(chain, count);
}

// The first candidate alone: what is always right, whatever the edges.
__device__ __forceinline__ int accept_first(const Chain& chain, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kChainThreads) {
    bool first = true;
    for (int j = 0; j < count && first; ++j) first = j == i || before(chain.keys[i], chain.rows[i], chain.keys[j], chain.rows[j]);
    if (first) chain.states[i] = kTaken;
  }
  __syncthreads();
  return list_accepted(chain, count);
}

// Calls take(rank, value, row) for every accepted candidate, in any order.
template <class Take>
__device__ __forceinline__ void rank_accepted(const Chain& chain, int accepted, Take&& take) {
  for (int a = static_cast<int>(threadIdx.x); a < accepted; a += kChainThreads) {
    const int i = chain.accepted[a];
    int rank = 0;
    for (int b = 0; b < accepted; ++b) {
      const int j = chain.accepted[b];
      rank += before(chain.keys[j], chain.rows[j], chain.keys[i], chain.rows[i]);
    }
    take(rank, value_of(chain.keys[i]), chain.rows[i]);
  }
}

}  // namespace patchcore::cuda
