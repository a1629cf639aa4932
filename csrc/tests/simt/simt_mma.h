// Plain C++ twins of the kernels' inline PTX, for the SIMT runner (simt.h): core/cuda/mma.cuh includes them in place of its own.
#pragma once

#include <cuda_runtime.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace patchcore {
namespace cuda {
namespace twin {

// The product's own arrays need no checks, and with them `make sanitize` would take ten times as long.
#if defined(__SANITIZE_ADDRESS__)
#define SIMT_UNCHECKED __attribute__((no_sanitize("address", "undefined")))
#else
#define SIMT_UNCHECKED
#endif

struct Product {
  const uint32_t* a;
  uint32_t b[2];
  const int* c;
  int* d;
};

// out[16][8] = a[16][32] * b, with b as pairs of neighbours of k: [16 pairs][8 columns][2].
SIMT_UNCHECKED inline void multiply(const int16_t (&a)[16][32], const int16_t (&b)[16][8][2], int (&out)[16][8]) {
#if defined(__SSE2__)
  // pmaddwd: two products and their sum, for four columns at a time.
  for (int row = 0; row < 16; ++row) {
    __m128i low = _mm_setzero_si128();
    __m128i high = _mm_setzero_si128();
    for (int pair = 0; pair < 16; ++pair) {
      int both;
      std::memcpy(&both, &a[row][2 * pair], 4);
      const __m128i left = _mm_set1_epi32(both);
      low = _mm_add_epi32(low, _mm_madd_epi16(left, _mm_load_si128(reinterpret_cast<const __m128i*>(b[pair][0]))));
      high = _mm_add_epi32(high, _mm_madd_epi16(left, _mm_load_si128(reinterpret_cast<const __m128i*>(b[pair][4]))));
    }
    _mm_store_si128(reinterpret_cast<__m128i*>(&out[row][0]), low);
    _mm_store_si128(reinterpret_cast<__m128i*>(&out[row][4]), high);
  }
#else
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 8; ++col) out[row][col] = 0;
    for (int pair = 0; pair < 16; ++pair) {
      for (int col = 0; col < 8; ++col) out[row][col] += a[row][2 * pair] * b[pair][col][0] + a[row][2 * pair + 1] * b[pair][col][1];
    }
  }
#endif
}

// Lane 4 g + t holds of A the bytes k = 4 t .. 4 t + 3 of rows g and g + 8, then the same 16 columns on; of B, stored by columns, those of column g.
SIMT_UNCHECKED inline void complete_product(void* const* items, uint32_t lanes) {
  if (lanes != 0xffffffffu) simt::fail("mma_s8 needs all 32 lanes of the warp");
  int8_t a_bytes[16][32];
  int8_t b_bytes[16][8][2];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& item = *static_cast<const Product*>(items[lane]);
    const int g = lane / 4;
    const int t = lane % 4;
    for (int i = 0; i < 4; ++i) std::memcpy(&a_bytes[g + i % 2 * 8][4 * t + i / 2 * 16], &item.a[i], 4);
    for (int i = 0; i < 2; ++i) {
      const uint16_t pairs[2] = {static_cast<uint16_t>(item.b[i]), static_cast<uint16_t>(item.b[i] >> 16)};
      std::memcpy(b_bytes[2 * t + 8 * i][g], &pairs[0], 2);
      std::memcpy(b_bytes[2 * t + 8 * i + 1][g], &pairs[1], 2);
    }
  }
  int16_t a[16][32];
  alignas(16) int16_t b[16][8][2];
  alignas(16) int out[16][8];
  for (int i = 0; i < 16 * 32; ++i) (&a[0][0])[i] = (&a_bytes[0][0])[i];
  for (int i = 0; i < 16 * 16; ++i) (&b[0][0][0])[i] = (&b_bytes[0][0][0])[i];
  multiply(a, b, out);
  for (int lane = 0; lane < 32; ++lane) {
    const Product& item = *static_cast<const Product*>(items[lane]);
    for (int i = 0; i < 4; ++i) {  // sums wrap around, as on the device
      item.d[i] = static_cast<int>(static_cast<unsigned>(item.c[i]) + static_cast<unsigned>(out[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]));
    }
  }
}

#undef SIMT_UNCHECKED

struct Rows {
  const void* row;
  uint32_t* r;
};

inline void complete_ldmatrix(void* const* items, uint32_t lanes) {
  if (lanes != 0xffffffffu) simt::fail("ldmatrix_x4 needs all 32 lanes of the warp");
  for (int source = 0; source < 32; ++source) {
    const void* row = static_cast<const Rows*>(items[source])->row;
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) simt::fail("ldmatrix_x4: a row is not aligned to 16 bytes");
    if (!simt::is_shared(row, 16)) simt::fail("ldmatrix_x4: a row is not in the block's dynamic shared memory");
    for (int part = 0; part < 4; ++part) {
      std::memcpy(&static_cast<const Rows*>(items[source % 8 * 4 + part])->r[source / 8], static_cast<const char*>(row) + 4 * part, 4);
    }
  }
}

}  // namespace twin

// D = A B + C by one warp: mma.sync m16n8k32 row.col s32.s8.s8.s32.
inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4], simt::Site site = simt::Site::here()) {
  twin::Product item{a, {b0, b1}, c, d};
  simt::meet(0xffffffffu, &item, twin::complete_product, "mma_s8", site);
}

// Four 8 x 16-byte matrices: lane l brings the address of row l % 8 of matrix l / 8 and gets bytes 4 (l % 4) .. of row l / 4 of each.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, simt::Site site = simt::Site::here()) {
  twin::Rows item{row, r};
  simt::meet(0xffffffffu, &item, twin::complete_ldmatrix, "ldmatrix_x4", site);
}

// 16 bytes from global to shared memory. Until they land, at the wait or in a shuffled order at any time before, the destination holds poison.
inline void cp_async16(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0) simt::fail("cp_async16: not aligned to 16 bytes");
  if (!simt::is_shared(shared, 16)) simt::fail("cp_async16: the destination is not in the block's dynamic shared memory");
  simt::Thread& self = *simt::state.current;
  const bool at_once = simt::state.order != 0 && simt::random_below(4) == 0;
  if (at_once) {
    std::memcpy(shared, global, 16);
  } else {
    std::memset(shared, simt::poison(), 16);
  }
  self.copies.push_back({shared, global, self.groups, at_once});
}

inline void cp_async_commit() { ++simt::state.current->groups; }

// Waits until all but the last kLeft committed groups have landed.
template <int kLeft>
void cp_async_wait() {
  simt::Thread& self = *simt::state.current;
  size_t done = 0;
  for (; done < self.copies.size() && self.copies[done].group + kLeft < self.groups; ++done) {
    const simt::Copy& copy = self.copies[done];
    if (!copy.landed) std::memcpy(copy.to, copy.from, 16);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace cuda
}  // namespace patchcore
