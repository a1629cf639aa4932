// CUDA kernels of the ops: tensors in, tensors out, on the tensors' device and its current stream; workspace from torch's allocator.
//
// Whether a value is not finite is known on the device only. Each op therefore waits for its flags, which costs some ten microseconds, and reports;
// while a CUDA graph is being captured nothing can wait: then bad queries and images get NaN, as kernels.h says, and nothing is reported.
#include "cuda/kernels.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace patchcore::bindings {

namespace {

// The SIMT runner's build (csrc/tests/simt) has the same code work on CPU tensors.
#if defined(PATCHCORE_SIMT)
constexpr DeviceType kDevice = DeviceType::CPU;
#else
constexpr DeviceType kDevice = DeviceType::CUDA;
#endif
constexpr int64_t kPassesAtATime = 8;  // of the coreset, between two looks at its progress

void check(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  std::ostringstream message;  // not a mistake of the caller's: no mark
  message << op << ": CUDA said \"" << cudaGetErrorString(error) << "\".";
  throw std::runtime_error(message.str());
}

// The device of a call's tensors, made current, and its current stream.
class Call {
 public:
  Call(const char* op, const Tensor& tensor) : op_(op), device_(tensor.device()) {
#if !defined(PATCHCORE_SIMT)
    guard_.emplace(device_.index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_.index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
#endif
  }

  cudaStream_t stream() const { return stream_; }

  Tensor empty(std::initializer_list<int64_t> size, ScalarType type) const {
    return torch::stable::empty(std::vector<int64_t>(size), type, std::nullopt, device_);
  }

  // Opaque memory: zero where no array lies, so that the same rows give the same bytes.
  Tensor zeros(int64_t bytes) const {
    Tensor memory = empty({bytes}, ScalarType::Byte);
    check(cudaMemsetAsync(memory.mutable_data_ptr(), 0, static_cast<size_t>(bytes), stream_));
    return memory;
  }

  Tensor workspace(int64_t bytes) const { return empty({bytes > 0 ? bytes : 1}, ScalarType::Byte); }

  // Every tensor of a call must be on the same device.
  void same_device(const Tensor& tensor, const char* argument) const {
    if (is_on(kDevice, tensor) && tensor.device() != device_)
      fail(op_, ": expected all tensors on one device, got ", argument, " on cuda:", tensor.device().index(), " and others on cuda:", device_.index(),
           ".");
  }

  void check(cudaError_t error) const { bindings::check(error, op_); }

  // Copies `count` values to the host, and waits for them.
  template <class T>
  std::vector<T> fetch(const void* data, int64_t count) const {
    std::vector<T> values(static_cast<size_t>(count));
    check(cudaMemcpyAsync(values.data(), data, values.size() * sizeof(T), cudaMemcpyDeviceToHost, stream_));
    check(cudaStreamSynchronize(stream_));
    return values;
  }

  bool is_capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }

 private:
  const char* op_;
  torch::stable::Device device_;
#if !defined(PATCHCORE_SIMT)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// The flags of a call (kernels.h).
class Flags {
 public:
  explicit Flags(const Call& call) : call_(call), tensor_(call.empty({1}, ScalarType::Int)) {
    call.check(cudaMemsetAsync(data(), 0, sizeof(int32_t), call.stream()));
  }
  int32_t* data() { return static_cast<int32_t*>(tensor_.mutable_data_ptr()); }

  // Waits for the kernels; 0 while a graph is being captured.
  int32_t read() const { return call_.is_capturing() ? 0 : call_.fetch<int32_t>(tensor_.const_data_ptr(), 1)[0]; }

 private:
  const Call& call_;
  Tensor tensor_;
};

void* memory_of(Tensor& tensor) { return tensor.mutable_data_ptr(); }

template <class T>
const T* values_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* writable(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

int64_t first_bad_row(const Call& call, const Rows& rows) {
  Tensor row = call.empty({}, ScalarType::Long);
  call.check(cuda::first_nonfinite_row_cuda(rows, writable<int64_t>(row), call.stream()));
  return call.fetch<int64_t>(row.const_data_ptr(), 1)[0];
}

// Called when kernels met a NaN or an infinity: names the argument and its first bad row.
[[noreturn]] void explain_nonfinite(const Call& call, const char* op, std::initializer_list<std::pair<const char*, const Rows*>> arguments) {
  for (const auto& [name, rows] : arguments) {
    const int64_t row = first_bad_row(call, *rows);
    if (row >= 0) fail_nonfinite(op, name, row);
  }
  fail(op, ": expected finite results, got a value beyond the range of float32.");
}

// Opaque memory that another op made: of the right size, where kernels can use it.
void check_opaque(const Tensor& tensor, int64_t bytes, const char* op, const char* argument, const char* source) {
  if (!is_on(kDevice, tensor) || tensor.scalar_type() != ScalarType::Byte || tensor.dim() != 1 || tensor.size(0) != bytes ||
      reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 != 0) {
    fail(op, ": expected ", argument, " to come from ", source, " on this device, ", bytes, " bytes, got shape ", shape_of(tensor), ".");
  }
}

struct PreparedBank {
  const void* memory = nullptr;
  bool with_prefixes = false;
};

PreparedBank prepared_of(const std::optional<Tensor>& prepared, const Rows& bank, const char* op) {
  if (!prepared.has_value()) return {};
  if (prepared->dim() != 1) fail(op, ": expected prepared to come from prepare_bank, got shape ", shape_of(*prepared), ".");
  const bool with_prefixes = prepared->size(0) != cuda::prepared_bank_bytes(bank.count, bank.dim, false);
  check_opaque(*prepared, cuda::prepared_bank_bytes(bank.count, bank.dim, with_prefixes), op, "prepared", "prepare_bank of the same bank");
  return {prepared->const_data_ptr(), with_prefixes};
}

}  // namespace

Tensor first_nonfinite_row_cuda(const Tensor& features) {
  const char* op = "first_nonfinite_row";
  const Feature input = features_on(kDevice, features, op, "features");
  const Call call(op, features);
  Tensor row = call.empty({}, ScalarType::Long);
  call.check(cuda::first_nonfinite_row_cuda(input.rows, writable<int64_t>(row), call.stream()));
  return row;
}

Tensor square_root_cuda(const Tensor& values) {
  const char* op = "square_root";
  if (!is_on(kDevice, values) || values.scalar_type() != ScalarType::Double) fail(op, ": expected values to be a float64 CUDA tensor.");
  const Call call(op, values);
  const Tensor input = torch::stable::contiguous(values);
  Tensor roots = torch::stable::empty_like(input);
  call.check(cuda::square_root_cuda(values_of<double>(input), input.numel(), writable<double>(roots), call.stream()));
  return roots;
}

Tensor random_projection_cuda(const Tensor& features, const Tensor& matrix) {
  const char* op = "random_projection";
  const Feature input = features_on(kDevice, features, op, "features");
  check_matrix_on(kDevice, matrix, ScalarType::Double, input.rows.dim, op, "float64", "projection_dim");
  const Call call(op, features);
  call.same_device(matrix, "matrix");
  Flags flags(call);
  const int64_t num_outputs = matrix.size(0);
  Tensor memory = call.workspace(cuda::random_projection_workspace_bytes(input.rows.dim, num_outputs));
  Tensor projected = call.empty({input.rows.count, num_outputs}, ScalarType::Float);
  call.check(cuda::random_projection_cuda(input.rows, values_of<double>(matrix), num_outputs, memory_of(memory), writable<float>(projected),
                                          flags.data(), call.stream()));
  if (flags.read() != 0) explain_nonfinite(call, op, {{"features", &input.rows}});
  return projected;
}

void update_min_distances_cuda(const Tensor& features, const Tensor& centers, Tensor min_distances) {
  const char* op = "update_min_distances";
  const Feature input = features_on(kDevice, features, op, "features");
  const Feature added = features_on(kDevice, centers, op, "centers");
  check_same_dim(added.rows, "centers", input.rows, "features", op);
  check_vector_on(kDevice, min_distances, ScalarType::Double, input.rows.count, op, "min_distances", "float64");
  const Call call(op, features);
  call.same_device(centers, "centers");
  call.same_device(min_distances, "min_distances");
  Flags flags(call);
  Tensor memory = call.workspace(cuda::update_min_distances_workspace_bytes(input.rows, added.rows));
  call.check(
      cuda::update_min_distances_cuda(input.rows, added.rows, memory_of(memory), writable<double>(min_distances), flags.data(), call.stream()));
  if (flags.read() != 0) explain_nonfinite(call, op, {{"features", &input.rows}, {"centers", &added.rows}});
}

namespace {

Tensor codes_of(const Call& call, const Rows& rows, const double* center, const char* op) {
  Flags flags(call);
  Tensor codes = call.zeros(cuda::coreset_codes_bytes(rows.count, rows.dim));
  Tensor memory = call.workspace(cuda::coreset_codes_workspace_bytes(rows.dim));
  call.check(cuda::coreset_codes_cuda(rows, center, memory_of(memory), memory_of(codes), flags.data(), call.stream()));
  if (flags.read() != 0) explain_nonfinite(call, op, {{"features", &rows}});
  return codes;
}

void check_codes(const Call& call, const Tensor& codes, const Rows& rows, const char* op) {
  check_coded_features(rows, op);
  check_opaque(codes, cuda::coreset_codes_bytes(rows.count, rows.dim), op, "codes", "coreset_codes of the same features");
  call.same_device(codes, "codes");
}

}  // namespace

Tensor coreset_codes_cuda(const Tensor& features, const Tensor& center, const Tensor& prefix) {
  const char* op = "coreset_codes";
  const Feature input = features_on(kDevice, features, op, "features");
  check_coded_features(input.rows, op);
  check_vector_on(kDevice, center, ScalarType::Double, input.rows.dim, op, "center", "float64");
  if (prefix.dim() != 2 || prefix.size(0) != input.rows.dim || prefix.size(1) != 0)
    fail(op, ": expected prefix to be of shape [", input.rows.dim, ", 0] (CUDA compares all coordinates at once), got ", shape_of(prefix), ".");
  const Call call(op, features);
  call.same_device(center, "center");
  return codes_of(call, input.rows, values_of<double>(center), op);
}

void add_picks_cuda(const Tensor& features, const Tensor& picks, Tensor min_distances, const Tensor& codes) {
  const char* op = "add_picks";
  const Feature input = features_on(kDevice, features, op, "features");
  check_vector_on(kDevice, min_distances, ScalarType::Double, input.rows.count, op, "min_distances", "float64");
  if (picks.dim() != 1) fail(op, ": expected picks to be of shape [count], got ", shape_of(picks), ".");
  check_vector_on(kDevice, picks, ScalarType::Long, picks.size(0), op, "picks", "int64");
  const Call call(op, features);
  call.same_device(picks, "picks");
  call.same_device(min_distances, "min_distances");
  check_codes(call, codes, input.rows, op);
  check_picks(call.fetch<int64_t>(picks.const_data_ptr(), picks.size(0)).data(), picks.size(0), input.rows, op);
  Tensor memory = call.workspace(cuda::coreset_workspace_bytes(input.rows));
  call.check(cuda::add_picks_cuda(input.rows, codes.const_data_ptr(), values_of<int64_t>(picks), picks.size(0), memory_of(memory),
                                  writable<double>(min_distances), call.stream()));
}

namespace {

// The state of a run as the CPU's kernels ask for it.
void check_state(const Call& call, Tensor& state, int64_t count, const char* op) {
  Tensor report = call.empty({2}, ScalarType::Long);
  double* values = writable<double>(state);
  call.check(cuda::check_state_cuda(values, state.size(0), writable<int64_t>(report), call.stream()));
  const std::vector<int64_t> found = call.fetch<int64_t>(report.const_data_ptr(), 2);
  if (found[1] >= 0) {
    fail(op, ": expected min_distances to hold squared distances, or -1 for picks, got ", call.fetch<double>(values + found[1], 1)[0], " in row ",
         found[1], ".");
  }
  if (count < 0 || count > found[0]) fail(op, ": expected count to lie in [0, ", found[0], "], the rows not yet picked, got ", count, ".");
}

// Passes until all picks are made; the device is asked after every kPassesAtATime.
void pick(const Call& call, const Rows& rows, const Tensor& codes, int64_t count, double* state, int64_t* indices, double* squared_distances,
          const char* op) {
  Tensor memory = call.workspace(cuda::coreset_workspace_bytes(rows)), progress = call.empty({2}, ScalarType::Long);
  call.check(cuda::start_coreset_cuda(rows, count, 0, memory_of(memory), writable<int64_t>(progress), call.stream()));
  std::vector<int64_t> made = {0, count == 0};
  while (made[1] == 0) {
    call.check(cuda::coreset_passes_cuda(rows, codes.const_data_ptr(), kPassesAtATime, memory_of(memory), state, indices, squared_distances,
                                         writable<int64_t>(progress), call.stream()));
    made = call.fetch<int64_t>(progress.const_data_ptr(), 2);
  }
  if (made[0] != count) fail(op, ": expected count to be at most the rows not yet picked, got ", count, ", of which ", made[0], " could be picked.");
}

}  // namespace

std::tuple<Tensor, Tensor> greedy_coreset_cuda(const Tensor& features, Tensor min_distances, int64_t count, std::optional<Tensor> codes) {
  const char* op = "greedy_coreset";
  const Feature input = features_on(kDevice, features, op, "features");
  const Rows& rows = input.rows;
  check_vector_on(kDevice, min_distances, ScalarType::Double, rows.count, op, "min_distances", "float64");
  const Call call(op, features);
  call.same_device(min_distances, "min_distances");
  check_state(call, min_distances, count, op);
  Tensor indices = call.empty({count}, ScalarType::Long), squared_distances = call.empty({count}, ScalarType::Double);
  if (count == 0) return {indices, squared_distances};
  double* state = writable<double>(min_distances);
  if (rows.dim > kMaxFilterDim) {
    Flags flags(call);
    Tensor picked = call.empty({1}, ScalarType::Int);
    call.check(cuda::greedy_by_all_cuda(rows, count, writable<int32_t>(picked), state, writable<int64_t>(indices),
                                        writable<double>(squared_distances), flags.data(), call.stream()));
    if (flags.read() != 0) explain_nonfinite(call, op, {{"features", &rows}});
    return {indices, squared_distances};
  }
  if (codes.has_value()) check_codes(call, *codes, rows, op);
  pick(call, rows, codes.has_value() ? *codes : codes_of(call, rows, nullptr, op), count, state, writable<int64_t>(indices),
       writable<double>(squared_distances), op);
  return {indices, squared_distances};
}

Tensor prepare_bank_cuda(const Tensor& bank, const Tensor& center, const Tensor& matrix, int64_t short_outputs, const Tensor& order) {
  const char* op = "prepare_bank";
  const Feature known = features_on(kDevice, bank, op, "bank");
  const Rows& rows = known.rows;
  check_prepared_size(rows, op);
  check_vector_on(kDevice, center, ScalarType::Double, rows.dim, op, "center", "float64");
  check_matrix_on(kDevice, matrix, ScalarType::Short, rows.dim, op, "int16", "outputs");
  check_vector_on(kDevice, order, ScalarType::Int, rows.count, op, "order", "int32");
  const bool with_prefixes = matrix.size(0) > 0;
  if (short_outputs != (with_prefixes ? cuda::kSeedPrefix : 0) || (with_prefixes && matrix.size(0) != cuda::kSeedPrefix + cuda::kLongPrefix)) {
    fail(op, ": expected matrix to have ", cuda::kSeedPrefix, " + ", cuda::kLongPrefix, " rows and short_outputs to be ", cuda::kSeedPrefix,
         ", or both to be 0, got ", matrix.size(0), " and ", short_outputs, ".");
  }
  const Call call(op, bank);
  call.same_device(center, "center");
  call.same_device(matrix, "matrix");
  call.same_device(order, "order");
  check_permutation(call.fetch<int32_t>(order.const_data_ptr(), rows.count).data(), rows.count, op, "order");
  Flags flags(call);
  Tensor prepared = call.zeros(cuda::prepared_bank_bytes(rows.count, rows.dim, with_prefixes));
  Tensor memory = call.workspace(cuda::prepare_bank_workspace_bytes(rows.count, rows.dim, with_prefixes));
  call.check(cuda::prepare_bank_cuda(rows, values_of<double>(center), with_prefixes ? values_of<int16_t>(matrix) : nullptr, values_of<int32_t>(order),
                                     with_prefixes, memory_of(memory), memory_of(prepared), flags.data(), call.stream()));
  const int32_t problems = flags.read();
  if ((problems & cuda::kNonFinite) != 0) explain_nonfinite(call, op, {{"bank", &rows}});
  if ((problems & cuda::kNoContraction) != 0)
    fail(op, ": expected matrix / 2^14 to hold two contractions (each row of |A A^T| sums to at most 1) with entries within 16255, got others.");
  return prepared;
}

std::tuple<Tensor, Tensor> nearest_neighbors_cuda(const Tensor& queries, const Tensor& bank, int64_t k, std::optional<Tensor> prepared) {
  const char* op = "nearest_neighbors";
  const Feature asked = features_on(kDevice, queries, op, "queries");
  const Feature known = features_on(kDevice, bank, op, "bank");
  check_same_dim(asked.rows, "queries", known.rows, "bank", op);
  check_k(k, known.rows, op);
  const PreparedBank codes = prepared_of(prepared, known.rows, op);
  const Call call(op, queries);
  call.same_device(bank, "bank");
  if (prepared.has_value()) call.same_device(*prepared, "prepared");
  Flags flags(call);
  Tensor squared_distances = call.empty({asked.rows.count, k}, ScalarType::Double), indices = call.empty({asked.rows.count, k}, ScalarType::Long);
  Tensor memory = call.workspace(cuda::nearest_neighbors_workspace_bytes(asked.rows, known.rows, codes.memory != nullptr, codes.with_prefixes, k));
  call.check(cuda::nearest_neighbors_cuda(asked.rows, known.rows, codes.memory, codes.with_prefixes, k, 0, memory_of(memory),
                                          writable<double>(squared_distances), writable<int64_t>(indices), nullptr, flags.data(), call.stream()));
  if (flags.read() != 0) explain_nonfinite(call, op, {{"queries", &asked.rows}, {"bank", &known.rows}});
  return {squared_distances, indices};
}

Tensor image_scores_cuda(const Tensor& squared_distances, const Tensor& nearest_indices, const Tensor& queries, const Tensor& bank,
                         int64_t num_neighbors, std::optional<Tensor> prepared) {
  const char* op = "image_scores";
  check_nearest_on(kDevice, squared_distances, nearest_indices, op);
  const int64_t batch = squared_distances.size(0), num_patches = squared_distances.size(1);
  const Feature asked = features_on(kDevice, queries, op, "queries");
  const Feature known = features_on(kDevice, bank, op, "bank");
  check_scored(asked.rows, known.rows, batch * num_patches, num_neighbors, op);
  const PreparedBank codes = prepared_of(prepared, known.rows, op);
  const Call call(op, queries);
  call.same_device(bank, "bank");
  call.same_device(squared_distances, "squared_distances");
  call.same_device(nearest_indices, "nearest_indices");
  if (prepared.has_value()) call.same_device(*prepared, "prepared");
  Flags flags(call);
  Tensor scores = call.empty({batch}, ScalarType::Float);
  Tensor memory = call.workspace(cuda::image_scores_workspace_bytes(known.rows, codes.memory != nullptr, codes.with_prefixes, batch, num_neighbors));
  call.check(cuda::image_scores_cuda(values_of<double>(squared_distances), values_of<int64_t>(nearest_indices), asked.rows, known.rows, codes.memory,
                                     codes.with_prefixes, batch, num_patches, num_neighbors, memory_of(memory), writable<float>(scores), flags.data(),
                                     call.stream()));
  const int32_t problems = flags.read();
  if ((problems & cuda::kOutside) != 0)
    fail(op, ": expected nearest_indices to lie in [0, ", known.rows.count, "), the rows of the bank, got one outside.");
  if (problems != 0) explain_nonfinite(call, op, {{"queries", &asked.rows}, {"bank", &known.rows}});
  return scores;
}

}  // namespace patchcore::bindings

#if defined(PATCHCORE_SIMT)
#define PATCHCORE_DISPATCH_KEY CPU  // the library of schemas.cpp alone, without the CPU's kernels
#else
#define PATCHCORE_DISPATCH_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(patchcore_ext, PATCHCORE_DISPATCH_KEY, library) {
  library.impl("first_nonfinite_row", TORCH_BOX(&patchcore::bindings::first_nonfinite_row_cuda));
  library.impl("square_root", TORCH_BOX(&patchcore::bindings::square_root_cuda));
  library.impl("random_projection", TORCH_BOX(&patchcore::bindings::random_projection_cuda));
  library.impl("update_min_distances", TORCH_BOX(&patchcore::bindings::update_min_distances_cuda));
  library.impl("coreset_codes", TORCH_BOX(&patchcore::bindings::coreset_codes_cuda));
  library.impl("add_picks", TORCH_BOX(&patchcore::bindings::add_picks_cuda));
  library.impl("greedy_coreset", TORCH_BOX(&patchcore::bindings::greedy_coreset_cuda));
  library.impl("prepare_bank", TORCH_BOX(&patchcore::bindings::prepare_bank_cuda));
  library.impl("nearest_neighbors", TORCH_BOX(&patchcore::bindings::nearest_neighbors_cuda));
  library.impl("image_scores", TORCH_BOX(&patchcore::bindings::image_scores_cuda));
}
