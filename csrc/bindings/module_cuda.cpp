// The Python module patchcore_ext._C_cuda: loading it registers the CUDA kernels of torch.ops.patchcore_ext; the few functions below tell how it was
// built. No tensor crosses here.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "CUDA kernels of patchcore_ext; use them through patchcore_ext.ops.";
  module.def("version", [] { return PATCHCORE_EXT_VERSION; }, "Version of the sources this library was built from.");
  module.def("archs", [] { return PATCHCORE_EXT_CUDA_ARCHS; }, "Compute capabilities compiled for, separated by semicolons; +PTX: newer ones too.");
  module.def("toolkit", [] { return PATCHCORE_EXT_CUDA_TOOLKIT; }, "Version of the CUDA toolkit that compiled this library.");
}
