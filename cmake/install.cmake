# `cmake --install` and what it leaves for other projects: find_package(patchcore_ext) gives the target patchcore::core.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

add_library(patchcore::core ALIAS patchcore_core)

# Headers are included as <patchcore/knn.h>; warnings are this project's business, -ffp-contract=off is everybody's who includes them.
get_target_property(core_options patchcore_core INTERFACE_COMPILE_OPTIONS)
list(TRANSFORM core_options REPLACE "^(-W.+)$" "$<BUILD_INTERFACE:\\1>")
set_target_properties(
  patchcore_core
  PROPERTIES EXPORT_NAME core
             POSITION_INDEPENDENT_CODE ON
             INTERFACE_COMPILE_OPTIONS "${core_options}"
             INTERFACE_INCLUDE_DIRECTORIES "$<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/csrc/core>;$<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>")
target_compile_features(patchcore_core INTERFACE cxx_std_17)

file(GLOB core_headers CONFIGURE_DEPENDS csrc/core/*.h)
install(FILES ${core_headers} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/patchcore)
install(FILES csrc/core/cpu/float_environment.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/patchcore/cpu)
install(TARGETS patchcore_core EXPORT patchcore_ext_targets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})

set(package_directory ${CMAKE_INSTALL_LIBDIR}/cmake/patchcore_ext)
install(EXPORT patchcore_ext_targets NAMESPACE patchcore:: FILE patchcore_ext-config.cmake DESTINATION ${package_directory})
file(STRINGS patchcore_ext/_version.py version_line REGEX "^__version__")
string(REGEX MATCH "[0-9]+(\\.[0-9]+)+" version "${version_line}")
write_basic_package_version_file(patchcore_ext-config-version.cmake VERSION ${version} COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/patchcore_ext-config-version.cmake DESTINATION ${package_directory})
