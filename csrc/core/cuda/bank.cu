// Banks: their codes for every search of a prepared one, or for one call.
#include "nearest.cuh"

namespace patchcore::cuda {

namespace {

constexpr int64_t kEncodeChunk = 16384;  // rows at a time

}  // namespace

Bank bank_at(const Rows& bank, bool with_prefixes, Pieces* pieces) {
  Bank at = {};
  at.rows = bank;
  at.encoding.scales = pieces->take<Scales>(1);
  at.encoding.center = pieces->take<double>(bank.dim);
  at.full = code_rows_at(bank.count, full_depth(bank.dim), pieces);
  if (!with_prefixes) return at;
  at.encoding.matrix = pieces->take<int8_t>(kProductColumns * 2 * full_depth(bank.dim));
  at.seed = code_rows_at(bank.count, kSeedDepth, pieces);
  at.prefix = code_rows_at(bank.count, kPrefixDepth, pieces);
  return at;
}

Bank prepared_bank_at(const Rows& bank, bool with_prefixes, const void* prepared) {
  Pieces pieces(const_cast<void*>(prepared));  // read only: Bank serves the preparation as well
  const int32_t* order = pieces.take<int32_t>(bank.count);
  Bank at = bank_at(bank, with_prefixes, &pieces);
  at.order = order;
  return at;
}

int64_t prepared_bank_bytes(int64_t count, int64_t dim, bool with_prefixes) {
  Pieces pieces(nullptr);
  pieces.take<int32_t>(count);
  bank_at({nullptr, ScalarType::kFloat32, count, dim, dim}, with_prefixes, &pieces);
  return pieces.used();
}

namespace {

struct PrepareMemory {
  double* sample;
  StepRows steps;
};

PrepareMemory prepare_memory(int64_t count, int64_t dim, bool with_prefixes, Pieces* pieces) {
  PrepareMemory memory = {};
  memory.sample = pieces->take<double>(kSampleRows);
  if (with_prefixes) memory.steps = step_rows_at(count < kEncodeChunk ? count : kEncodeChunk, dim, pieces);
  return memory;
}

}  // namespace

int64_t prepare_bank_workspace_bytes(int64_t count, int64_t dim, bool with_prefixes) {
  Pieces pieces(nullptr);
  prepare_memory(count, dim, with_prefixes, &pieces);
  return pieces.used();
}

cudaError_t prepare_bank_cuda(const Rows& bank, const double* center, const int16_t* matrix, const int32_t* order, bool with_prefixes,
                              void* workspace, void* prepared, int32_t* flags, cudaStream_t stream) {
  Pieces pieces(workspace);
  const PrepareMemory memory = prepare_memory(bank.count, bank.dim, with_prefixes, &pieces);
  const Bank at = prepared_bank_at(bank, with_prefixes, prepared);
  const Encoding& encoding = at.encoding;
  const auto bytes = [](int64_t count, size_t each) { return static_cast<size_t>(count) * each; };
  PATCHCORE_CUDA_TRY(cudaMemcpyAsync(const_cast<int32_t*>(at.order), order, bytes(bank.count, sizeof(int32_t)), cudaMemcpyDeviceToDevice, stream));
  PATCHCORE_CUDA_TRY(
      cudaMemcpyAsync(const_cast<double*>(encoding.center), center, bytes(bank.dim, sizeof(double)), cudaMemcpyDeviceToDevice, stream));
  if (with_prefixes) PATCHCORE_CUDA_TRY(split_matrix(matrix, bank.dim, const_cast<int8_t*>(encoding.matrix), flags, stream));
  PATCHCORE_CUDA_TRY(choose_scales(bank, encoding, memory.steps, at.full, memory.sample, const_cast<Scales*>(encoding.scales), flags, stream));
  const int64_t chunk = with_prefixes ? kEncodeChunk : bank.count;
  for (int64_t begin = 0; begin < bank.count; begin += chunk) {
    const int64_t count = bank.count - begin < chunk ? bank.count - begin : chunk;
    const CodeRows none = {};
    PATCHCORE_CUDA_TRY(encode_rows(bank, order + begin, count, encoding, memory.steps, rows_from(at.full, begin),
                                   with_prefixes ? rows_from(at.seed, begin) : none, with_prefixes ? rows_from(at.prefix, begin) : none, flags,
                                   stream));
  }
  return cudaSuccess;
}

OneOff one_off_at(const Rows& bank, Pieces* pieces) {
  const Bank at = bank_at(bank, false, pieces);
  return {at, pieces->take<double>(kSampleRows)};
}

cudaError_t encode_one_off(const Rows& bank, const OneOff& memory, int32_t* flags, cudaStream_t stream) {
  const Encoding& encoding = memory.bank.encoding;
  PATCHCORE_CUDA_TRY(mean_of_sample(bank, const_cast<double*>(encoding.center), stream));
  PATCHCORE_CUDA_TRY(choose_scales(bank, encoding, {}, {}, memory.sample, const_cast<Scales*>(encoding.scales), flags, stream));
  return encode_rows(bank, nullptr, bank.count, encoding, {}, memory.bank.full, {}, {}, flags, stream);
}

}  // namespace patchcore::cuda
