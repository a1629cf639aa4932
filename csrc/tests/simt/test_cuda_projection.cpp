// The CUDA kernels that go through features value by value, against the CPU's.
#include "checks.h"
#include "device.h"
#include "projection.h"
#include "square_root.h"

using namespace patchcore;

TEST(projections_have_the_bits_of_the_cpu) {
  std::mt19937_64 random(1);
  uint64_t order = 0;
  for (const int64_t dim : {1, 31, 200, 1500}) {
    for (const int64_t num_outputs : {1, 40, 300}) {
      device::Vector<double> matrix(static_cast<size_t>(num_outputs * dim));
      for (double& value : matrix) value = random() % 3 == 0 ? static_cast<double>(random() % 1000) / 300 - 1.5 : 0.0;
      device::Vector<int64_t> offsets = {0};
      device::Vector<int32_t> outputs;
      device::Vector<double> values;
      for (int64_t k = 0; k < dim; ++k) {
        for (int64_t j = 0; j < num_outputs; ++j) {
          const double value = matrix[static_cast<size_t>(j * dim + k)];
          if (value == 0) continue;
          outputs.push_back(static_cast<int32_t>(j));
          values.push_back(value);
        }
        offsets.push_back(static_cast<int64_t>(values.size()));
      }
      const ProjectionMatrix sparse = {dim, num_outputs, offsets.data(), outputs.data(), values.data()};
      for (data::Set& set : data::sets(5, dim)) {
        const Rows& rows = data::rows_of(set);
        device::Vector<float> expected(static_cast<size_t>(5 * num_outputs)), found(static_cast<size_t>(5 * num_outputs), -7);
        device::Vector<double> workspace(static_cast<size_t>(random_projection_workspace_bytes(rows, sparse, serial())) / 8 + 1);
        CHECK(random_projection_cpu(rows, sparse, serial(), workspace.data(), expected.data()) == Status::kOk);
        device::set_order(order++ % 3);
        device::Block memory(cuda::random_projection_workspace_bytes(dim, num_outputs));
        device::Value<int32_t> flags;
        CHECK(device::finished(cuda::random_projection_cuda(rows, matrix.data(), num_outputs, memory.data(), found.data(), flags.get(), nullptr)));
        CHECK_EQ(*flags, 0);
        if (found != expected) std::cerr << set.name << " dim " << dim << " outputs " << num_outputs << "\n";
        CHECK(found == expected);
      }
    }
  }
}

TEST(projections_and_rows_that_are_not_finite_are_reported) {
  for (const bool large : {true, false}) {  // beyond float32, or not finite where all weights are 0
    data::Set set = data::fill(data::make("set", 4, 3), [&](int64_t, int64_t j) { return large ? 3e38 : j == 2 ? INFINITY : 1.0; });
    const device::Vector<double> matrix = {1, 0, 0, 1, 1, 0};
    device::Vector<float> projected(8);
    device::Block memory(cuda::random_projection_workspace_bytes(3, 2));
    device::Value<int32_t> flags;
    CHECK(
        device::finished(cuda::random_projection_cuda(data::rows_of(set), matrix.data(), 2, memory.data(), projected.data(), flags.get(), nullptr)));
    CHECK_EQ(*flags, cuda::kNonFinite);
  }
}

TEST(the_first_row_that_is_not_finite_is_found) {
  for (const ScalarType type : {ScalarType::kFloat32, ScalarType::kFloat16, ScalarType::kBFloat16}) {
    const bool single = type == ScalarType::kFloat32;
    for (const device::Vector<int64_t>& bad : {device::Vector<int64_t>{}, device::Vector<int64_t>{999}, device::Vector<int64_t>{700, 31, 32}}) {
      data::Set set = single ? data::fill(data::make("float32", 1000, 37, 2), [](int64_t r, int64_t j) { return static_cast<double>(r - j); })
                             : data::half_precision("half", type, 1000, 37, 4);
      for (const int64_t row : bad) {
        if (single)
          set.values[static_cast<size_t>(row * 39 + 36)] = std::numeric_limits<float>::quiet_NaN();
        else
          set.halves[static_cast<size_t>(row * 37 + 36)] = type == ScalarType::kFloat16 ? 0xfc00 : 0x7f80;  // infinities
      }
      device::Value<int64_t> found(-7);
      CHECK(device::finished(cuda::first_nonfinite_row_cuda(data::rows_of(set), found.get(), nullptr)));
      CHECK_EQ(*found, bad.empty() ? -1 : *std::min_element(bad.begin(), bad.end()));
    }
  }
}

TEST(roots_are_those_of_the_cpu) {
  std::mt19937_64 random(2);
  device::Vector<double> values(1000), expected(1000), found(1000);
  for (double& value : values) value = std::ldexp(static_cast<double>(random()), static_cast<int>(random() % 400) - 264);
  square_root_cpu(values.data(), 1000, serial(), expected.data());
  CHECK(device::finished(cuda::square_root_cuda(values.data(), 1000, found.data(), nullptr)));
  CHECK(found == expected);
}

TEST_MAIN()
