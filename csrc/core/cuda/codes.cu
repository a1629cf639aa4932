#include "codes.cuh"

#include "mma.cuh"

namespace patchcore::cuda {

namespace {

constexpr int kWarpsOfBlock = 8;
constexpr int kBlockThreads = kWarpsOfBlock * kWarp;
constexpr double kStepPercentile = 0.999, kCodePercentile = 0.8;  // as for a bank on the CPU (cpu/bank.cpp), with the same reasons

__device__ __forceinline__ double largest_plane_step(int64_t dim) {
  const double most = largest_step(dim);
  return most < kLargestPlaneValue ? most : kLargestPlaneValue;
}

// Packs four codes, of coordinates j .. j + 3, into the word of their bytes.
struct Word {
  uint32_t bits = 0;
  __device__ void set(int e, int code) { bits |= (static_cast<uint32_t>(code) & 0xffu) << (8 * e); }
  __device__ void store(int8_t* at) const { *reinterpret_cast<uint32_t*>(at) = bits; }
};

// Four coordinates, loaded at once where they lie well.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
  __device__ Four(const T* x, int64_t j, int64_t dim, bool aligned) {
    if (aligned && j + 4 <= dim) {
      *this = *reinterpret_cast<const Four*>(x + j);
    } else {
      for (int e = 0; e < 4; ++e) values[e] = x[j + e < dim ? j + e : j];
    }
  }
};

// What a lane sums up over its part of a row's coordinates.
struct RowSums {
  int32_t norm = 0;
  double error_squares = 0, step_norm = 0, step_error_squares = 0;
  bool finite = true;
};

// One row by one warp: lane l takes coordinates 4 l .. 4 l + 3 of every 128.
template <class T>
__device__ __forceinline__ RowSums encode_row(const T* x, int64_t dim, const Encoding& encoding, int8_t* codes, int64_t depth, int8_t* planes) {
  RowSums sums;
  const double scale = encoding.scales->full.scale, step_scale = encoding.scales->step_scale, most = largest_plane_step(dim);
  const bool aligned = reinterpret_cast<uintptr_t>(x) % alignof(Four<T>) == 0;
  for (int64_t j = 4 * lane_of_thread(); j < depth; j += 4 * kWarp) {
    Word full, high, low;
    const Four<T> four(x, j < dim ? j : 0, dim, aligned);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (j + e >= dim) break;
      const double value = static_cast<double>(widen(four.values[e])), center = encoding.center[j + e];
      sums.finite = sums.finite && subtract(value, value) == 0;
      const Int8Code code = int8_code(scaled_coordinate(value, center, scale));
      full.set(e, code.code);
      sums.norm += code.code * code.code;
      sums.error_squares = add(sums.error_squares, multiply(code.error, code.error));
      if (planes == nullptr) continue;
      const RoundedCode step = rounded_code(scaled_coordinate(value, center, step_scale), most);
      const int whole = static_cast<int>(step.code), lower = ((whole + 64) & 127) - 64;
      high.set(e, (whole - lower) >> kPlaneBits);
      low.set(e, lower);
      sums.step_norm = add(sums.step_norm, multiply(step.code, step.code));  // integers below 2^53: exact
      sums.step_error_squares = add(sums.step_error_squares, multiply(step.error, step.error));
    }
    full.store(codes + j);
    if (planes == nullptr) continue;
    high.store(planes + j);
    low.store(planes + depth + j);
  }
  return sums;
}

__global__ void __launch_bounds__(kBlockThreads) encode_rows_kernel(const Rows rows, const int32_t* map, int64_t count, const Encoding encoding,
                                                                    const StepRows steps, const CodeRows full, int32_t* flags) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsOfBlock + warp_of_thread(), dim = rows.dim, depth = full.depth;
  if (row >= padded_rows(count)) return;  // a whole warp
  int8_t* codes = full.codes + row * depth;
  int8_t* planes = steps.planes == nullptr ? nullptr : steps.planes + row * 2 * depth;
  RowSums sums;
  if (row < count) {
    with_row(rows, map == nullptr ? row : map[row], [&](const auto* x) { sums = encode_row(x, dim, encoding, codes, depth, planes); });
  } else {
    for (int64_t j = 4 * lane_of_thread(); j < depth; j += 4 * kWarp) Word().store(codes + j);
    for (int64_t j = 4 * lane_of_thread(); planes != nullptr && j < 2 * depth; j += 4 * kWarp) Word().store(planes + j);
  }
  const int32_t norm = warp_sum(sums.norm);
  const double error_squares = warp_sum(sums.error_squares);
  const double step_norm = warp_sum(sums.step_norm), step_error_squares = warp_sum(sums.step_error_squares);
  const bool finite = __all_sync(kAllLanes, sums.finite) != 0;
  if (lane_of_thread() != 0) return;
  if (!finite) atomicOr(flags, kNonFinite);
  float residual = row < count ? residual_bound(error_squares, norm, dim) : 0.0f;
  if (!finite) residual = __uint_as_float(0x7fc00000u);  // clipping gave an infinity a code: the row must not be skipped by it
  store_row(full, row, norm, residual, row >= count);
  if (planes == nullptr) return;
  steps.norms[row] = step_norm;
  steps.errors[row] = residual_bound(step_error_squares, step_norm, dim);
}

// ---- The contraction ------------------------------------------------------------------------------------------------------------------------------

// products[r][o] = sum_j step[r][j] matrix[o][j], exact modulo 2^32 (and the sum fits: filter.h, section 8). With s = 2^7 s1 + s0 and m = 2^7 m1 + m0
// the sum is ((s1 m1) 2^7 + s1 m0 + s0 m1) 2^7 + s0 m0: four int8 products one after the other in the same accumulators, which are shifted between.
// A block computes 128 rows x 128 outputs, a warp 32 x 64.
constexpr int kContractRows = 128, kContractOutputs = 128, kContractStages = 3, kPlaneChunk = 64;
constexpr int kContractBytes = kContractStages * (kContractRows + kContractOutputs) * kPlaneChunk;

__device__ __forceinline__ int swizzled_line(int row, int unit) { return row * kPlaneChunk + ((unit ^ (row >> 1 & 3)) << 4); }  // as in tile_scan.cuh

__global__ void __launch_bounds__(kBlockThreads, 2) contract_kernel(const int8_t* steps, const int8_t* matrix, int64_t depth, int32_t* products) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread();
  const int warp_row = warp_of_thread() / 2 * 32, warp_output = warp_of_thread() % 2 * 64;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kContractRows, output = static_cast<int64_t>(blockIdx.y) * kContractOutputs;
  const int chunks = static_cast<int>(depth / kPlaneChunk), total = 4 * chunks;
  const auto load = [&](int step) {
    if (step < total) {
      const int phase = step / chunks, chunk = step % chunks;  // planes: high high, high low, low high, low low
      char* to_a = shared + step % kContractStages * (kContractRows + kContractOutputs) * kPlaneChunk;
      char* to_b = to_a + kContractRows * kPlaneChunk;
      const int8_t* from_a = steps + (row * 2 + phase / 2) * depth + chunk * kPlaneChunk;
      const int8_t* from_b = matrix + (output * 2 + phase % 2) * depth + chunk * kPlaneChunk;
      const int line = thread / 4, unit = thread % 4;
      cp_async16(to_a + swizzled_line(line, unit), from_a + line * 2 * depth + unit * 16);
      cp_async16(to_a + swizzled_line(line + 64, unit), from_a + (line + 64) * 2 * depth + unit * 16);
      cp_async16(to_b + swizzled_line(line, unit), from_b + line * 2 * depth + unit * 16);
      cp_async16(to_b + swizzled_line(line + 64, unit), from_b + (line + 64) * 2 * depth + unit * 16);
    }
    cp_async_commit();
  };
  for (int s = 0; s < kContractStages - 1; ++s) load(s);
  int sums[2][8][4] = {};
  for (int step = 0; step < total; ++step) {
    cp_async_wait<kContractStages - 2>();
    __syncthreads();
    load(step + kContractStages - 1);
    if (step == chunks || step == 3 * chunks) {
#pragma unroll
      for (int i = 0; i < 64; ++i)
        sums[i / 32][i / 4 % 8][i % 4] = static_cast<int>(static_cast<uint32_t>(sums[i / 32][i / 4 % 8][i % 4]) << kPlaneBits);
    }
    const char* a = shared + step % kContractStages * (kContractRows + kContractOutputs) * kPlaneChunk;
    const char* b = a + kContractRows * kPlaneChunk;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t row_codes[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) ldmatrix_x4(row_codes[m], a + swizzled_line(warp_row + m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t output_codes[4];
        ldmatrix_x4(output_codes, b + swizzled_line(warp_output + n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int m = 0; m < 2; ++m) mma_s8(sums[m][2 * n + e], row_codes[m], output_codes[2 * e], output_codes[2 * e + 1], sums[m][2 * n + e]);
      }
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t r = row + warp_row + m * 16 + i / 2 * 8 + lane / 4;
        products[r * kProductColumns + output + warp_output + n * 8 + lane % 4 * 2 + i % 2] = sums[m][n][i];
      }
}

// ---- Views ----------------------------------------------------------------------------------------------------------------------------------------

// Coordinates of one row in a view, held by a warp: lane l has outputs l, l + 32, ..., all lanes the residual coordinate.
template <int kCount>
struct ViewRow {
  static constexpr int kEach = (kCount + kWarp - 1) / kWarp;
  double values[kEach];
  double residual, squared_norm;

  __device__ ViewRow(const int32_t* products, double step_norm) {
    double squares = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int k = i * kWarp + lane_of_thread();
      values[i] = k < kCount ? multiply(products[k], 0x1p-14) : 0.0;
      squares = add(squares, multiply(values[i], values[i]));
    }
    squared_norm = warp_sum(squares);
    residual = residual_coordinate(step_norm, squared_norm);
  }

  __device__ double largest(double shift) const {
    double most = fabs(subtract(residual, shift));
#pragma unroll
    for (int i = 0; i < kEach; ++i) most = fabs(values[i]) > most ? fabs(values[i]) : most;
    return warp_max(most);
  }

  // Codes [kCount + 1] of the row; the result is valid in all lanes. As cpu/encoder.cpp, where the error is derived.
  __device__ float encode(const ViewScale& view, double step_error, int64_t dim, int8_t* codes, int32_t* norm) const {
    int32_t norm_part = 0;
    double error_part = 0;
    const auto take = [&](int k, double value) {
      const Int8Code code = int8_code(multiply(view.scale, value));
      codes[k] = code.code;
      norm_part += code.code * code.code;
      error_part = add(error_part, multiply(code.error, code.error));
    };
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int k = i * kWarp + lane_of_thread();
      if (k < kCount) take(k, values[i]);
    }
    if (lane_of_thread() == kCount % kWarp) take(kCount, subtract(residual, view.shift));
    *norm = warp_sum(norm_part);
    const double error_squares = warp_sum(error_part);
    const double z_norm = inflate(rounded_root(squared_norm), kCount + 4);
    const double shifted = inflate(multiply(add(residual, fabs(view.shift)), 0x1p-53), 4);
    const double error = inflate(add(add(step_error, residual_coordinate_error(residual, z_norm, 0, dim)), shifted), 4);
    return round_up_to_float(inflate(add(residual_bound(error_squares, *norm, kCount + 1), multiply(view.scale, error)), 2));
  }
};

template <int kCount>
__device__ __forceinline__ void encode_view(const int32_t* products, double step_norm, double step_error, const ViewScale& view, int64_t dim,
                                            int64_t row, bool padding, const CodeRows& out) {
  int8_t* codes = out.codes + row * out.depth;
  int32_t norm = 0;
  float residual = 0;
  if (padding) {
    for (int k = lane_of_thread(); k < kCount + 1; k += kWarp) codes[k] = 0;
  } else {
    residual = ViewRow<kCount>(products, step_norm).encode(view, step_error, dim, codes, &norm);
  }
  if (lane_of_thread() == 0) store_row(out, row, norm, residual, padding);
}

__global__ void __launch_bounds__(kBlockThreads)
    encode_views_kernel(const StepRows steps, int64_t count, int64_t dim, const Scales* scales, const CodeRows seed, const CodeRows prefix) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsOfBlock + warp_of_thread();
  if (row >= padded_rows(count)) return;
  const int32_t* products = steps.products + row * kProductColumns;
  encode_view<kSeedOutputs>(products, steps.norms[row], steps.errors[row], scales->seed, dim, row, row >= count, seed);
  encode_view<kPrefixOutputs>(products + kSeedOutputs, steps.norms[row], steps.errors[row], scales->prefix, dim, row, row >= count, prefix);
}

// ---- Scales ---------------------------------------------------------------------------------------------------------------------------------------

__host__ __device__ __forceinline__ int64_t sample_step(int64_t count) { return count > kSampleRows ? count / kSampleRows : 1; }
__host__ __device__ __forceinline__ int64_t sample_size(int64_t count) { return count < kSampleRows ? count : kSampleRows; }

__global__ void __launch_bounds__(kBlockThreads) mean_of_sample_kernel(const Rows rows, double* center) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
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
__global__ void __launch_bounds__(kBlockThreads)
    sample_kernel(const Rows rows, const double* center, const StepRows steps, const Scales* scales, Sampled what, double* sample) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarpsOfBlock + warp_of_thread();
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

// ---- The matrix -----------------------------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kBlockThreads)
    split_matrix_kernel(const int16_t* matrix, int64_t dim, int64_t depth, int8_t* planes, int32_t* flags) {
  const int output = static_cast<int>(blockIdx.x);
  for (int64_t j = threadIdx.x; j < depth; j += kBlockThreads) {
    const int value = output < kOutputs && j < dim ? matrix[output * dim + j] : 0, lower = ((value + 64) & 127) - 64;
    if (value > kLargestPlaneValue || value < -kLargestPlaneValue) atomicOr(flags, kNoContraction);
    planes[output * 2 * depth + j] = static_cast<int8_t>((value - lower) >> kPlaneBits);
    planes[(output * 2 + 1) * depth + j] = static_cast<int8_t>(lower);
  }
  if (output >= kOutputs) return;
  // Gershgorin: this row of |A A^T| within its prefix. One warp a product, exact.
  const int begin = output < kSeedOutputs ? 0 : kSeedOutputs, end = output < kSeedOutputs ? kSeedOutputs : kOutputs;
  if (warp_of_thread() != 0) return;
  long long total = 0;
  for (int other = begin; other < end; ++other) {
    long long product = 0;
    for (int64_t j = lane_of_thread(); j < dim; j += kWarp)
      product += static_cast<int>(matrix[output * dim + j]) * static_cast<int>(matrix[other * dim + j]);
    product = warp_sum(product);
    total += product < 0 ? -product : product;
  }
  if (total > 1ll << (2 * kContractionBits) && lane_of_thread() == 0) atomicOr(flags, kNoContraction);
}

cudaError_t contract(const StepRows& steps, int64_t count, int64_t depth, const int8_t* matrix, cudaStream_t stream) {
  PATCHCORE_CUDA_TRY(cudaFuncSetAttribute(contract_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kContractBytes));
  const dim3 grid(static_cast<unsigned>(padded_rows(count) / kContractRows), kProductColumns / kContractOutputs);
  PATCHCORE_LAUNCH((contract_kernel), grid, dim3(kBlockThreads), kContractBytes, stream, steps.planes, matrix, depth, steps.products);
  return cudaGetLastError();
}

}  // namespace

cudaError_t encode_rows(const Rows& rows, const int32_t* map, int64_t count, const Encoding& encoding, const StepRows& steps, const CodeRows& full,
                        const CodeRows& seed, const CodeRows& prefix, int32_t* flags, cudaStream_t stream) {
  const int64_t padded = padded_rows(count);
  const dim3 grid(static_cast<unsigned>(blocks_of(padded, kWarpsOfBlock)));
  const bool prefixes = encoding.matrix != nullptr;
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(full.tile_residuals, 0, static_cast<size_t>(padded / 128) * sizeof(float), stream));
  PATCHCORE_LAUNCH((encode_rows_kernel), grid, dim3(kBlockThreads), 0, stream, rows, map, count, encoding, prefixes ? steps : StepRows{}, full,
                   flags);
  PATCHCORE_CUDA_TRY(cudaGetLastError());
  if (!prefixes) return cudaSuccess;
  PATCHCORE_CUDA_TRY(contract(steps, count, full.depth, encoding.matrix, stream));
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(seed.tile_residuals, 0, static_cast<size_t>(padded / 128) * sizeof(float), stream));
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(prefix.tile_residuals, 0, static_cast<size_t>(padded / 128) * sizeof(float), stream));
  PATCHCORE_LAUNCH((encode_views_kernel), grid, dim3(kBlockThreads), 0, stream, steps, count, rows.dim, encoding.scales, seed, prefix);
  return cudaGetLastError();
}

cudaError_t mean_of_sample(const Rows& rows, double* center, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(blocks_of(rows.dim, kBlockThreads)));
  PATCHCORE_LAUNCH((mean_of_sample_kernel), grid, dim3(kBlockThreads), 0, stream, rows, center);
  return cudaGetLastError();
}

cudaError_t choose_scales(const Rows& rows, const Encoding& encoding, const StepRows& steps, const CodeRows& full, double* sample, Scales* scales,
                          int32_t* flags, cudaStream_t stream) {
  const int64_t count = sample_size(rows.count);
  const auto choose = [&](Sampled what) {
    const dim3 grid(static_cast<unsigned>(blocks_of(count, kWarpsOfBlock)));
    PATCHCORE_LAUNCH((sample_kernel), grid, dim3(kBlockThreads), 0, stream, rows, encoding.center, steps, encoding.scales, what, sample);
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
  const dim3 grid(static_cast<unsigned>(blocks_of(padded_rows(count), kWarpsOfBlock)));
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(full.tile_residuals, 0, static_cast<size_t>(padded_rows(count) / 128) * sizeof(float), stream));
  PATCHCORE_LAUNCH((encode_rows_kernel), grid, dim3(kBlockThreads), 0, stream, sampled, nullptr, count, encoding, steps, full, flags);
  PATCHCORE_CUDA_TRY(cudaGetLastError());
  PATCHCORE_CUDA_TRY(contract(steps, count, full.depth, encoding.matrix, stream));
  for (const Sampled what : {Sampled::kSeedResidual, Sampled::kSeedMagnitude, Sampled::kPrefixResidual, Sampled::kPrefixMagnitude})
    PATCHCORE_CUDA_TRY(choose(what));
  return cudaSuccess;
}

cudaError_t split_matrix(const int16_t* matrix, int64_t dim, int8_t* planes, int32_t* flags, cudaStream_t stream) {
  PATCHCORE_LAUNCH((split_matrix_kernel), dim3(kProductColumns), dim3(kBlockThreads), 0, stream, matrix, dim, full_depth(dim), planes, flags);
  return cudaGetLastError();
}

}  // namespace patchcore::cuda
