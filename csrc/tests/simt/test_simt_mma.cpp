// The twins of the inline PTX: matrix products against sums written from their definition, and a pipeline of asynchronous copies.
#include <simt_mma.h>

#include <random>

#include "check.h"

using namespace patchcore::cuda;

namespace {

constexpr uint64_t kOrders = 6;

// One warp: d [16, 8] = a [16, 32] times the transpose of b [8, 32], plus c [16, 8], `repeats` times one after the other. Both operands come from
// shared memory by ldmatrix.
__global__ void product_kernel(const int8_t* a, const int8_t* b, const int* c, int* d, int repeats) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  char* tile = shared + warp * 24 * 32;  // 16 rows of a, then 8 of b
  for (int i = lane; i < 24 * 32; i += 32) tile[i] = static_cast<char>(i < 16 * 32 ? a[warp * 16 * 32 + i] : b[i - 16 * 32]);
  __syncwarp();
  uint32_t left[4];
  uint32_t right[4];
  ldmatrix_x4(left, tile + (lane % 16) * 32 + lane / 16 * 16);
  ldmatrix_x4(right, tile + (16 + lane % 8) * 32 + lane / 8 % 2 * 16);
  int sum[4];
  const int at = warp * 16 * 8 + lane / 4 * 8 + lane % 4 * 2;
  const int places[4] = {at, at + 1, at + 64, at + 65};
  for (int i = 0; i < 4; ++i) sum[i] = c[places[i]];
  for (int r = 0; r < repeats; ++r) mma_s8(sum, left, right[0], right[1], sum);
  for (int i = 0; i < 4; ++i) d[places[i]] = sum[i];
}

// Sums of columns, with rows of 16 bytes a thread fetched kStages ahead.
constexpr int kStages = 3;
__global__ void pipeline_kernel(const int* rows, int num_rows, int* sums) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  const int t = static_cast<int>(threadIdx.x);
  const int width = static_cast<int>(blockDim.x) * 4;
  int* stages = reinterpret_cast<int*>(shared);
  const auto fetch = [&](int row) {
    if (row < num_rows) cp_async16(stages + row % kStages * width + 4 * t, rows + row * width + 4 * t);
    cp_async_commit();
  };
  for (int row = 0; row < kStages - 1; ++row) fetch(row);
  int sum[4] = {};
  for (int row = 0; row < num_rows; ++row) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    fetch(row + kStages - 1);
    for (int i = 0; i < 4; ++i) sum[i] += stages[row % kStages * width + (4 * t + i + 4) % width];  // what the next thread fetched
  }
  for (int i = 0; i < 4; ++i) sums[(4 * t + i + 4) % width] = sum[i];
}

}  // namespace

TEST(products_equal_their_definition) {
  std::mt19937 random(1);
  const int warps = 3;
  std::vector<int8_t> a(warps * 16 * 32);
  std::vector<int8_t> b(8 * 32);
  std::vector<int> c(warps * 16 * 8);
  for (int8_t& v : a) v = static_cast<int8_t>(random());
  for (int8_t& v : b) v = static_cast<int8_t>(random());
  for (int& v : c) v = static_cast<int>(random() % 2000001) - 1000000;
  for (int k = 0; k < 32; ++k) a[static_cast<size_t>(k)] = b[static_cast<size_t>(k)] = -128;  // the largest sum there is
  for (uint64_t order = 0; order < kOrders; ++order) {
    simt::set_order(order);
    std::vector<int> d(c.size());
    PATCHCORE_LAUNCH(product_kernel, 1, 32 * warps, warps * 24 * 32, nullptr, a.data(), b.data(), c.data(), d.data(), 5);
    for (size_t row = 0; row < 16 * warps; ++row) {
      for (size_t col = 0; col < 8; ++col) {
        int sum = 0;
        for (size_t k = 0; k < 32; ++k) sum += a[row * 32 + k] * b[col * 32 + k];
        CHECK_EQ(d[row * 8 + col], c[row * 8 + col] + 5 * sum);
      }
    }
  }
}

TEST(pipelines_of_copies_are_right_under_every_order) {
  const int threads = 64;
  const int num_rows = 11;
  std::vector<int4> rows(threads * num_rows);
  int* values = reinterpret_cast<int*>(rows.data());
  for (int i = 0; i < threads * num_rows * 4; ++i) values[i] = i * i % 1009;
  for (uint64_t order = 0; order < kOrders; ++order) {
    simt::set_order(order);
    std::vector<int> sums(threads * 4);
    PATCHCORE_LAUNCH(pipeline_kernel, 1, threads, kStages * threads * 16, nullptr, values, num_rows, sums.data());
    for (int col = 0; col < threads * 4; ++col) {
      int sum = 0;
      for (int row = 0; row < num_rows; ++row) sum += values[row * threads * 4 + col];
      CHECK_EQ(sums[static_cast<size_t>(col)], sum);
    }
  }
}

TEST_MAIN()
