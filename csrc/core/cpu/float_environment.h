// Round to nearest, subnormal numbers kept, for the lifetime of this object; then as before.
//
// torch.set_flush_denormal(True) sets flags of the control register that zero subnormal inputs and results, also those of a float32 -> float64
// conversion. Every share of work on every thread therefore saves, sets and restores the register.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace patchcore {

class FloatEnvironment {
 public:
#if defined(__SSE2__)
  FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // the register's value at start-up: all exceptions masked, nothing else set
  ~FloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned int saved_;
#elif defined(__aarch64__)
  FloatEnvironment() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~FloatEnvironment() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_ = 0;
#else
  FloatEnvironment() {}
  ~FloatEnvironment() {}

 private:
#endif
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;
};

}  // namespace patchcore
