# The CUDA kernels on the CPU: csrc/core/cuda/*.cu compiled unchanged by the C++ compiler against the SIMT runner (csrc/tests/simt), and their tests.
set(simt_dir ${PROJECT_SOURCE_DIR}/csrc/tests/simt)
file(GLOB simt_kernels CONFIGURE_DEPENDS csrc/core/cuda/*.cu)
# CMake before 3.20 does not tell the compiler what it is to take a .cu for.
set_source_files_properties(${simt_kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")

add_library(patchcore_cuda_simt STATIC ${simt_dir}/simt.cpp ${simt_kernels})
target_include_directories(patchcore_cuda_simt BEFORE PUBLIC ${simt_dir})
target_compile_definitions(patchcore_cuda_simt PUBLIC PATCHCORE_SIMT)
# `#pragma unroll` is nvcc's.
target_compile_options(patchcore_cuda_simt PUBLIC -Wno-unknown-pragmas)
target_link_libraries(patchcore_cuda_simt PUBLIC patchcore_core)

file(GLOB simt_tests CONFIGURE_DEPENDS ${simt_dir}/test_*.cpp)
foreach(source ${simt_tests})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/csrc/tests)
  target_link_libraries(${name} PRIVATE patchcore_cuda_simt Threads::Threads)
  add_test(NAME ${name} COMMAND ${name})
  # What waits by spinning never ends.
  set_tests_properties(${name} PROPERTIES TIMEOUT 600)
endforeach()
