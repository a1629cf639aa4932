// Vectors whose elements the CPU and the GPU may both touch, where tests of kernels run on a GPU (PATCHCORE_GPU). Not at the same time: a test waits
// (device::finished) before it reads.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace data {

// Ends the test program where CUDA fails: nothing after it could be believed.
inline void must(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(2);
}

template <class T>
struct ManagedAllocator {
  using value_type = T;
  ManagedAllocator() = default;
  template <class U>
  ManagedAllocator(const ManagedAllocator<U>&) {}  // NOLINT: containers convert
  T* allocate(size_t count) {
    void* memory = nullptr;
    must(cudaMallocManaged(&memory, count * sizeof(T)), "cudaMallocManaged");
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { must(cudaFree(memory), "cudaFree"); }
  template <class U>
  bool operator==(const ManagedAllocator<U>&) const {
    return true;
  }
  template <class U>
  bool operator!=(const ManagedAllocator<U>&) const {
    return false;
  }
};

}  // namespace data
