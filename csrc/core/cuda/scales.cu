// The scales of codes, chosen from a sample of the rows, and its mean, which serves as a centre for rows that are used once.
#include "views.cuh"

namespace patchcore::cuda {

namespace {

constexpr double kStepPercentile = 0.999, kCodePercentile = 0.8;  // as for a bank on the CPU (cpu/bank.cpp), with the same reasons

__host__ __device__ __forceinline__ int64_t sample_step(int64_t count) { return count > kSampleRows ? count / kSampleRows : 1; }
__host__ __device__ __forceinline__ int64_t sample_size(int64_t count) { return count < kSampleRows ? count : kSampleRows; }

__global__ void __launch_bounds__(kCodeThreads) mean_of_sample_kernel(const Rows rows, double* center) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kCodeThreads + threadIdx.x;
  if (j >= rows.dim) return;
  const int64_t step = sample_step(rows.count), count = sample_size(rows.count);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    with_row(rows, i * step, [&](const auto* x) {
      const double value = static_cast<double>(widen(x[j]));
      if (subtract(value, value) == 0) sum = add(sum, value);  // others are reported elsewhere, and must not spoil every bound until then
    });
  }
  center[j] = sum / static_cast<double>(count);
}

enum class Sampled { kMagnitude, kSeedResidual, kSeedMagnitude, kPrefixResidual, kPrefixMagnitude };

// sample[i] = the quantity `what` of sampled row i: magnitudes from the features, the others from the products of the sampled rows.
__global__ void __launch_bounds__(kCodeThreads)
    sample_kernel(const Rows rows, const double* center, const StepRows steps, const Scales* scales, Sampled what, double* sample) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCodeWarps + warp_of_thread();
  if (i >= sample_size(rows.count)) return;
  double value = 0;
  if (what == Sampled::kMagnitude) {
    with_row(rows, i * sample_step(rows.count), [&](const auto* x) {
      for (int64_t j = lane_of_thread(); j < rows.dim; j += kWarp) {
        const double magnitude = fabs(subtract(static_cast<double>(widen(x[j])), center[j]));
        value = magnitude > value ? magnitude : value;
      }
    });
    value = warp_max(value);
  } else {
    const int32_t* products = steps.products + i * kProductColumns;
    if (what == Sampled::kSeedResidual || what == Sampled::kSeedMagnitude) {
      const ViewRow<kSeedOutputs> row(products, steps.norms[i]);
      value = what == Sampled::kSeedResidual ? row.residual : row.largest(scales->seed.shift);
    } else {
      const ViewRow<kPrefixOutputs> row(products + kSeedOutputs, steps.norms[i]);
      value = what == Sampled::kPrefixResidual ? row.residual : row.largest(scales->prefix.shift);
    }
  }
  if (lane_of_thread() == 0) sample[i] = value;
}

// The value of rank floor((count - 1) share) among sample[0 .. count), by counting; one block. Magnitudes are ordered like their bits (a NaN comes
// last), which are compared in their place: float64 is slow on most cards.
__device__ double percentile(const double* sample, int64_t count, double share, double* shared) {
  const int64_t rank = static_cast<int64_t>(static_cast<double>(count - 1) * share);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const long long own = __double_as_longlong(sample[i]);
    int before = 0;
    for (int64_t j = 0; j < count; ++j) {
      const long long other = __double_as_longlong(sample[j]);
      before += other < own || (other == own && j < i) ? 1 : 0;
    }
    if (before == rank) shared[0] = sample[i];  // one row has this rank
  }
  __syncthreads();
  const double value = shared[0];
  __syncthreads();
  return value;
}

__global__ void __launch_bounds__(1024)
    choose_scale_kernel(const double* sample, int64_t count, int64_t dim, Sampled what, bool with_steps, Scales* scales) {
  PATCHCORE_DYNAMIC_SHARED(memory);
  double* shared = reinterpret_cast<double*>(memory);
  if (what == Sampled::kSeedResidual || what == Sampled::kPrefixResidual) {
    if (threadIdx.x != 0) return;
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum = add(sum, sample[i]);
    (what == Sampled::kSeedResidual ? scales->seed : scales->prefix).shift = sum / static_cast<double>(count);
    return;
  }
  const double magnitude = percentile(sample, count, kCodePercentile, shared);
  const double most = what == Sampled::kMagnitude && with_steps ? percentile(sample, count, kStepPercentile, shared) : 0;
  if (threadIdx.x != 0) return;
  const double scale = int8_scale(magnitude);
  if (what == Sampled::kMagnitude) {
    scales->step_scale = most >= 0x1p-150 && most <= 0x1p130 ? largest_plane_step(dim) / most : 1.0;  // as int8_scale
    scales->full = {0, scale, scale};
    return;
  }
  ViewScale& view = what == Sampled::kSeedMagnitude ? scales->seed : scales->prefix;
  view.scale = scale;
  view.per_unit = inflate(multiply(scale, scales->step_scale), 1);
}

}  // namespace

cudaError_t mean_of_sample(const Rows& rows, double* center, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(blocks_of(rows.dim, kCodeThreads)));
  PATCHCORE_LAUNCH((mean_of_sample_kernel), grid, dim3(kCodeThreads), 0, stream, rows, center);
  return cudaGetLastError();
}

cudaError_t choose_scales(const Rows& rows, const Encoding& encoding, const StepRows& steps, const CodeRows& full, double* sample, Scales* scales,
                          int32_t* flags, cudaStream_t stream) {
  const int64_t count = sample_size(rows.count);
  const auto choose = [&](Sampled what) {
    const dim3 grid(static_cast<unsigned>(blocks_of(count, kCodeWarps)));
    PATCHCORE_LAUNCH((sample_kernel), grid, dim3(kCodeThreads), 0, stream, rows, encoding.center, steps, encoding.scales, what, sample);
    PATCHCORE_CUDA_TRY(cudaGetLastError());
    PATCHCORE_LAUNCH((choose_scale_kernel), dim3(1), dim3(1024), sizeof(double), stream, sample, count, rows.dim, what, encoding.matrix != nullptr,
                     scales);
    return cudaGetLastError();
  };
  PATCHCORE_CUDA_TRY(choose(Sampled::kMagnitude));
  if (encoding.matrix == nullptr) return cudaSuccess;
  Rows sampled = rows;  // the sampled rows lie one stride apart
  sampled.count = count;
  sampled.stride = rows.stride * sample_step(rows.count);
  PATCHCORE_CUDA_TRY(encode_steps(sampled, nullptr, count, encoding, steps, full, flags, stream));
  for (const Sampled what : {Sampled::kSeedResidual, Sampled::kSeedMagnitude, Sampled::kPrefixResidual, Sampled::kPrefixMagnitude})
    PATCHCORE_CUDA_TRY(choose(what));
  return cudaSuccess;
}

}  // namespace patchcore::cuda
