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

// Linux (5.16 and later) lends the tile registers to a process that asks for them. As it then wants larger signal stacks of everyone in the process
// (12 KB instead of 8; it declines where there is a smaller one), it is asked only when the level is to be used.
#if defined(__linux__)
constexpr long kSupportedFeatures = 0x1021, kRequestFeature = 0x1023, kTileData = 18;  // ARCH_GET_XCOMP_SUPP, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#endif

bool has_amx() {
#if defined(__linux__)
  constexpr unsigned int kTile = 1u << 24, kInt8 = 1u << 25;
  unsigned int eax, ebx, ecx, edx;
  uint64_t supported = 0;
  return has_avx512() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & (kTile | kInt8)) == (kTile | kInt8) &&
         syscall(SYS_arch_prctl, kSupportedFeatures, &supported) == 0 && (supported >> kTileData & 1) != 0;
#else
  return false;
#endif
}

bool may_use_tiles() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, kRequestFeature, kTileData) == 0;
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

// Whether a level that the processor has may be used.
bool granted([[maybe_unused]] const Level& candidate) {
#if defined(__x86_64__)
  if (&candidate == &kAmxLevel) return may_use_tiles();
#endif
  return true;
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
    if (processor_has(*candidate) && granted(*candidate)) best = candidate;
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
    if (std::strcmp(candidate->name, name) == 0 && processor_has(*candidate) && granted(*candidate)) return candidate;
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
