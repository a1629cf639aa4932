// Fibers: stacks of their own between which one operating-system thread changes, so that each CUDA thread can stop in the middle of a kernel.
//
// A change costs ten instructions on x86-64 (swapcontext, used elsewhere, makes two system calls). Under AddressSanitizer every change is
// announced, so that the stack that a frame belongs to is known and use of a neighbour's stack is told from a valid access.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = size_t{256} << 10;  // redzones make frames several times larger
#else
constexpr size_t kStackBytes = size_t{64} << 10;
#endif
constexpr size_t kGuardBytes = size_t{64} << 10;  // below the stack, without access: an overflow stops the process; a page on every machine

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (memory_ != nullptr) munmap(memory_, kGuardBytes + kStackBytes);
  }

  // The next change to this fiber calls entry(), which must never return. `offset` bytes (a multiple of 16) are left unused at the top of the stack:
  // with tops at the same place in every stack, the frames of a warp's lanes would share a few cache sets and throw each other out.
  void prepare(void (*entry)(), size_t offset);

  // Stops the code that runs, which is `from`, and goes on where `to` stopped. With `ends`, `from` is not resumed before it is prepared anew.
  static void change(Fiber& from, Fiber& to, bool ends = false);

  // To be called first by an entry function; `from` is what changed to it.
  static void entered(Fiber& from);

 private:
  char* memory_ = nullptr;  // null: the stack of an operating-system thread
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
  bool ended_ = true;
#endif
};

#if defined(__x86_64__)
// Pushes the registers that a function has to keep, leaves the stack pointer in *from, takes `to` for it, and pops what was pushed there.
extern "C" void simt_change_stacks(void** from, void* to);
asm(R"(
  .text
  .weak simt_change_stacks
  .type simt_change_stacks, @function
simt_change_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_change_stacks, .-simt_change_stacks
)");
#endif

inline void Fiber::prepare(void (*entry)(), size_t offset) {
  if (memory_ == nullptr) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
  }
  char* stack = memory_ + kGuardBytes;
#if defined(__SANITIZE_ADDRESS__)
  stack_ = stack;
  stack_bytes_ = kStackBytes;
  // Redzones of frames that were never left: the entry function's, near the top, or all of a fiber that was given up.
  const size_t stale = ended_ ? size_t{16} << 10 : kStackBytes;
  __asan_unpoison_memory_region(stack + kStackBytes - stale, stale);
  ended_ = false;
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + kStackBytes - offset);
  *--top = nullptr;                              // entry's return address; a function starts 8 bytes below a multiple of 16
  *--top = reinterpret_cast<void*>(entry);       // where simt_change_stacks returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the six registers
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = kStackBytes - offset;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

inline void Fiber::change(Fiber& from, Fiber& to, [[maybe_unused]] bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  from.ended_ = ends;
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack_, to.stack_, to.stack_bytes_);
#endif
#if defined(__x86_64__)
  simt_change_stacks(&from.stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

inline void Fiber::entered([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  from.stack_ = stack;  // where an operating-system thread has its stack only the sanitizer knows
  from.stack_bytes_ = bytes;
#endif
}

}  // namespace simt
