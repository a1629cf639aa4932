// Random projection (projection.h) against its definition.
#include "projection.h"

#include <utility>

#include "check.h"
#include "data.h"

using namespace patchcore;

namespace {

struct Matrix {
  std::vector<double> dense;  // [outputs, inputs]
  std::vector<int64_t> offsets;
  std::vector<int32_t> outputs;
  std::vector<double> values;
  ProjectionMatrix view;
};

Matrix random_matrix(int64_t num_inputs, int64_t num_outputs, double density) {
  std::mt19937_64 random(11);
  std::uniform_real_distribution<double> uniform(-1, 1);
  Matrix matrix;
  for (int64_t i = 0; i < num_inputs * num_outputs; ++i) {
    const double keep = uniform(random), value = uniform(random);
    matrix.dense.push_back(keep < 2 * density - 1 ? value : 0.0);
  }
  matrix.offsets.push_back(0);
  for (int64_t k = 0; k < num_inputs; ++k) {
    for (int64_t j = 0; j < num_outputs; ++j) {
      const double value = matrix.dense[static_cast<size_t>(j * num_inputs + k)];
      if (value == 0) continue;
      matrix.outputs.push_back(static_cast<int32_t>(j));
      matrix.values.push_back(value);
    }
    matrix.offsets.push_back(static_cast<int64_t>(matrix.values.size()));
  }
  matrix.view = {num_inputs, num_outputs, matrix.offsets.data(), matrix.outputs.data(), matrix.values.data()};
  return matrix;
}

Status project(const Rows& rows, const ProjectionMatrix& matrix, const Parallel& parallel, std::vector<float>* out) {
  std::vector<double> workspace(static_cast<size_t>(random_projection_workspace_bytes(rows, matrix, parallel)) / 8 + 1);
  out->resize(static_cast<size_t>(rows.count * matrix.num_outputs));
  return random_projection_cpu(rows, matrix, parallel, workspace.data(), out->data());
}

}  // namespace

TEST(projection_equals_its_definition_with_all_zeros_included) {
  for (const auto& [density, outputs] : {std::pair{0.05, 9}, std::pair{0.5, 9}, std::pair{1.0, 9}, std::pair{1.0, 56}}) {
    for (const int64_t dim : {1, 5, 40}) {
      const Matrix matrix = random_matrix(dim, outputs, density);
      for (data::Set& set : data::sets(20, dim)) {
        const Rows& rows = data::rows_of(set);
        std::vector<float> expected;
        for (int64_t i = 0; i < rows.count; ++i) {
          const std::vector<double> x = data::widened(rows, i);
          for (int64_t j = 0; j < outputs; ++j) {
            double sum = 0;
            for (int64_t k = 0; k < dim; ++k) {
              volatile double product = x[static_cast<size_t>(k)] * matrix.dense[static_cast<size_t>(j * dim + k)];
              sum += product;
            }
            expected.push_back(static_cast<float>(sum));
          }
        }
        for (const int64_t slots : {1, 3}) {
          std::vector<float> found;
          CHECK(project(rows, matrix.view, data::slots(slots), &found) == Status::kOk);
          CHECK(found == expected);
        }
      }
    }
  }
}

TEST(nonfinite_inputs_and_overflow_are_reported_even_where_the_matrix_is_zero) {
  Matrix matrix = random_matrix(4, 3, 0.0);
  std::vector<float> out;
  data::Set set = data::fill(data::make("rows", 10, 4), [](int64_t, int64_t) { return 1.0; });
  CHECK(project(data::rows_of(set), matrix.view, serial(), &out) == Status::kOk);
  set.values[4 * 9 + 2] = std::numeric_limits<float>::infinity();
  CHECK(project(data::rows_of(set), matrix.view, data::slots(2), &out) == Status::kNonFinite);
  matrix = random_matrix(4, 3, 1.0);
  data::Set large = data::fill(data::make("large", 2, 4), [](int64_t, int64_t) { return 3e38; });
  for (double& value : matrix.values) value = 2.0;
  CHECK(project(data::rows_of(large), matrix.view, serial(), &out) == Status::kNonFinite);
}

TEST_MAIN()
