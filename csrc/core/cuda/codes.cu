// Rows of features as codes (codes.cuh): their coordinates, the contraction, its views, and its matrix in two planes.
#include "mma.cuh"
#include "views.cuh"

namespace patchcore::cuda {

namespace {

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

__global__ void __launch_bounds__(kCodeThreads) encode_rows_kernel(const Rows rows, const int32_t* map, int64_t count, const Encoding encoding,
                                                                   const StepRows steps, const CodeRows full, int32_t* flags) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCodeWarps + warp_of_thread(), dim = rows.dim, depth = full.depth;
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

__global__ void __launch_bounds__(kCodeThreads, 2) contract_kernel(const int8_t* steps, const int8_t* matrix, int64_t depth, int32_t* products) {
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

__global__ void __launch_bounds__(kCodeThreads)
    encode_views_kernel(const StepRows steps, int64_t count, int64_t dim, const Scales* scales, const CodeRows seed, const CodeRows prefix) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCodeWarps + warp_of_thread();
  if (row >= padded_rows(count)) return;
  const int32_t* products = steps.products + row * kProductColumns;
  encode_view<kSeedOutputs>(products, steps.norms[row], steps.errors[row], scales->seed, dim, row, row >= count, seed);
  encode_view<kPrefixOutputs>(products + kSeedOutputs, steps.norms[row], steps.errors[row], scales->prefix, dim, row, row >= count, prefix);
}

// ---- The matrix -----------------------------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kCodeThreads)
    split_matrix_kernel(const int16_t* matrix, int64_t dim, int64_t depth, int8_t* planes, int32_t* flags) {
  const int output = static_cast<int>(blockIdx.x);
  for (int64_t j = threadIdx.x; j < depth; j += kCodeThreads) {
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
  PATCHCORE_CUDA_TRY(allow_shared(contract_kernel, kContractBytes));
  const dim3 grid(static_cast<unsigned>(padded_rows(count) / kContractRows), kProductColumns / kContractOutputs);
  PATCHCORE_LAUNCH((contract_kernel), grid, dim3(kCodeThreads), kContractBytes, stream, steps.planes, matrix, depth, steps.products);
  return cudaGetLastError();
}

}  // namespace

cudaError_t encode_steps(const Rows& rows, const int32_t* map, int64_t count, const Encoding& encoding, const StepRows& steps, const CodeRows& full,
                         int32_t* flags, cudaStream_t stream) {
  const int64_t padded = padded_rows(count);
  const dim3 grid(static_cast<unsigned>(blocks_of(padded, kCodeWarps)));
  const bool prefixes = encoding.matrix != nullptr;
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(full.tile_residuals, 0, static_cast<size_t>(padded / 128) * sizeof(float), stream));
  PATCHCORE_LAUNCH((encode_rows_kernel), grid, dim3(kCodeThreads), 0, stream, rows, map, count, encoding, prefixes ? steps : StepRows{}, full, flags);
  PATCHCORE_CUDA_TRY(cudaGetLastError());
  return prefixes ? contract(steps, count, full.depth, encoding.matrix, stream) : cudaSuccess;
}

cudaError_t encode_rows(const Rows& rows, const int32_t* map, int64_t count, const Encoding& encoding, const StepRows& steps, const CodeRows& full,
                        const CodeRows& seed, const CodeRows& prefix, int32_t* flags, cudaStream_t stream) {
  PATCHCORE_CUDA_TRY(encode_steps(rows, map, count, encoding, steps, full, flags, stream));
  if (encoding.matrix == nullptr) return cudaSuccess;
  const int64_t padded = padded_rows(count);
  const dim3 grid(static_cast<unsigned>(blocks_of(padded, kCodeWarps)));
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(seed.tile_residuals, 0, static_cast<size_t>(padded / 128) * sizeof(float), stream));
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(prefix.tile_residuals, 0, static_cast<size_t>(padded / 128) * sizeof(float), stream));
  PATCHCORE_LAUNCH((encode_views_kernel), grid, dim3(kCodeThreads), 0, stream, steps, count, rows.dim, encoding.scales, seed, prefix);
  return cudaGetLastError();
}

cudaError_t split_matrix(const int16_t* matrix, int64_t dim, int8_t* planes, int32_t* flags, cudaStream_t stream) {
  PATCHCORE_LAUNCH((split_matrix_kernel), dim3(kProductColumns), dim3(kCodeThreads), 0, stream, matrix, dim, full_depth(dim), planes, flags);
  return cudaGetLastError();
}

}  // namespace patchcore::cuda
