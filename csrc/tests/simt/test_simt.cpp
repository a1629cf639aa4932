// The SIMT runner with kernels that are right: the same results under every order, and what the host's side allows and refuses.
#include <cuda_runtime.h>

#include <cmath>
#include <numeric>
#include <random>

#include "check.h"

namespace {

constexpr uint64_t kOrders = 6;  // 0, as written, and five seeds

// Block sums by a tree in shared memory, one warp at the end by shuffles.
__global__ void __launch_bounds__(128) sum_kernel(const int* __restrict__ values, int count, int* sums) {
  PATCHCORE_DYNAMIC_SHARED(memory);
  int* partial = reinterpret_cast<int*>(memory);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int t = static_cast<int>(threadIdx.x);
  partial[t] = i < count ? values[i] : 0;
  __syncthreads();
  for (int width = 64; width >= 32; width /= 2) {
    if (t < width) partial[t] += partial[t + width];
    __syncthreads();
  }
  if (t >= 32) return;
  int sum = partial[t];
#pragma unroll
  for (int width = 16; width > 0; width /= 2) sum += __shfl_down_sync(0xffffffffu, sum, static_cast<unsigned>(width));
  if (t == 0) sums[blockIdx.x] = sum;
}

// Transposes through a padded tile.
template <class T, int kTile>
__global__ void transpose_kernel(const T* in, T* out, int rows, int cols) {
  PATCHCORE_DYNAMIC_SHARED(memory);
  T* tile = reinterpret_cast<T*>(memory);
  const int x = static_cast<int>(threadIdx.x);
  const int y = static_cast<int>(threadIdx.y);
  const int row = static_cast<int>(blockIdx.y) * kTile + y;
  const int col = static_cast<int>(blockIdx.x) * kTile + x;
  if (row < rows && col < cols) tile[y * (kTile + 1) + x] = in[row * cols + col];
  __syncthreads();
  const int to_row = static_cast<int>(blockIdx.x) * kTile + y;
  const int to_col = static_cast<int>(blockIdx.y) * kTile + x;
  if (to_row < cols && to_col < rows) out[to_row * rows + to_col] = tile[x * (kTile + 1) + y];
}

// The last block to finish, told by an atomic counter, adds up what all wrote.
__global__ void last_block_kernel(unsigned* counter, long long* partial, unsigned long long* total) {
  PATCHCORE_DYNAMIC_SHARED(memory);
  int* last = reinterpret_cast<int*>(memory);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = blockIdx.x + 1;
    __threadfence();
    *last = atomicAdd(counter, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (*last == 0) return;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) atomicAdd(total, static_cast<unsigned long long>(partial[b]));
}

struct Collectives {
  int across, up, down, segment, own;
  double wide;
  unsigned ballot, match;
  int any, all, count, some;
};

__global__ void collectives_kernel(const __grid_constant__ Collectives start, Collectives* out) {
  const int t = static_cast<int>(threadIdx.x);
  const unsigned full = 0xffffffffu;
  Collectives c = start;
  c.across = __shfl_xor_sync(full, t, 5);
  c.up = __shfl_up_sync(full, t, 3, 8);
  c.down = __shfl_down_sync(full, t, 3u, 8);
  c.segment = __shfl_sync(full, t, 9, 8);
  c.wide = __shfl_sync(full, t + 0.5, 31 - t % 32);
  c.ballot = __ballot_sync(full, t % 3 == 0);
  c.match = __match_any_sync(full, t % 4);
  c.any = __any_sync(full, t == 40);
  c.all = __all_sync(full, t < 32);
  // Halves of a warp at different places with masks of their own.
  if (t % 2 == 0) {
    c.own = __shfl_sync(0x55555555u, t, 2);
  } else {
    c.own = __shfl_sync(0xaaaaaaaau, t, 3);
  }
  __syncwarp();
  c.count = __syncthreads_count(t < 37);
  c.some = __syncthreads_or(t == 63) + 2 * __syncthreads_or(0) + 4 * __syncthreads_and(1) + 8 * __syncthreads_and(t != 5);
  out[t] = c;
}

__global__ void atomics_kernel(unsigned long long* keys, int* ints, double* sum, unsigned* lock) {
  const int value = static_cast<int>((threadIdx.x * 37 + blockIdx.x * 11) % 101) - 50;
  atomicMin(&ints[0], value);
  atomicMax(&ints[1], value);
  atomicOr(&ints[2], 1 << (threadIdx.x % 20));
  atomicAnd(&ints[3], ~(1 << (threadIdx.x % 5)));
  atomicMax(keys, static_cast<unsigned long long>(value + 50) << 32 | threadIdx.x);
  atomicAdd(sum, 0.25);
  if (atomicCAS(lock, 0, 1 + threadIdx.x) == 0) atomicExch(&ints[4], value);
}

__global__ void ragged_kernel(unsigned* out) {  // a last warp that lacks lanes
  __syncwarp();
  const unsigned ballot = __ballot_sync(0xffffffffu, 1);
  out[threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)] = ballot;
}

__global__ void nothing_kernel(int* calls) { *calls += 1; }

__global__ void static_shared_kernel(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x * blockIdx.x);
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = values[63 - threadIdx.x];
}

}  // namespace

TEST(sums_are_right_under_every_order) {
  std::vector<int> values(1000);
  std::iota(values.begin(), values.end(), -300);
  for (uint64_t order = 0; order < kOrders; ++order) {
    simt::set_order(order);
    std::vector<int> sums(8, -1);
    PATCHCORE_LAUNCH(sum_kernel, 8, 128, 128 * sizeof(int), nullptr, values.data(), 1000, sums.data());
    CHECK_EQ(cudaGetLastError(), cudaSuccess);
    for (int b = 0; b < 8; ++b) CHECK_EQ(sums[b], std::accumulate(&values[b * 128], values.data() + std::min(b * 128 + 128, 1000), 0));
  }
}

TEST(templates_and_blocks_of_two_dimensions_are_launched) {
  const int rows = 37;
  const int cols = 21;
  std::vector<double> in(rows * cols);
  std::iota(in.begin(), in.end(), 0.5);
  for (uint64_t order = 0; order < kOrders; ++order) {
    simt::set_order(order);
    std::vector<double> out(in.size());
    PATCHCORE_LAUNCH((transpose_kernel<double, 16>), dim3(2, 3), dim3(16, 16), 16 * 17 * sizeof(double), nullptr, in.data(), out.data(), rows, cols);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < cols; ++c) CHECK_EQ(out[c * rows + r], in[r * cols + c]);
    }
  }
}

TEST(the_last_block_sees_all_others) {
  for (uint64_t order = 0; order < kOrders; ++order) {
    simt::set_order(order);
    unsigned counter = 0;
    unsigned long long total = 0;
    std::vector<long long> partial(100);
    PATCHCORE_LAUNCH(last_block_kernel, 100, 64, 16, nullptr, &counter, partial.data(), &total);
    CHECK_EQ(total, 5050u);
  }
}

TEST(collectives_give_what_the_manual_says) {
  for (uint64_t order = 0; order < kOrders; ++order) {
    simt::set_order(order);
    std::vector<Collectives> out(64);
    PATCHCORE_LAUNCH(collectives_kernel, 1, 64, 0, nullptr, Collectives{}, out.data());
    for (int t = 0; t < 64; ++t) {
      const Collectives& c = out[static_cast<size_t>(t)];
      const int warp = t / 32 * 32;
      CHECK_EQ(c.across, t ^ 5);
      CHECK_EQ(c.up, t % 8 >= 3 ? t - 3 : t);
      CHECK_EQ(c.down, t % 8 < 5 ? t + 3 : t);
      CHECK_EQ(c.segment, t / 8 * 8 + 1);
      CHECK_EQ(c.wide, warp + 31 - t % 32 + 0.5);
      for (int l = 0; l < 32; ++l) {
        CHECK_EQ(static_cast<int>(c.ballot >> l & 1), (warp + l) % 3 == 0);
        CHECK_EQ(static_cast<int>(c.match >> l & 1), l % 4 == t % 4);
      }
      CHECK_EQ(c.any, warp == 32);
      CHECK_EQ(c.all, warp == 0);
      CHECK_EQ(c.own, warp + 2 + t % 2);
      CHECK_EQ(c.count, 37);
      CHECK_EQ(c.some, 5);
    }
  }
}

TEST(atomics_add_up) {
  for (uint64_t order = 0; order < kOrders; ++order) {
    simt::set_order(order);
    unsigned long long key = 0;
    int ints[5] = {1000, -1000, 0, -1, 1000};
    double sum = 0;
    unsigned lock = 0;
    PATCHCORE_LAUNCH(atomics_kernel, 7, 101, 0, nullptr, &key, ints, &sum, &lock);
    CHECK_EQ(ints[0], -50);
    CHECK_EQ(ints[1], 50);
    CHECK_EQ(ints[2], (1 << 20) - 1);
    CHECK_EQ(ints[3], ~31);
    CHECK(ints[4] >= -50 && ints[4] <= 50);
    CHECK_EQ(key >> 32, 100u);
    CHECK_EQ(sum, 7 * 101 * 0.25);
    CHECK(lock >= 1 && lock <= 101);
  }
}

TEST(a_warp_may_lack_lanes) {
  for (uint64_t order = 0; order < kOrders; ++order) {
    simt::set_order(order);
    std::vector<unsigned> out(42);
    PATCHCORE_LAUNCH(ragged_kernel, 1, dim3(7, 3, 2), 0, nullptr, out.data());
    for (size_t t = 0; t < 42; ++t) CHECK_EQ(out[t], t < 32 ? 0xffffffffu : 0x3ffu);
  }
}

TEST(static_shared_memory_belongs_to_the_block_that_runs) {
  std::vector<int> out(3 * 64);
  PATCHCORE_LAUNCH(static_shared_kernel, 3, 64, 0, nullptr, out.data());
  for (int i = 0; i < 3 * 64; ++i) CHECK_EQ(out[static_cast<size_t>(i)], (63 - i % 64) * (i / 64));
}

TEST(orders_differ_and_repeat) {
  const auto winner = [](uint64_t order) {
    simt::set_order(order);
    unsigned long long key = 0;
    int ints[5] = {};
    double sum = 0;
    unsigned lock = 0;
    PATCHCORE_LAUNCH(atomics_kernel, 7, 101, 0, nullptr, &key, ints, &sum, &lock);
    return lock;
  };
  CHECK_EQ(winner(0), 1u);  // the first thread
  CHECK_EQ(winner(7), winner(7));
  bool differ = false;
  for (uint64_t order = 2; order < 8; ++order) differ |= winner(order) != winner(1);
  CHECK(differ);
}

TEST(configurations_that_a_device_refuses_are_refused) {
  int calls = 0;
  const auto error_of = [&](dim3 grid, dim3 block, size_t shared_bytes) {
    PATCHCORE_LAUNCH(nothing_kernel, grid, block, shared_bytes, nullptr, &calls);
    return cudaGetLastError();
  };
  simt::set_order(0);
  for (const dim3 grid : {dim3(0), dim3(1, 0), dim3(1, 1, 0), dim3(1, 65536), dim3(1, 1, 65536), dim3(1u << 31)}) {
    CHECK_EQ(error_of(grid, 32, 0), cudaErrorInvalidConfiguration);
  }
  for (const dim3 block : {dim3(0), dim3(1025), dim3(32, 33), dim3(1, 1, 65), dim3(16, 0)}) {
    CHECK_EQ(error_of(1, block, 0), cudaErrorInvalidConfiguration);
  }
  CHECK_EQ(calls, 0);
  CHECK_EQ(error_of(dim3(1, 65535), 1, 0), cudaSuccess);
  CHECK_EQ(error_of(1, 1024, 48 << 10), cudaSuccess);
  CHECK_EQ(calls, 65535 + 1024);
}

TEST(much_shared_memory_needs_the_attribute) {
  int calls = 0;
  const auto error_of = [&](size_t shared_bytes) {
    PATCHCORE_LAUNCH(nothing_kernel, 1, 1, shared_bytes, nullptr, &calls);
    CHECK_EQ(cudaPeekAtLastError() == cudaSuccess, calls == 1);
    calls = 0;
    return cudaGetLastError();
  };
  const auto allow = [](int bytes) { return cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); };
  CHECK_EQ(error_of((48 << 10) + 1), cudaErrorInvalidValue);
  CHECK_EQ(allow(100 << 10), cudaSuccess);
  CHECK_EQ(error_of(100 << 10), cudaSuccess);
  CHECK_EQ(error_of((100 << 10) + 1), cudaErrorInvalidValue);
  CHECK_EQ(allow((227 << 10) + 1), cudaErrorInvalidValue);
  CHECK_EQ(cudaGetLastError(), cudaErrorInvalidValue);
  CHECK_EQ(allow(227 << 10), cudaSuccess);
  CHECK_EQ(error_of(227 << 10), cudaSuccess);
  CHECK_EQ(error_of((227 << 10) + 1), cudaErrorInvalidValue);
  simt::device().shared_bytes_optin = 64 << 10;  // sm_75
  CHECK_EQ(error_of(227 << 10), cudaErrorInvalidValue);
  CHECK_EQ(allow(65 << 10), cudaErrorInvalidValue);
  CHECK_EQ(cudaGetLastError(), cudaErrorInvalidValue);
  simt::device() = {};
}

TEST(the_device_is_what_tests_make_it) {
  int value = 0;
  int id = -1;
  CHECK_EQ(cudaGetDevice(&id), cudaSuccess);
  CHECK_EQ(id, 0);
  CHECK_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, id), cudaSuccess);
  CHECK_EQ(value, 3);
  simt::device().multiprocessors = 108;
  simt::device().major = 7;
  simt::device().minor = 5;
  CHECK_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, id), cudaSuccess);
  CHECK_EQ(value, 108);
  CHECK_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, id), cudaSuccess);
  CHECK_EQ(value, 7);
  CHECK_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMinor, id), cudaSuccess);
  CHECK_EQ(value, 5);
  CHECK_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, id), cudaSuccess);
  CHECK_EQ(value, 227 << 10);
  CHECK_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, 1), cudaErrorInvalidDevice);
  CHECK_EQ(std::string(cudaGetErrorString(cudaGetLastError())), std::string("invalid device ordinal"));
  simt::device() = {};
}

TEST(intrinsics_equal_their_definitions) {
  CHECK_EQ(__ffs(0), 0);
  CHECK_EQ(__ffs(INT_MIN), 32);
  CHECK_EQ(__ffsll(1ll << 40), 41);
  CHECK_EQ(__clz(0), 32);
  CHECK_EQ(__clz(1), 31);
  CHECK_EQ(__clzll(0), 64);
  CHECK_EQ(__clzll(1ll << 40), 23);
  CHECK_EQ(__popc(0xf0f0u), 8);
  CHECK_EQ(__popcll(~0ull), 64);
  CHECK_EQ(__brev(1u), 0x80000000u);
  CHECK_EQ(__brev(0x12345678u), 0x1e6a2c48u);
  CHECK_EQ(__dp4a(static_cast<int>(0x80ff027fu), static_cast<int>(0x8001fe7fu), 10), 128 * 128 - 1 - 4 + 127 * 127 + 10);
  CHECK_EQ(__dp4a(0x80ff027fu, 0x8001fe7fu, 10u), 128u * 128 + 255 + 2 * 254 + 127 * 127 + 10);
  CHECK_EQ(min(-1, 1) + max(2ll, 3ll), 2);
  CHECK_EQ(__longlong_as_double(__double_as_longlong(-0.1)), -0.1);
  CHECK_EQ(__float_as_uint(1.0f), 0x3f800000u);
  CHECK_EQ(__uint_as_float(0x40000000u), 2.0f);
  CHECK_EQ(__fmaf_rn(1 + 0x1p-12f, 1 + 0x1p-12f, -1.0f), 0x1p-11f + 0x1p-24f);  // not rounded in between
  CHECK_EQ(__double2int_rn(2.5), 2);
  CHECK(__double2float_rd(0.1) < 0.1 && __double2float_ru(0.1) > 0.1);
  CHECK_EQ(std::nextafter(__double2float_rd(0.1), 1.0f), __double2float_ru(0.1));
}

TEST_MAIN()
