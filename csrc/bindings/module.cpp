// The Python module patchcore_ext._C: loading it registers torch.ops.patchcore_ext; the few functions below tell how it was built. No tensor crosses
// here.
#undef TORCH_TARGET_VERSION  // nothing of torch is used here, and its copy of pybind11 refuses the stable ABI (torch 2.11)
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/dispatch.h"
#include "cpu/stages.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#else
  return std::string("g++ ") + __VERSION__;
#endif
}

pybind11::list available_cpu_levels() {
  const char* names[patchcore::kMostLevels];
  const int count = patchcore::available_levels(names);
  pybind11::list list;
  for (int i = 0; i < count; ++i) list.append(names[i]);
  return list;
}

pybind11::list stage_codes() {
  pybind11::list list;
  for (const int64_t end : patchcore::kStageCodes) list.append(end);
  return list;
}

double look_up_nanoseconds(int64_t dim) {
  const patchcore::Costs& costs = patchcore::level().costs;
  return costs.look_up + costs.look_up_word * static_cast<double>((dim + 3) / 4);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of patchcore_ext; use them through patchcore_ext.ops.";
  module.def("version", [] { return PATCHCORE_EXT_VERSION; }, "Version of the sources this library was built from.");
  module.def("compiler", &compiler, "Compiler that built this library.");
  module.def("cpu_level", [] { return patchcore::level().name; }, "Instruction-set level in use: scalar, avx2, avxvnni, avx512 or amx.");
#if defined(PATCHCORE_SIMT)
  constexpr bool kIsSimt = true;
#else
  constexpr bool kIsSimt = false;
#endif
  module.def("is_simt", [] { return kIsSimt; }, "Whether this build is for tests: the CUDA kernels in place of the CPU's, run on the CPU.");
  module.def("look_up_nanoseconds", &look_up_nanoseconds, "About what the level in use takes to compare two rows' int8 codes.");
  module.def("stage_codes", &stage_codes, "Codes of a prefix behind which the search asks whether any row is left, where it scans in stages.");
  module.def("scan_step", [] { return patchcore::level().scan_step; }, "Codes of a prefix that the search compares at once.");
  module.def("fewest_staged_rows", [] { return patchcore::level().fewest_staged_rows; }, "Rows of a bank from which on it does.");
  module.def("stage_bytes", [] { return patchcore::level().stage_bytes; }, "Bytes of a sum in such a scan.");
  module.def("available_cpu_levels", &available_cpu_levels, "Levels that this processor can run, slowest first.");
}
