// All inline PTX of this package. Each function has a plain C++ twin in csrc/tests/simt/simt_mma.h, with which the kernels run on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(PATCHCORE_SIMT)
#include "simt_mma.h"
#else

namespace patchcore::cuda {

// D = A B + C by one warp, exact. A: 16 x 32 int8, row by row; B: 32 x 8 int8, column by column (8 rows of 32 bytes); C, D: 16 x 8 int32.
// Lane 4 g + t holds  a[0]: row g, columns 4t .. 4t + 3;  a[1]: row g + 8;  a[2]: row g, columns 16 + 4t ..;  a[3]: row g + 8, columns 16 + 4t ..;
// b0: column g, rows 4t ..;  b1: column g, rows 16 + 4t ..;  d[0], d[1]: row g, columns 2t, 2t + 1;  d[2], d[3]: row g + 8.
__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else  // sm_75 knows m8n8k16 only: the same fragments in four instructions
  asm volatile(
      "{ .reg .s32 x, y;\n"
      "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {x,y}, {%4}, {%8}, {%10,%11};\n"
      "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%6}, {%9}, {x,y};\n"
      "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {x,y}, {%5}, {%8}, {%12,%13};\n"
      "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%2,%3}, {%7}, {%9}, {x,y}; }\n"
      : "=&r"(d[0]), "=&r"(d[1]), "=&r"(d[2]), "=&r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#endif
}

// Four 8 x 16-byte matrices from shared memory: lane l gives the address of row l % 8 of matrix l / 8, a multiple of 16, and gets in r[i] bytes
// 4 (l % 4) .. of row l / 4 of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 16 bytes from global to shared memory, both 16-byte aligned, behind the thread's back: there after cp_async_wait. sm_75 copies at once.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global) : "memory");
#else
  *static_cast<int4*>(shared) = *static_cast<const int4*>(global);
#endif
}

// Closes a group of copies.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all of this thread's groups but the newest kLeft have landed. Other threads see them after a barrier.
template <int kLeft>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace patchcore::cuda

#endif
