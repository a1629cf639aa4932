// CPU kernels of the ops: tensors in, tensors out, nothing else. Every check that keeps memory safe is made here as well as in Python, since an op
// can be called as torch.ops.patchcore_ext.<name> by anyone.
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "checks.h"
#include "coreset.h"
#include "filter.h"
#include "image_score.h"
#include "knn.h"
#include "projection.h"
#include "square_root.h"
#include "torch_compat.h"

namespace patchcore::bindings {

namespace {

constexpr DeviceType kDevice = DeviceType::CPU;

Feature features_of(const Tensor& tensor, const char* op, const char* argument) { return features_on(kDevice, tensor, op, argument); }

void check_vector(const Tensor& tensor, ScalarType type, int64_t size, const char* op, const char* argument, const char* type_name) {
  check_vector_on(kDevice, tensor, type, size, op, argument, type_name);
}

// Memory for one call of a kernel. Small ones are kept for the thread's next call: fresh pages would cost a short search a tenth of its time.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : size_(static_cast<size_t>(bytes)) {
    if (size_ <= kMostKept && kept_size_ >= size_) memory_.swap(kept_);
    if (memory_ == nullptr)
      memory_.reset(new char[size_]);
    else
      size_ = kept_size_;
  }
  ~Workspace() {
    if (size_ > kMostKept) return;
    kept_.swap(memory_);
    kept_size_ = size_;
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* get() const { return memory_.get(); }

 private:
  static constexpr size_t kMostKept = size_t{8} << 20;
  static thread_local std::unique_ptr<char[]> kept_;
  static thread_local size_t kept_size_;
  std::unique_ptr<char[]> memory_;
  size_t size_;
};

thread_local std::unique_ptr<char[]> Workspace::kept_;
thread_local size_t Workspace::kept_size_ = 0;

Tensor empty(std::initializer_list<int64_t> size, ScalarType type) {
  return torch::stable::empty(std::vector<int64_t>(size), type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// Called when a kernel met a NaN or an infinity: names the argument and its first bad row.
[[noreturn]] void explain_nonfinite(const char* op, std::initializer_list<std::pair<const char*, const Rows*>> arguments) {
  for (const auto& [name, rows] : arguments) {
    const int64_t row = first_nonfinite_row_cpu(*rows, torch_threads(rows->count * rows->dim));
    if (row >= 0) fail_nonfinite(op, name, row);
  }
  fail(op, ": expected finite results, got a value beyond the range of float32.");
}

}  // namespace

Tensor first_nonfinite_row(const Tensor& features) {
  const Feature input = features_of(features, "first_nonfinite_row", "features");
  Tensor row = empty({}, ScalarType::Long);
  *static_cast<int64_t*>(row.mutable_data_ptr()) = first_nonfinite_row_cpu(input.rows, torch_threads(input.rows.count * input.rows.dim));
  return row;
}

Tensor square_root(const Tensor& values) {
  if (!values.is_cpu() || values.scalar_type() != ScalarType::Double) fail("square_root: expected values to be a float64 CPU tensor.");
  const Tensor input = torch::stable::contiguous(values);
  Tensor roots = torch::stable::empty_like(input);
  square_root_cpu(static_cast<const double*>(input.const_data_ptr()), input.numel(), torch_threads(input.numel()),
                  static_cast<double*>(roots.mutable_data_ptr()));
  return roots;
}

Tensor random_projection(const Tensor& features, const Tensor& matrix) {
  const char* op = "random_projection";
  const Feature input = features_of(features, op, "features");
  check_matrix_on(kDevice, matrix, ScalarType::Double, input.rows.dim, op, "float64", "projection_dim");
  const int64_t num_outputs = matrix.size(0);
  const double* dense = static_cast<const double*>(matrix.const_data_ptr());
  std::vector<int64_t> offsets = {0};
  std::vector<int32_t> outputs;
  std::vector<double> values;
  for (int64_t k = 0; k < input.rows.dim; ++k) {
    for (int64_t j = 0; j < num_outputs; ++j) {
      const double value = dense[j * input.rows.dim + k];
      if (value == 0) continue;
      outputs.push_back(static_cast<int32_t>(j));
      values.push_back(value);
    }
    offsets.push_back(static_cast<int64_t>(values.size()));
  }
  const ProjectionMatrix sparse = {input.rows.dim, num_outputs, offsets.data(), outputs.data(), values.data()};
  const Parallel parallel = torch_threads(input.rows.count * offsets.back());
  const Workspace memory(random_projection_workspace_bytes(input.rows, sparse, parallel));
  Tensor projected = empty({input.rows.count, num_outputs}, ScalarType::Float);
  const Status status = random_projection_cpu(input.rows, sparse, parallel, memory.get(), static_cast<float*>(projected.mutable_data_ptr()));
  if (status != Status::kOk) explain_nonfinite(op, {{"features", &input.rows}});
  return projected;
}

void update_min_distances(const Tensor& features, const Tensor& centers, Tensor min_distances) {
  const char* op = "update_min_distances";
  const Feature input = features_of(features, op, "features");
  const Feature added = features_of(centers, op, "centers");
  check_same_dim(added.rows, "centers", input.rows, "features", op);
  check_vector(min_distances, ScalarType::Double, input.rows.count, op, "min_distances", "float64");
  const Parallel parallel = torch_threads(input.rows.count * input.rows.dim);
  const Workspace memory(coreset_workspace_bytes(input.rows, parallel));
  const Status status =
      update_min_distances_cpu(input.rows, added.rows, parallel, memory.get(), static_cast<double*>(min_distances.mutable_data_ptr()));
  if (status != Status::kOk) explain_nonfinite(op, {{"features", &input.rows}, {"centers", &added.rows}});
}

// A prefix that enlarged distances would make the filter drop pairs that matter. By Gershgorin no singular value exceeds 1 when no row of |A^T A|
// sums to more.
void check_contraction(const double* matrix, int64_t dim, int64_t outputs, const char* op) {
  constexpr int64_t kMostOutputs = 256;  // bounds the time of this check; 47 are in use
  if (outputs > kMostOutputs) fail(op, ": expected prefix to have at most ", kMostOutputs, " columns, got ", outputs, ".");
  for (int64_t a = 0; a < outputs; ++a) {
    double sum = 0;
    for (int64_t b = 0; b < outputs; ++b) {
      double product = 0;
      for (int64_t j = 0; j < dim; ++j) product += matrix[j * outputs + a] * matrix[j * outputs + b];
      sum += product < 0 ? -product : product;
    }
    if (!(sum <= 1))
      fail(op, ": expected prefix to be a contraction (each row of |A^T A| sums to at most 1), got a sum of ", sum, " in row ", a, ".");
  }
}

Tensor coreset_codes(const Tensor& features, const Tensor& center, const Tensor& prefix) {
  const char* op = "coreset_codes";
  const Feature input = features_of(features, op, "features");
  const int64_t dim = input.rows.dim;
  check_coded_features(input.rows, op);
  check_vector(center, ScalarType::Double, dim, op, "center", "float64");
  if (!prefix.is_cpu() || prefix.scalar_type() != ScalarType::Double || prefix.dim() != 2 || prefix.size(0) != dim || prefix.size(1) >= dim) {
    fail(op, ": expected prefix to be a float64 CPU tensor of shape [", dim, ", fewer than ", dim, "], got shape ", shape_of(prefix), ".");
  }
  const int64_t outputs = prefix.size(1), columns = (outputs + 7) / 8 * 8;
  std::vector<double> matrix(static_cast<size_t>(dim * columns));
  const Tensor dense = torch::stable::contiguous(prefix);
  const double* values = static_cast<const double*>(dense.const_data_ptr());
  for (int64_t j = 0; j < dim; ++j) {
    for (int64_t o = 0; o < outputs; ++o) matrix[static_cast<size_t>(j * columns + o)] = values[j * outputs + o];
  }
  check_contraction(values, dim, outputs, op);
  const CoresetRotation rotation = {static_cast<const double*>(center.const_data_ptr()), outputs, columns, matrix.data()};
  const Parallel parallel = torch_threads(input.rows.count * dim * (columns + 1));
  if (first_nonfinite_row_cpu(input.rows, parallel) >= 0) explain_nonfinite(op, {{"features", &input.rows}});
  const int64_t bytes = coreset_codes_bytes(input.rows, rotation);
  Tensor codes = empty({bytes}, ScalarType::Byte);
  std::memset(codes.mutable_data_ptr(), 0, static_cast<size_t>(bytes));  // the padding between the arrays: same features, same bytes
  const Workspace memory(coreset_codes_workspace_bytes(input.rows, rotation, parallel));
  pack_coreset_codes_cpu(input.rows, rotation, parallel, memory.get(), codes.mutable_data_ptr());
  return codes;
}

void check_codes(const Tensor& codes, const Rows& rows, const char* op) {
  if (codes.dim() != 1) fail(op, ": expected codes to come from coreset_codes, got shape ", shape_of(codes), ".");
  check_vector(codes, ScalarType::Byte, codes.size(0), op, "codes", "uint8");
  if (reinterpret_cast<uintptr_t>(codes.const_data_ptr()) % 64 != 0)
    fail(op, ": expected codes to be aligned to 64 bytes; pass what coreset_codes gave.");
  if (!coreset_codes_fit(rows, codes.const_data_ptr(), codes.size(0))) {
    fail(op, ": expected codes to come from coreset_codes of the same features, got ", codes.size(0), " bytes of others.");
  }
}

void add_picks(const Tensor& features, const Tensor& picks, Tensor min_distances, const Tensor& codes) {
  const char* op = "add_picks";
  const Feature input = features_of(features, op, "features");
  check_vector(min_distances, ScalarType::Double, input.rows.count, op, "min_distances", "float64");
  if (picks.dim() != 1) fail(op, ": expected picks to be of shape [count], got ", shape_of(picks), ".");
  check_vector(picks, ScalarType::Long, picks.size(0), op, "picks", "int64");
  const int64_t* rows = static_cast<const int64_t*>(picks.const_data_ptr());
  check_picks(rows, picks.size(0), input.rows, op);
  check_codes(codes, input.rows, op);
  const Parallel parallel = torch_threads(input.rows.count * input.rows.dim);
  const Workspace memory(batched_coreset_workspace_bytes(input.rows, codes.const_data_ptr(), parallel));
  batched_add_picks_cpu(input.rows, codes.const_data_ptr(), rows, picks.size(0), parallel, memory.get(),
                        static_cast<double*>(min_distances.mutable_data_ptr()), nullptr);
}

// Checks the state of a selection, and that so many rows are left to be picked.
double* checked_state(Tensor& min_distances, const Rows& rows, int64_t count, const char* op) {
  check_vector(min_distances, ScalarType::Double, rows.count, op, "min_distances", "float64");
  double* state = static_cast<double*>(min_distances.mutable_data_ptr());
  int64_t open = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    if (!(state[i] >= 0 || state[i] == kPicked)) {  // NaN too: it has no place in the order of picks
      fail(op, ": expected min_distances to hold squared distances, or -1 for picks, got ", state[i], " in row ", i, ".");
    }
    open += state[i] != kPicked;
  }
  if (count < 0 || count > open) fail(op, ": expected count to lie in [0, ", open, "], the rows not yet picked, got ", count, ".");
  return state;
}

// Picks by the batched algorithm.
std::tuple<Tensor, Tensor> batched_picks(const Rows& rows, const Tensor& codes, double* state, const CoresetBehind* behind, int64_t count,
                                         const char* op) {
  check_codes(codes, rows, op);
  Tensor indices = empty({count}, ScalarType::Long), squared_distances = empty({count}, ScalarType::Double);
  const Parallel parallel = torch_threads(rows.count * rows.dim);
  const Workspace memory(batched_coreset_workspace_bytes(rows, codes.const_data_ptr(), parallel));
  batched_greedy_coreset_cpu(rows, codes.const_data_ptr(), count, {}, parallel, memory.get(), state, behind,
                             static_cast<int64_t*>(indices.mutable_data_ptr()), static_cast<double*>(squared_distances.mutable_data_ptr()), nullptr);
  return {indices, squared_distances};
}

std::tuple<Tensor, Tensor> greedy_coreset(const Tensor& features, Tensor min_distances, int64_t count, std::optional<Tensor> codes) {
  const char* op = "greedy_coreset";
  const Feature input = features_of(features, op, "features");
  double* state = checked_state(min_distances, input.rows, count, op);
  if (codes.has_value()) return batched_picks(input.rows, *codes, state, nullptr, count, op);
  Tensor indices = empty({count}, ScalarType::Long), squared_distances = empty({count}, ScalarType::Double);
  const Parallel parallel = torch_threads(input.rows.count * input.rows.dim);
  const Workspace memory(coreset_workspace_bytes(input.rows, parallel));
  const Status status = greedy_coreset_cpu(input.rows, count, parallel, memory.get(), state, static_cast<int64_t*>(indices.mutable_data_ptr()),
                                           static_cast<double*>(squared_distances.mutable_data_ptr()));
  if (status != Status::kOk) explain_nonfinite(op, {{"features", &input.rows}});
  return {indices, squared_distances};
}

std::tuple<Tensor, Tensor> greedy_coreset_lazily(const Tensor& features, Tensor min_distances, Tensor lowered, const Tensor& picks, int64_t count,
                                                 const Tensor& codes) {
  const char* op = "greedy_coreset_lazily";
  const Feature input = features_of(features, op, "features");
  double* state = checked_state(min_distances, input.rows, count, op);
  check_vector(lowered, ScalarType::Int, input.rows.count, op, "lowered", "int32");
  if (picks.dim() != 1) fail(op, ": expected picks to be of shape [count], got ", shape_of(picks), ".");
  check_vector(picks, ScalarType::Long, picks.size(0), op, "picks", "int64");
  const int64_t* known = static_cast<const int64_t*>(picks.const_data_ptr());
  check_picks(known, picks.size(0), input.rows, op);
  if (picks.size(0) + count > input.rows.count)
    fail(op, ": expected picks to be at most ", input.rows.count - count, " rows, got ", picks.size(0), ".");
  int32_t* lowered_by = static_cast<int32_t*>(lowered.mutable_data_ptr());
  for (int64_t i = 0; i < input.rows.count; ++i) {
    if (lowered_by[i] < kUpToDate || lowered_by[i] > picks.size(0))
      fail(op, ": expected lowered to lie in [-1, ", picks.size(0), "], got ", lowered_by[i], " in row ", i, ".");
  }
  const CoresetBehind behind = {known, picks.size(0), lowered_by};
  return batched_picks(input.rows, codes, state, &behind, count, op);
}

Tensor prepare_bank(const Tensor& bank, const Tensor& center, const Tensor& matrix, int64_t short_outputs, const Tensor& order) {
  const char* op = "prepare_bank";
  const Feature known = features_of(bank, op, "bank");
  const int64_t dim = known.rows.dim;
  check_prepared_size(known.rows, op);
  check_vector(center, ScalarType::Double, dim, op, "center", "float64");
  check_matrix_on(kDevice, matrix, ScalarType::Short, dim, op, "int16", "outputs");
  check_vector(order, ScalarType::Int, known.rows.count, op, "order", "int32");
  check_permutation(static_cast<const int32_t*>(order.const_data_ptr()), known.rows.count, op, "order");
  const int64_t outputs = matrix.size(0);
  if (short_outputs < 0 || short_outputs > outputs || (outputs > 0) != (short_outputs > 0) || outputs == 1 || outputs >= 2 * dim)
    fail(op, ": expected short_outputs to lie in [1, ", outputs, "), the rows of matrix, or both to be 0, got ", short_outputs, ".");
  const BankRotation rotation = {static_cast<const double*>(center.const_data_ptr()), short_outputs, outputs - short_outputs,
                                 static_cast<const int16_t*>(matrix.const_data_ptr()), static_cast<const int32_t*>(order.const_data_ptr())};
  if (!is_contraction(rotation, dim))
    fail(op, ": expected matrix / 2^14 to be a contraction (each row of |A A^T| sums to at most 1), got a larger sum.");
  const Parallel parallel = torch_threads(known.rows.count * dim * (outputs + 1));
  if (first_nonfinite_row_cpu(known.rows, parallel) >= 0) explain_nonfinite(op, {{"bank", &known.rows}});
  const int64_t bytes = prepared_bank_bytes(known.rows, rotation);
  Tensor prepared = empty({bytes}, ScalarType::Byte);
  std::memset(prepared.mutable_data_ptr(), 0, static_cast<size_t>(bytes));  // the padding between the arrays: same bank, same bytes
  const Workspace memory(prepare_bank_workspace_bytes(known.rows, rotation, parallel));
  prepare_bank_cpu(known.rows, rotation, parallel, memory.get(), prepared.mutable_data_ptr());
  return prepared;
}

struct Prepared {
  std::optional<Tensor> keep_alive;  // holds the memory that `memory` points to
  const void* memory;                // null where there is none
};

// A prepared bank. It is copied where it does not lie at a multiple of 64 bytes: the constants of an AOTInductor package lie anywhere.
Prepared prepared_of(const std::optional<Tensor>& prepared, const Rows& bank, const char* op) {
  if (!prepared.has_value()) return {std::nullopt, nullptr};
  if (prepared->dim() != 1) fail(op, ": expected prepared to come from prepare_bank, got shape ", shape_of(*prepared), ".");
  const int64_t bytes = prepared->size(0);
  check_vector(*prepared, ScalarType::Byte, bytes, op, "prepared", "uint8");
  Tensor usable = *prepared;
  if (reinterpret_cast<uintptr_t>(usable.const_data_ptr()) % 64 != 0) {
    usable = empty({bytes}, ScalarType::Byte);
    std::memcpy(usable.mutable_data_ptr(), prepared->const_data_ptr(), static_cast<size_t>(bytes));
  }
  const void* memory = usable.const_data_ptr();
  if (!prepared_bank_fits(bank, memory, bytes))
    fail(op, ": expected prepared to come from prepare_bank of the same bank on such a processor, got ", bytes, " bytes of another.");
  return {usable, memory};
}

// The k nearest rows, by the prepared bank `codes` or, where that is null, by all distances.
void find_neighbors(const Rows& queries, const Rows& bank, const void* codes, int64_t k, const char* op, double* squared_distances,
                    int64_t* indices) {
  const Parallel parallel = torch_threads(queries.count * bank.count * bank.dim);
  Status status = Status::kOk;
  if (codes != nullptr) {
    const Workspace memory(filtered_neighbors_workspace_bytes(queries, bank, codes, k, parallel));
    status = filtered_neighbors_cpu(queries, bank, codes, k, {}, parallel, memory.get(), squared_distances, indices, nullptr);
  } else {
    const Workspace memory(nearest_neighbors_workspace_bytes(queries, bank, k, parallel));
    status = nearest_neighbors_cpu(queries, bank, k, parallel, memory.get(), squared_distances, indices);
  }
  if (status != Status::kOk) explain_nonfinite(op, {{"queries", &queries}, {"bank", &bank}});
}

// Eq. (7) of each image [batch], from the nearest row of each of its patches.
Tensor weigh_images(const double* squared_distances, const int64_t* nearest, const Rows& queries, const Rows& bank, const void* codes, int64_t batch,
                    int64_t num_neighbors, const char* op) {
  const Parallel parallel = torch_threads(batch * bank.count * bank.dim);
  const Workspace memory(image_scores_workspace_bytes(queries, bank, codes, num_neighbors, parallel));
  Tensor scores = empty({batch}, ScalarType::Float);
  const Status status = image_scores_cpu(squared_distances, nearest, queries, bank, codes, batch, batch == 0 ? 0 : queries.count / batch,
                                         num_neighbors, parallel, memory.get(), static_cast<float*>(scores.mutable_data_ptr()));
  if (status != Status::kOk) explain_nonfinite(op, {{"queries", &queries}, {"bank", &bank}});
  return scores;
}

std::tuple<Tensor, Tensor> nearest_neighbors(const Tensor& queries, const Tensor& bank, int64_t k, std::optional<Tensor> prepared) {
  const char* op = "nearest_neighbors";
  const Feature asked = features_of(queries, op, "queries");
  const Feature known = features_of(bank, op, "bank");
  check_same_dim(asked.rows, "queries", known.rows, "bank", op);
  check_k(k, known.rows, op);
  const Prepared copies = prepared_of(prepared, known.rows, op);
  Tensor squared_distances = empty({asked.rows.count, k}, ScalarType::Double);
  Tensor indices = empty({asked.rows.count, k}, ScalarType::Long);
  find_neighbors(asked.rows, known.rows, copies.memory, k, op, static_cast<double*>(squared_distances.mutable_data_ptr()),
                 static_cast<int64_t*>(indices.mutable_data_ptr()));
  return {squared_distances, indices};
}

Tensor image_scores(const Tensor& squared_distances, const Tensor& nearest_indices, const Tensor& queries, const Tensor& bank, int64_t num_neighbors,
                    std::optional<Tensor> prepared) {
  const char* op = "image_scores";
  check_nearest_on(kDevice, squared_distances, nearest_indices, op);
  const int64_t batch = squared_distances.size(0), num_patches = squared_distances.size(1);
  const Feature asked = features_of(queries, op, "queries");
  const Feature known = features_of(bank, op, "bank");
  check_scored(asked.rows, known.rows, batch * num_patches, num_neighbors, op);
  const int64_t* nearest = static_cast<const int64_t*>(nearest_indices.const_data_ptr());
  for (int64_t i = 0; i < batch * num_patches; ++i) {
    if (nearest[i] < 0 || nearest[i] >= known.rows.count) {
      fail(op, ": expected nearest_indices to lie in [0, ", known.rows.count, "), the rows of the bank, got ", nearest[i], ".");
    }
  }
  const Prepared copies = prepared_of(prepared, known.rows, op);
  return weigh_images(static_cast<const double*>(squared_distances.const_data_ptr()), nearest, asked.rows, known.rows, copies.memory, batch,
                      num_neighbors, op);
}

// nearest_neighbors with k = 1, square_root, rounding to float32 and image_scores in one call: behind a network, which leaves the caches to none of
// them, every call into Python costs as much as a few percent of a short search.
std::tuple<Tensor, Tensor, Tensor> score_patches(const Tensor& queries, const Tensor& bank, int64_t num_patches, int64_t num_neighbors,
                                                 std::optional<Tensor> prepared) {
  const char* op = "score_patches";
  const Feature asked = features_of(queries, op, "queries");
  const Feature known = features_of(bank, op, "bank");
  check_same_dim(asked.rows, "queries", known.rows, "bank", op);
  check_k(1, known.rows, op);
  const int64_t count = asked.rows.count;
  if (num_patches < 1 || count % num_patches != 0) fail(op, ": expected queries to have a multiple of ", num_patches, " >= 1 rows, got ", count, ".");
  const int64_t batch = count / num_patches;
  check_scored(asked.rows, known.rows, count, num_neighbors, op);
  const Prepared copies = prepared_of(prepared, known.rows, op);
  Tensor squared_distances = empty({count}, ScalarType::Double);
  Tensor nearest = empty({batch, num_patches}, ScalarType::Long);
  Tensor distances = empty({batch, num_patches}, ScalarType::Float);
  double* values = static_cast<double*>(squared_distances.mutable_data_ptr());
  int64_t* rows = static_cast<int64_t*>(nearest.mutable_data_ptr());
  find_neighbors(asked.rows, known.rows, copies.memory, 1, op, values, rows);
  Tensor scores = weigh_images(values, rows, asked.rows, known.rows, copies.memory, batch, num_neighbors, op);
  square_root_cpu(values, count, torch_threads(count), values);
  float* out = static_cast<float*>(distances.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(values[i]);
  return {scores, distances, nearest};
}

}  // namespace patchcore::bindings

STABLE_TORCH_LIBRARY_IMPL(patchcore_ext, CPU, library) {
  library.impl("first_nonfinite_row", TORCH_BOX(&patchcore::bindings::first_nonfinite_row));
  library.impl("square_root", TORCH_BOX(&patchcore::bindings::square_root));
  library.impl("random_projection", TORCH_BOX(&patchcore::bindings::random_projection));
  library.impl("update_min_distances", TORCH_BOX(&patchcore::bindings::update_min_distances));
  library.impl("coreset_codes", TORCH_BOX(&patchcore::bindings::coreset_codes));
  library.impl("add_picks", TORCH_BOX(&patchcore::bindings::add_picks));
  library.impl("greedy_coreset", TORCH_BOX(&patchcore::bindings::greedy_coreset));
  library.impl("greedy_coreset_lazily", TORCH_BOX(&patchcore::bindings::greedy_coreset_lazily));
  library.impl("prepare_bank", TORCH_BOX(&patchcore::bindings::prepare_bank));
  library.impl("nearest_neighbors", TORCH_BOX(&patchcore::bindings::nearest_neighbors));
  library.impl("image_scores", TORCH_BOX(&patchcore::bindings::image_scores));
  library.impl("score_patches", TORCH_BOX(&patchcore::bindings::score_patches));
}
