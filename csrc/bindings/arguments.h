// Checks of arguments that the CPU's and the CUDA kernels have in common. Made here as well as in Python, since an op can be called as
// torch.ops.patchcore_ext.<name> by anyone.
#pragma once

#include <torch/headeronly/core/DeviceType.h>

#include <vector>

#include "filter.h"
#include "knn.h"
#include "torch_compat.h"

namespace patchcore::bindings {

using torch::headeronly::DeviceType;

inline const char* name_of(DeviceType device) { return device == DeviceType::CPU ? "CPU" : "CUDA"; }

inline bool is_on(DeviceType device, const Tensor& tensor) { return device == DeviceType::CPU ? tensor.is_cpu() : tensor.is_cuda(); }

struct Feature {
  Tensor keep_alive;  // holds the memory that `rows` points into
  Rows rows;
};

// A [N, D] tensor of float32, float16 or bfloat16 as rows; rows must be contiguous inside, and are made so when they are not.
inline Feature features_on(DeviceType device, const Tensor& tensor, const char* op, const char* argument) {
  if (!is_on(device, tensor)) fail(op, ": expected ", argument, " to be on the ", name_of(device), ", got a tensor of another device.");
  if (tensor.dim() != 2) fail(op, ": expected ", argument, " to be of shape [rows, dim], got ", shape_of(tensor), ".");
  patchcore::ScalarType type{};
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      type = patchcore::ScalarType::kFloat32;
      break;
    case ScalarType::Half:
      type = patchcore::ScalarType::kFloat16;
      break;
    case ScalarType::BFloat16:
      type = patchcore::ScalarType::kBFloat16;
      break;
    default:
      fail(op, ": expected ", argument, " to be float32, float16 or bfloat16, got another dtype.");
  }
  if (tensor.size(0) > kMaxRows) fail(op, ": expected ", argument, " to have at most 2^31 - 1 rows, got ", tensor.size(0), ".");
  if (tensor.size(1) < 1) fail(op, ": expected ", argument, " to have at least one dimension a row, got shape ", shape_of(tensor), ".");
  const Tensor usable = tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : torch::stable::contiguous(tensor);
  return {usable, {usable.const_data_ptr(), type, usable.size(0), usable.size(1), usable.stride(0)}};
}

inline void check_same_dim(const Rows& a, const char* name_a, const Rows& b, const char* name_b, const char* op) {
  if (a.dim != b.dim) fail(op, ": expected ", name_a, " to have the dimension of ", name_b, " (", b.dim, "), got ", a.dim, ".");
}

inline void check_vector_on(DeviceType device, const Tensor& tensor, ScalarType type, int64_t size, const char* op, const char* argument,
                            const char* type_name) {
  if (!is_on(device, tensor) || tensor.scalar_type() != type || tensor.dim() != 1 || tensor.size(0) != size || (size > 1 && tensor.stride(0) != 1)) {
    fail(op, ": expected ", argument, " to be a contiguous ", type_name, " ", name_of(device), " tensor of shape [", size, "], got shape ",
         shape_of(tensor), ".");
  }
}

inline void check_matrix_on(DeviceType device, const Tensor& matrix, ScalarType type, int64_t dim, const char* op, const char* type_name,
                            const char* outputs_name) {
  if (!is_on(device, matrix) || matrix.scalar_type() != type || matrix.dim() != 2 || matrix.size(1) != dim || !matrix.is_contiguous()) {
    fail(op, ": expected matrix to be a contiguous ", type_name, " ", name_of(device), " tensor of shape [", outputs_name, ", ", dim, "], got shape ",
         shape_of(matrix), ".");
  }
}

// Features that int8 codes are made of.
inline void check_coded_features(const Rows& rows, const char* op) {
  if (rows.dim > kMaxFilterDim) fail(op, ": expected features to have at most ", kMaxFilterDim, " dimensions, got ", rows.dim, ".");
  if (rows.count < 1) fail(op, ": expected features to have at least one row, got none.");
}

inline void check_prepared_size(const Rows& bank, const char* op) {
  if (bank.dim < kFewestPreparedDims || bank.dim > kMaxFilterDim)
    fail(op, ": expected bank to have between ", kFewestPreparedDims, " and ", kMaxFilterDim, " dimensions, got ", bank.dim, ".");
  if (bank.count < kFewestPreparedRows) fail(op, ": expected bank to have at least ", kFewestPreparedRows, " rows, got ", bank.count, ".");
}

inline void check_permutation(const int32_t* values, int64_t count, const char* op, const char* argument) {
  std::vector<bool> seen(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= count || seen[static_cast<size_t>(values[i])])
      fail(op, ": expected ", argument, " to be a permutation of the rows, got ", values[i], " at ", i, ".");
    seen[static_cast<size_t>(values[i])] = true;
  }
}

inline void check_picks(const int64_t* picks, int64_t count, const Rows& rows, const char* op) {
  for (int64_t i = 0; i < count; ++i) {
    if (picks[i] < 0 || picks[i] >= rows.count)
      fail(op, ": expected picks to lie in [0, ", rows.count, "), the rows of features, got ", picks[i], ".");
  }
}

inline void check_k(int64_t k, const Rows& bank, const char* op) {
  if (k < 1 || k > bank.count) fail(op, ": expected k to lie in [1, ", bank.count, "], the rows of the bank, got ", k, ".");
}

inline void check_nearest_on(DeviceType device, const Tensor& squared_distances, const Tensor& nearest_indices, const char* op) {
  if (squared_distances.dim() != 2 || squared_distances.size(1) < 1 || squared_distances.scalar_type() != ScalarType::Double ||
      !is_on(device, squared_distances) || !squared_distances.is_contiguous()) {
    fail(op, ": expected squared_distances to be a contiguous float64 ", name_of(device), " tensor of shape [batch, patches >= 1], got shape ",
         shape_of(squared_distances), ".");
  }
  if (nearest_indices.dim() != 2 || nearest_indices.size(0) != squared_distances.size(0) || nearest_indices.size(1) != squared_distances.size(1) ||
      nearest_indices.scalar_type() != ScalarType::Long || !is_on(device, nearest_indices) || !nearest_indices.is_contiguous()) {
    fail(op, ": expected nearest_indices to be a contiguous int64 ", name_of(device), " tensor of shape ", shape_of(squared_distances),
         ", got shape ", shape_of(nearest_indices), ".");
  }
}

inline void check_scored(const Rows& queries, const Rows& bank, int64_t patches, int64_t num_neighbors, const char* op) {
  check_same_dim(queries, "queries", bank, "bank", op);
  if (bank.count < 1) fail(op, ": expected bank to have at least one row, got none.");
  if (queries.count != patches) fail(op, ": expected queries to have ", patches, " rows, got ", queries.count, ".");
  if (num_neighbors < 1) fail(op, ": expected num_neighbors to be at least 1, got ", num_neighbors, ".");
}

[[noreturn]] inline void fail_nonfinite(const char* op, const char* argument, int64_t row) {
  fail(op, ": expected ", argument, " to be finite, got NaN or infinity in row ", row, " (the first such row).");
}

}  // namespace patchcore::bindings
