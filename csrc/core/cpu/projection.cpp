#include "projection.h"

#include <algorithm>
#include <atomic>

#include "cpu/rows.h"
#include "platform.h"

namespace patchcore {

namespace {

constexpr int64_t kRows = 8;  // rows at a time: the sums of one output for eight rows are one vector, and no sum's order changes

// One slot's workspace: sums [outputs][kRows], inputs [inputs][kRows], widened rows.
int64_t slot_bytes(const Rows& rows, const ProjectionMatrix& matrix) {
  return (matrix.num_outputs + matrix.num_inputs) * kRows * static_cast<int64_t>(sizeof(double)) + (float_scratch(rows, kRows) + 1) / 2 * 8;
}

// Rows [begin, begin + count), count <= kRows. False when an input or an output is not finite.
bool project_rows(const Rows& rows, const ProjectionMatrix& matrix, int64_t begin, int64_t count, double* sums, float* projected) {
  double* inputs = sums + matrix.num_outputs * kRows;
  const FloatRows x = float_rows(rows, begin, count, reinterpret_cast<float*>(inputs + matrix.num_inputs * kRows));
  for (int64_t i = 0; i < matrix.num_outputs * kRows; ++i) sums[i] = 0;
  double nonfinite = 0;  // stays 0 while all inputs and outputs are finite
  for (int64_t k = 0; k < matrix.num_inputs; ++k) {
    double* input = inputs + k * kRows;
    for (int64_t r = 0; r < kRows; ++r) {
      input[r] = r < count ? x.data[r * x.stride + k] : 0.0f;
      nonfinite += input[r] - input[r];
    }
    for (int64_t e = matrix.offsets[k]; e < matrix.offsets[k + 1]; ++e) {
      double* sum = sums + matrix.outputs[e] * kRows;
      for (int64_t r = 0; r < kRows; ++r) sum[r] = add(sum[r], multiply(input[r], matrix.values[e]));
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    float* y = projected + (begin + r) * matrix.num_outputs;
    for (int64_t j = 0; j < matrix.num_outputs; ++j) {
      y[j] = static_cast<float>(sums[j * kRows + r]);
      nonfinite += y[j] - y[j];
    }
  }
  return nonfinite == 0;
}

// A matrix without zeros, as a gaussian one is: its values by input are a dense matrix [inputs, outputs], for the vectorised product of the levels.
bool is_dense(const ProjectionMatrix& matrix) {
  return matrix.num_outputs % 8 == 0 && matrix.offsets[matrix.num_inputs] == matrix.num_inputs * matrix.num_outputs;
}

// project_rows for one row and a dense matrix; the same sums in the same order.
bool project_row_densely(const Rows& rows, const ProjectionMatrix& matrix, int64_t r, double* sums, float* projected) {
  double* inputs = sums + matrix.num_outputs * kRows;
  const float* x = float_rows(rows, r, 1, reinterpret_cast<float*>(inputs + matrix.num_inputs * kRows)).data;
  double nonfinite = 0;
  for (int64_t k = 0; k < matrix.num_inputs; ++k) {
    inputs[k] = x[k];
    nonfinite += inputs[k] - inputs[k];
  }
  level().multiply_matrix(inputs, matrix.values, matrix.num_inputs, matrix.num_outputs, sums);
  float* y = projected + r * matrix.num_outputs;
  for (int64_t j = 0; j < matrix.num_outputs; ++j) {
    y[j] = static_cast<float>(sums[j]);
    nonfinite += y[j] - y[j];
  }
  return nonfinite == 0;
}

}  // namespace

int64_t random_projection_workspace_bytes(const Rows& rows, const ProjectionMatrix& matrix, const Parallel& parallel) {
  return parallel.num_slots * slot_bytes(rows, matrix);
}

Status random_projection_cpu(const Rows& rows, const ProjectionMatrix& matrix, const Parallel& parallel, void* workspace, float* projected) {
  const bool dense = is_dense(matrix);
  std::atomic<bool> finite{true};
  parallel([&](int64_t slot) {
    double* sums = reinterpret_cast<double*>(static_cast<char*>(workspace) + slot * slot_bytes(rows, matrix));
    const Share share = share_of(rows.count, slot, parallel.num_slots);
    for (int64_t r = share.begin; dense && r < share.end; ++r) {
      if (!project_row_densely(rows, matrix, r, sums, projected)) finite = false;
    }
    for (int64_t begin = share.begin; !dense && begin < share.end; begin += kRows) {
      if (!project_rows(rows, matrix, begin, std::min(kRows, share.end - begin), sums, projected)) finite = false;
    }
  });
  return finite ? Status::kOk : Status::kNonFinite;
}

}  // namespace patchcore
