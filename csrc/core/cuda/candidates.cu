// The candidates of a pass: the rows that come first in the order of picks. They need not be of any given number: whatever threshold divides the rows
// in two, the loop among the upper ones gives the sequence's picks as long as the best of them comes before the best of the others, as it stood when
// the pass began. The threshold is found by counting digits of the keys, from the top.
#include "coreset.cuh"

namespace patchcore::cuda {

namespace {

constexpr int kLevels = 8;  // of digits: 96 bits, the value's 64 and the row's 32
constexpr int kSelectThreads = 256;

__device__ __forceinline__ PickKey key_of(double value, int64_t row) {
  return {static_cast<unsigned long long>(__double_as_longlong(value)), ~static_cast<uint32_t>(row)};
}

// Digit `level` from the top; digits 0 .. 4 are of the value, 5 of both, 6 and 7 of the row.
__device__ __forceinline__ int digit_of(const PickKey& key, int level) {
  if (level < 5) return static_cast<int>(key.value >> (64 - kDigitBits * (level + 1)) & (kDigits - 1));
  if (level == 5) return static_cast<int>((key.value & 15) << 8 | key.row >> 24);
  return static_cast<int>(key.row >> (kDigitBits * (7 - level)) & (kDigits - 1));
}

// The key with all but its first `digits` digits zero.
__device__ __forceinline__ PickKey first_digits(PickKey key, int digits) {
  const int bits = kDigitBits * digits;
  if (bits < 64) key.value = bits == 0 ? 0 : key.value >> (64 - bits) << (64 - bits);
  const int row_bits = bits - 64;
  key.row = row_bits <= 0 ? 0 : row_bits >= 32 ? key.row : key.row >> (32 - row_bits) << (32 - row_bits);
  return key;
}

__device__ __forceinline__ bool above(const PickKey& a, const PickKey& b) { return a.value > b.value || (a.value == b.value && a.row > b.row); }
__device__ __forceinline__ bool equal(const PickKey& a, const PickKey& b) { return a.value == b.value && a.row == b.row; }

// True in the last block of a launch to get here, for all its threads: what the others wrote before is then visible.
__device__ __forceinline__ bool is_last_block(uint32_t* blocks_counted, int32_t* shared_flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    // Before the count: what the block's other threads wrote before the barrier. Behind it: what other blocks wrote.
    __threadfence();
    const bool last = atomicAdd(blocks_counted, 1u) == gridDim.x - 1;
    __threadfence();
    if (last) *blocks_counted = 0;  // for the next launch
    *shared_flag = last;
  }
  __syncthreads();
  if (*shared_flag == 0) return false;
  __threadfence();
  return true;
}

// Level 0 .. 7: counts the next digit of the rows that agree with the threshold so far; the last block chooses the digit. Ends when at least half a
// batch lies above, or all that is left fits.
__global__ void __launch_bounds__(kSelectThreads)
    count_digits_kernel(const double* values, int64_t count, int level, Run* run, int32_t* histogram, const Progress* progress) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  int32_t* counts = reinterpret_cast<int32_t*>(shared);  // [kDigits]
  int32_t* sums = counts + kDigits;                      // [kSelectThreads]
  int32_t* flag = sums + kSelectThreads;
  if (progress->done != 0 || (level > 0 && run->found != 0)) return;
  const int thread = static_cast<int>(threadIdx.x);
  const PickKey threshold = level == 0 ? PickKey{0, 0} : run->threshold;
  for (int i = thread; i < kDigits; i += kSelectThreads) counts[i] = 0;
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kSelectThreads + thread; row < count; row += stride) {
    if (values[row] < 0) continue;  // picked
    const PickKey key = key_of(values[row], row);
    if (equal(first_digits(key, level), threshold)) atomicAdd(&counts[digit_of(key, level)], 1);
  }
  __syncthreads();
  for (int i = thread; i < kDigits; i += kSelectThreads) {
    if (counts[i] != 0) atomicAdd(&histogram[i], counts[i]);
  }
  if (!is_last_block(&run->blocks_counted, flag)) return;
  constexpr int kEach = kDigits / kSelectThreads;
  int32_t sum = 0;
  for (int i = 0; i < kEach; ++i) {
    counts[thread * kEach + i] = histogram[thread * kEach + i];
    histogram[thread * kEach + i] = 0;  // for the next launch
    sum += counts[thread * kEach + i];
  }
  sums[thread] = sum;
  __syncthreads();
  if (thread != 0) return;
  const int32_t batch = run->batch;
  int32_t higher = level == 0 ? 0 : run->candidates_above;
  int group = kSelectThreads - 1;
  while (group >= 0 && higher + sums[group] <= batch) higher += sums[group--];
  int digit = group < 0 ? -1 : (group + 1) * kEach - 1;
  while (digit >= 0 && higher + counts[digit] <= batch) higher += counts[digit--];
  // digit: the first, from the top, that would be too many; -1: all that agree with the threshold fit.
  run->candidates_above = higher;
  run->digits = level + 1;
  run->found = digit < 0 || 2 * higher >= batch;
  PickKey next = threshold;
  if (digit < 0) {  // then level is 0: at a later level, those that agree were too many. All rows are candidates.
    run->digits = 0;
  } else if (level < 5) {
    next.value |= static_cast<unsigned long long>(digit) << (64 - kDigitBits * (level + 1));
  } else if (level == 5) {
    next.value |= static_cast<unsigned long long>(digit) >> 8;
    next.row |= static_cast<uint32_t>(digit) << 24;
  } else {
    next.row |= static_cast<uint32_t>(digit) << (kDigitBits * (7 - level));
  }
  run->threshold = next;
}

// Lists the candidates, in any order, and finds the best row that is none.
__global__ void __launch_bounds__(kSelectThreads)
    collect_kernel(const double* values, int64_t count, const CoresetMemory memory, const Progress* progress) {
  PATCHCORE_DYNAMIC_SHARED(shared);
  double* best = reinterpret_cast<double*>(shared);                       // [kSelectThreads]
  int32_t* best_row = reinterpret_cast<int32_t*>(best + kSelectThreads);  // [kSelectThreads]
  int32_t* flag = best_row + kSelectThreads;
  if (progress->done != 0) return;
  Run* run = memory.run;
  const int thread = static_cast<int>(threadIdx.x), digits = run->digits;
  const PickKey threshold = run->threshold;
  double excluded = kPicked;
  int32_t excluded_row = kNoRow;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kSelectThreads + thread; row < count; row += stride) {
    const double value = values[row];
    if (value < 0) continue;
    if (digits == 0 || above(first_digits(key_of(value, row), digits), threshold)) {
      const int32_t at = atomicAdd(&run->num_candidates, 1);
      memory.candidates[at] = static_cast<int32_t>(row);
      memory.keys[at] = value;
    } else if (picked_before(value, static_cast<int32_t>(row), excluded, excluded_row)) {
      excluded = value;
      excluded_row = static_cast<int32_t>(row);
    }
  }
  const auto reduce = [&] {
    best[thread] = excluded;
    best_row[thread] = excluded_row;
    for (int width = kSelectThreads / 2; width > 0; width /= 2) {
      __syncthreads();
      if (thread < width && picked_before(best[thread + width], best_row[thread + width], best[thread], best_row[thread])) {
        best[thread] = best[thread + width];
        best_row[thread] = best_row[thread + width];
      }
    }
    __syncthreads();
  };
  reduce();
  if (thread == 0) {
    memory.block_excluded[blockIdx.x] = best[0];
    memory.block_rows[blockIdx.x] = best_row[0];
  }
  if (!is_last_block(&run->blocks_counted, flag)) return;
  excluded = kPicked;
  excluded_row = kNoRow;
  for (int i = thread; i < static_cast<int>(gridDim.x); i += kSelectThreads) {
    if (picked_before(memory.block_excluded[i], memory.block_rows[i], excluded, excluded_row)) {
      excluded = memory.block_excluded[i];
      excluded_row = memory.block_rows[i];
    }
  }
  __syncthreads();  // before best is used again
  reduce();
  if (thread != 0) return;
  run->excluded = best[0];
  run->excluded_row = best_row[0];
}

// Copies the codes of listed rows, and pads the last tile. A warp a row.
__global__ void __launch_bounds__(kThreads) gather_kernel(const CodeRows codes, const int32_t* listed, const int32_t* count, const CodeRows out) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_of_thread();
  const int64_t listed_count = *count;
  if (listed_count == 0 || place >= (listed_count + 127) / 128 * 128) return;
  const bool padding = place >= listed_count;
  const int64_t row = padding ? 0 : listed[place];
  for (int64_t j = lane_of_thread() * 16; j < out.depth; j += kWarp * 16) {
    const int4 word = padding ? int4{0, 0, 0, 0} : *reinterpret_cast<const int4*>(codes.codes + row * codes.depth + j);
    *reinterpret_cast<int4*>(out.codes + place * out.depth + j) = word;
  }
  if (lane_of_thread() == 0) store_row(out, place, padding ? 0 : codes.norms[row], padding ? 0.0f : codes.residuals[row], padding);
}

}  // namespace

cudaError_t choose_candidates(const CodeRows& codes, const double* values, int64_t count, const CoresetMemory& memory, const Progress* progress,
                              cudaStream_t stream) {
  const int64_t blocks = blocks_of(count, 4 * kSelectThreads);
  const dim3 grid(static_cast<unsigned>(blocks < kMostSelectBlocks ? blocks : kMostSelectBlocks));
  for (int level = 0; level < kLevels; ++level) {
    PATCHCORE_LAUNCH((count_digits_kernel), grid, dim3(kSelectThreads), (kDigits + kSelectThreads) * 4 + 16, stream, values, count, level, memory.run,
                     memory.histogram, progress);
    PATCHCORE_CUDA_TRY(cudaGetLastError());
  }
  PATCHCORE_LAUNCH((collect_kernel), grid, dim3(kSelectThreads), kSelectThreads * 12 + 16, stream, values, count, memory, progress);
  PATCHCORE_CUDA_TRY(cudaGetLastError());
  return gather_codes(codes, memory.candidates, &memory.run->num_candidates, memory.gathered, stream);
}

cudaError_t gather_codes(const CodeRows& codes, const int32_t* listed, const int32_t* count, const CodeRows& out, cudaStream_t stream) {
  PATCHCORE_CUDA_TRY(cudaMemsetAsync(out.tile_residuals, 0, kMostCandidates / 128 * sizeof(float), stream));
  PATCHCORE_LAUNCH((gather_kernel), dim3(kMostCandidates / (kThreads / kWarp)), dim3(kThreads), 0, stream, codes, listed, count, out);
  return cudaGetLastError();
}

}  // namespace patchcore::cuda
