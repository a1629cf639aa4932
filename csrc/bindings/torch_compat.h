// The only header that includes torch. LibTorch stable ABI: one build serves every torch >= 2.11 (TORCH_TARGET_VERSION is set by setup.py; under it,
// including ATen is a hard error).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "types.h"

namespace patchcore::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Errors reach Python as RuntimeError; patchcore_ext._checks turns those that carry this mark into ValueError with the sentence behind it.
inline constexpr const char* kErrorMark = "patchcore_ext: ";

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << kErrorMark;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i == 0 ? "" : ", ") << tensor.size(i);
  text << "]";
  return text.str();
}

// torch's intra-op threads. Small work (fewer than `grain` scalar operations a slot) takes fewer slots.
inline Parallel torch_threads(int64_t operations) {
  constexpr int64_t kGrain = 1 << 16;
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t useful = operations / kGrain + 1;
  return {[](void*, int64_t num_slots, patchcore::Parallel::Body body, void* context) {
            torch::stable::parallel_for(0, num_slots, 1, [=](int64_t begin, int64_t end) {
              for (int64_t slot = begin; slot < end; ++slot) body(context, slot);
            });
          },
          nullptr, threads < useful ? threads : useful};
}

}  // namespace patchcore::bindings
