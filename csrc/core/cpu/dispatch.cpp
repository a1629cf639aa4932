#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace patchcore {

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

// Linux lends the tile registers to a process that asks for them (since 5.16), and threads started later inherit that.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned int kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned int eax, ebx, ecx, edx;
  if (!has_avx512() || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & (kTile | kInt8)) != (kTile | kInt8)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool processor_has(const Level& candidate) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&candidate == &kAvx2Level) return has_avx2();
  if (&candidate == &kAvxVnniLevel) return has_avx2() && __builtin_cpu_supports("avxvnni");
  if (&candidate == &kAvx512Level) return has_avx512();
  if (&candidate == &kAmxLevel) return has_amx();
#endif
  return &candidate == &kScalarLevel;
}

constexpr const Level* kLevels[] = {
    &kScalarLevel,
#if defined(__x86_64__)
    &kAvx2Level,   &kAvxVnniLevel, &kAvx512Level, &kAmxLevel,
#endif
};

const Level& choose() {
  const char* forced = std::getenv("PATCHCORE_EXT_CPU_LEVEL");
  if (forced != nullptr) {
    const Level* found = find_level(forced);
    if (found != nullptr) return *found;  // an unknown name is reported by the Python layer (patchcore_ext/_library.py)
  }
  const Level* best = &kScalarLevel;
  for (const Level* candidate : kLevels) {
    if (processor_has(*candidate)) best = candidate;
  }
  return *best;
}

}  // namespace

const Level& level() {
  static const Level& chosen = choose();
  return chosen;
}

const Level* find_level(const char* name) {
  for (const Level* candidate : kLevels) {
    if (std::strcmp(candidate->name, name) == 0 && processor_has(*candidate)) return candidate;
  }
  return nullptr;
}

int available_levels(const char** names) {
  int count = 0;
  for (const Level* candidate : kLevels) {
    if (processor_has(*candidate)) names[count++] = candidate->name;
  }
  return count;
}

}  // namespace patchcore
