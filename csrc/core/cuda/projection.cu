// Random projection (projection.h) and what else goes through features value by value.
#include "common.cuh"
#include "kernels.h"

namespace patchcore::cuda {

namespace {

constexpr int kThreadsOfBlock = 256;
constexpr int kStagedInputs = 1024;  // coordinates of a row that lie in shared memory at a time

// The matrix by output: the inputs with a nonzero entry, ascending, and the entries.
struct SparseMatrix {
  int32_t* counts;  // [num_outputs]
  int32_t* inputs;  // [num_outputs, dim]
  double* values;   // [num_outputs, dim]
};

SparseMatrix sparse_matrix_at(int64_t dim, int64_t num_outputs, Pieces* pieces) {
  return {pieces->take<int32_t>(num_outputs), pieces->take<int32_t>(num_outputs * dim), pieces->take<double>(num_outputs * dim)};
}

// A warp an output.
__global__ void __launch_bounds__(kThreadsOfBlock) compress_kernel(const double* matrix, int64_t dim, int64_t num_outputs, const SparseMatrix out) {
  const int64_t output = static_cast<int64_t>(blockIdx.x) * (kThreadsOfBlock / kWarp) + warp_of_thread();
  if (output >= num_outputs) return;
  const int lane = lane_of_thread();
  int32_t count = 0;
  for (int64_t begin = 0; begin < dim; begin += kWarp) {
    const double value = begin + lane < dim ? matrix[output * dim + begin + lane] : 0;
    const uint32_t nonzero = __ballot_sync(kAllLanes, value != 0);
    if (value != 0) {
      const int64_t at = output * dim + count + __popc(nonzero & ((1u << lane) - 1));
      out.inputs[at] = static_cast<int32_t>(begin + lane);
      out.values[at] = value;
    }
    count += __popc(nonzero);
  }
  if (lane == 0) out.counts[output] = count;
}

// A block a row; a thread an output at a time. The row is staged in parts, so a thread keeps its place in the list of its output's entries.
__global__ void __launch_bounds__(kThreadsOfBlock)
    project_kernel(const Rows rows, const SparseMatrix matrix, int64_t num_outputs, float* projected, int32_t* flags) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  float* staged = reinterpret_cast<float*>(shared);  // [kStagedInputs]
  const int64_t row = blockIdx.x, dim = rows.dim;
  const int thread = static_cast<int>(threadIdx.x);
  bool finite = true;
  for (int64_t first = 0; first < num_outputs; first += kThreadsOfBlock) {
    const int64_t output = first + thread;
    const int32_t count = output < num_outputs ? matrix.counts[output] : 0;
    const int32_t* inputs = matrix.inputs + output * dim;
    const double* values = matrix.values + output * dim;
    double sum = 0;
    int32_t e = 0;
    for (int64_t begin = 0; begin < dim; begin += kStagedInputs) {
      const int64_t length = dim - begin < kStagedInputs ? dim - begin : kStagedInputs;
      __syncthreads();  // the part before is no longer read
      with_row(rows, row, [&](const auto* x) {
        for (int64_t j = thread; j < length; j += kThreadsOfBlock) {
          staged[j] = widen(x[begin + j]);
          finite = finite && staged[j] - staged[j] == 0;
        }
      });
      __syncthreads();
      for (; e < count && inputs[e] < begin + length; ++e) sum = add(sum, multiply(static_cast<double>(staged[inputs[e] - begin]), values[e]));
    }
    if (output >= num_outputs) continue;
    const float result = static_cast<float>(sum);
    finite = finite && result - result == 0;
    projected[row * num_outputs + output] = result;
  }
  if (!finite) atomicOr(flags, kNonFinite);
}

// A warp a row. first: the bits of -1 as an unsigned number are the largest, so the least of all is the first row, or -1.
__global__ void __launch_bounds__(kThreadsOfBlock) nonfinite_kernel(const Rows rows, unsigned long long* first) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreadsOfBlock / kWarp) + warp_of_thread();
  if (row >= rows.count) return;
  bool finite = true;
  with_row(rows, row, [&](const auto* x) {
    for (int64_t j = lane_of_thread(); j < rows.dim; j += kWarp) finite = finite && widen(x[j]) - widen(x[j]) == 0;
  });
  if (__all_sync(kAllLanes, finite) == 0 && lane_of_thread() == 0) atomicMin(first, static_cast<unsigned long long>(row));
}

__global__ void __launch_bounds__(kThreadsOfBlock) square_root_kernel(const double* values, int64_t count, double* roots) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreadsOfBlock + threadIdx.x;
  if (i < count) roots[i] = rounded_root(values[i]);
}

}  // namespace

int64_t random_projection_workspace_bytes(int64_t dim, int64_t num_outputs) {
  Pieces pieces(nullptr);
  sparse_matrix_at(dim, num_outputs, &pieces);
  return pieces.used();
}

cudaError_t random_projection_cuda(const Rows& rows, const double* matrix, int64_t num_outputs, void* workspace, float* projected, int32_t* flags,
                                   cudaStream_t stream) {
  if (rows.count == 0 || num_outputs == 0) return cudaSuccess;
  Pieces pieces(workspace);
  const SparseMatrix sparse = sparse_matrix_at(rows.dim, num_outputs, &pieces);
  const dim3 warps(static_cast<unsigned>(blocks_of(num_outputs, kThreadsOfBlock / kWarp)));
  PATCHCORE_LAUNCH((compress_kernel), warps, dim3(kThreadsOfBlock), 0, stream, matrix, rows.dim, num_outputs, sparse);
  PATCHCORE_CUDA_TRY(cudaGetLastError());
  PATCHCORE_LAUNCH((project_kernel), dim3(static_cast<unsigned>(rows.count)), dim3(kThreadsOfBlock), kStagedInputs * 4, stream, rows, sparse,
                   num_outputs, projected, flags);
  return cudaGetLastError();
}

cudaError_t first_nonfinite_row_cuda(const Rows& rows, int64_t* row, cudaStream_t stream) {
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(row, 0xff, sizeof(int64_t), stream));
  if (rows.count == 0) return cudaSuccess;
  const dim3 warps(static_cast<unsigned>(blocks_of(rows.count, kThreadsOfBlock / kWarp)));
  PATCHCORE_LAUNCH((nonfinite_kernel), warps, dim3(kThreadsOfBlock), 0, stream, rows, reinterpret_cast<unsigned long long*>(row));
  return cudaGetLastError();
}

cudaError_t square_root_cuda(const double* values, int64_t count, double* roots, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks_of(count, kThreadsOfBlock)));
  PATCHCORE_LAUNCH((square_root_kernel), grid, dim3(kThreadsOfBlock), 0, stream, values, count, roots);
  return cudaGetLastError();
}

}  // namespace patchcore::cuda
