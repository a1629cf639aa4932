#include "projection.h"

#include <atomic>

#include "cpu/rows.h"
#include "platform.h"

namespace patchcore {

namespace {

// One slot's workspace: the sums of one row, then the widened row.
int64_t slot_bytes(const Rows& rows, const ProjectionMatrix& matrix) {
  return matrix.num_outputs * static_cast<int64_t>(sizeof(double)) + (float_scratch(rows, 1) + 1) / 2 * 8;
}

}  // namespace

int64_t random_projection_workspace_bytes(const Rows& rows, const ProjectionMatrix& matrix, const Parallel& parallel) {
  return parallel.num_slots * slot_bytes(rows, matrix);
}

Status random_projection_cpu(const Rows& rows, const ProjectionMatrix& matrix, const Parallel& parallel, void* workspace, float* projected) {
  std::atomic<bool> finite{true};
  parallel([&](int64_t slot) {
    double* sums = reinterpret_cast<double*>(static_cast<char*>(workspace) + slot * slot_bytes(rows, matrix));
    float* scratch = reinterpret_cast<float*>(sums + matrix.num_outputs);
    const Share share = share_of(rows.count, slot, parallel.num_slots);
    for (int64_t i = share.begin; i < share.end; ++i) {
      const float* x = float_rows(rows, i, 1, scratch).data;
      for (int64_t j = 0; j < matrix.num_outputs; ++j) sums[j] = 0;
      float nonfinite = 0;  // stays 0 while all inputs and outputs are finite
      for (int64_t k = 0; k < matrix.num_inputs; ++k) {
        nonfinite += x[k] - x[k];
        for (int64_t e = matrix.offsets[k]; e < matrix.offsets[k + 1]; ++e) {
          double& sum = sums[matrix.outputs[e]];
          sum = add(sum, multiply(static_cast<double>(x[k]), matrix.values[e]));
        }
      }
      float* y = projected + i * matrix.num_outputs;
      for (int64_t j = 0; j < matrix.num_outputs; ++j) {
        y[j] = static_cast<float>(sums[j]);
        nonfinite += y[j] - y[j];
      }
      if (!(nonfinite == 0)) finite = false;
    }
  });
  return finite ? Status::kOk : Status::kNonFinite;
}

}  // namespace patchcore
