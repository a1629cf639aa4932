// What device code calls: barriers, collectives of a warp, atomics, integer and floating-point intrinsics. Included by cuda_runtime.h.
#pragma once

#include "simt.h"

// ---- Barriers
inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::barrier(false, "__syncthreads", site); }
inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::here()) {
  return simt::barrier(predicate != 0, "__syncthreads_count", site);
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::here()) {
  return simt::barrier(predicate != 0, "__syncthreads_or", site) != 0;
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::here()) {
  return simt::barrier(predicate == 0, "__syncthreads_and", site) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- Collectives of a warp
namespace simt {

template <class T>
struct Shuffled {
  T value;
  unsigned from;  // lane
  T result;
};

// As on the device, a value from a lane outside the mask is undefined: poison, not some lane's value by luck.
template <class T>
T shuffle(uint32_t mask, T value, unsigned from, const char* name, Site site) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles take 4- and 8-byte numbers");
  using Item = Shuffled<T>;
  Item item{value, from, value};
  meet(
      mask, &item,
      [](void* const* items, uint32_t lanes) {
        for (uint32_t left = lanes; left != 0; left &= left - 1) {
          Item& to = *static_cast<Item*>(items[__builtin_ctz(left)]);
          if ((lanes >> to.from & 1) != 0) {
            to.result = static_cast<const Item*>(items[to.from])->value;
          } else {
            std::memset(&to.result, poison(), sizeof(T));
          }
        }
      },
      name, site);
  return item.result;
}

struct Vote {
  bool predicate;
  uint32_t ballot;
};

inline uint32_t vote(uint32_t mask, bool predicate, const char* name, Site site) {
  Vote item{predicate, 0};
  meet(
      mask, &item,
      [](void* const* items, uint32_t lanes) {
        uint32_t ballot = 0;
        for (uint32_t left = lanes; left != 0; left &= left - 1) {
          const int lane = __builtin_ctz(left);
          ballot |= static_cast<uint32_t>(static_cast<const Vote*>(items[lane])->predicate) << lane;
        }
        for (uint32_t left = lanes; left != 0; left &= left - 1) static_cast<Vote*>(items[__builtin_ctz(left)])->ballot = ballot;
      },
      name, site);
  return item.ballot;
}

template <class T>
struct Match {
  T value;
  uint32_t lanes;
};

inline unsigned lane() { return state.current->lane; }

}  // namespace simt

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::here()) {
  simt::meet(mask, nullptr, [](void* const*, uint32_t) {}, "__syncwarp", site);
}
// Lanes form segments of `width`, a power of two; a source outside the segment means the lane's own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, simt::Site site = simt::Site::here()) {
  const unsigned inside = static_cast<unsigned>(width) - 1;
  return simt::shuffle(mask, value, (simt::lane() & ~inside) | (static_cast<unsigned>(from) & inside), "__shfl_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, simt::Site site = simt::Site::here()) {
  const unsigned inside = static_cast<unsigned>(width) - 1;
  const unsigned from = simt::lane() ^ static_cast<unsigned>(lane_mask);
  // The device allows lower segments as sources, not later ones.
  return simt::shuffle(mask, value, from > (simt::lane() | inside) ? simt::lane() : from, "__shfl_xor_sync", site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::here()) {
  const unsigned inside = static_cast<unsigned>(width) - 1;
  const bool in = (simt::lane() & inside) + delta <= inside;
  return simt::shuffle(mask, value, in ? simt::lane() + delta : simt::lane(), "__shfl_down_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::here()) {
  const unsigned inside = static_cast<unsigned>(width) - 1;
  const bool in = (simt::lane() & inside) >= delta;
  return simt::shuffle(mask, value, in ? simt::lane() - delta : simt::lane(), "__shfl_up_sync", site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::vote(mask, predicate != 0, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::vote(mask, predicate != 0, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::vote(mask, predicate == 0, "__all_sync", site) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, simt::Site site = simt::Site::here()) {
  using Item = simt::Match<T>;
  Item item{value, 0};
  simt::meet(
      mask, &item,
      [](void* const* items, uint32_t lanes) {
        for (uint32_t left = lanes; left != 0; left &= left - 1) {
          Item& one = *static_cast<Item*>(items[__builtin_ctz(left)]);
          for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
            const int lane = __builtin_ctz(rest);
            one.lanes |= static_cast<uint32_t>(std::memcmp(&static_cast<const Item*>(items[lane])->value, &one.value, sizeof(T)) == 0) << lane;
          }
        }
      },
      "__match_any_sync", site);
  return item.lanes;
}

// ---- Atomics. Threads change at collectives and between atomics only, so plain reads and writes are atomic here.
namespace simt {

template <class T>
struct Same {
  using type = T;
};
template <class T, class... Types>
constexpr bool kIsOneOf = (std::is_same<T, Types>::value || ...);

template <class T, class F>
T atomically(T* address, F&& change) {
  interrupt();
  const T old = *address;
  *address = change(old);
  return old;
}

}  // namespace simt

#define SIMT_ATOMIC(name, result, ...)                                                    \
  template <class T>                                                                      \
  T name(T* address, typename simt::Same<T>::type value) {                                \
    static_assert(simt::kIsOneOf<T, __VA_ARGS__>, #name " does not exist for this type"); \
    return simt::atomically(address, [value](T old) { return static_cast<T>(result); });  \
  }
SIMT_ATOMIC(atomicAdd, old + value, int, unsigned, unsigned long long, float, double)
SIMT_ATOMIC(atomicSub, old - value, int, unsigned)
SIMT_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, long long, unsigned long long)
SIMT_ATOMIC(atomicMax, value > old ? value : old, int, unsigned, long long, unsigned long long)
SIMT_ATOMIC(atomicOr, old | value, int, unsigned, unsigned long long)
SIMT_ATOMIC(atomicAnd, old& value, int, unsigned, unsigned long long)
SIMT_ATOMIC(atomicXor, old ^ value, int, unsigned, unsigned long long)
#undef SIMT_ATOMIC
template <class T>
T atomicExch(T* address, typename simt::Same<T>::type value) {
  static_assert(simt::kIsOneOf<T, int, unsigned, unsigned long long, float>, "atomicExch does not exist for this type");
  return simt::atomically(address, [value](T) { return value; });
}
template <class T>
T atomicCAS(T* address, typename simt::Same<T>::type expected, typename simt::Same<T>::type value) {
  static_assert(simt::kIsOneOf<T, int, unsigned, unsigned long long>, "atomicCAS does not exist for this type");
  return simt::atomically(address, [=](T old) { return old == expected ? value : old; });
}

// ---- Integers
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v)); }
inline unsigned __brev(unsigned v) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (v >> bit & 1) << (31 - bit);
  return reversed;
}
// Sums wrap around, as on the device.
inline int __dp4a(int a, int b, int c) {
  unsigned sum = static_cast<unsigned>(c);
  for (int byte = 0; byte < 32; byte += 8) sum += static_cast<unsigned>(static_cast<int8_t>(a >> byte) * static_cast<int8_t>(b >> byte));
  return static_cast<int>(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int byte = 0; byte < 32; byte += 8) c += (a >> byte & 255) * (b >> byte & 255);
  return c;
}
#define SIMT_MIN_MAX(type)                                  \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX

// ---- Bits of numbers
namespace simt {
template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace simt
inline unsigned __float_as_uint(float v) { return simt::bits_as<unsigned>(v); }
inline int __float_as_int(float v) { return simt::bits_as<int>(v); }
inline float __uint_as_float(unsigned v) { return simt::bits_as<float>(v); }
inline float __int_as_float(int v) { return simt::bits_as<float>(v); }
inline long long __double_as_longlong(double v) { return simt::bits_as<long long>(v); }
inline double __longlong_as_double(long long v) { return simt::bits_as<double>(v); }
template <class T>
T __ldg(const T* address) {
  return *address;
}

// ---- Floating point, each operation rounded once (built with -ffp-contract=off)
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
inline int __double2int_rn(double a) { return static_cast<int>(std::nearbyint(a)); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }
inline float __double2float_ru(double a) {
  const float near = static_cast<float>(a);
  return near < a ? std::nextafter(near, INFINITY) : near;
}
inline float __double2float_rd(double a) {
  const float near = static_cast<float>(a);
  return near > a ? std::nextafter(near, -INFINITY) : near;
}
