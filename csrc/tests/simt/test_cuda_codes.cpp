// What the filters of the CUDA kernels stand on, run on the CPU: the codes of rows, their bounds and scales, and the integer product, against long
// double and int64 arithmetic written from filter.h.
#include "cuda/codes.cuh"

#include <memory>
#include <numeric>

#include "device.h"

using namespace patchcore;
using namespace patchcore::cuda;

namespace {

constexpr int64_t kSum = kSeedOutputs + kPrefixOutputs;

using Reals = std::vector<long double>;

// Rows encoded, with everything that the encoding writes.
struct Encoded {
  Encoded(const Rows& rows_, const std::vector<int16_t>& matrix_) : rows(rows_), matrix(matrix_), center(data::widened(rows_, 0)) {
    Pieces sizes(nullptr);
    place(&sizes);
    memory = std::make_unique<device::Block>(sizes.used());
    Pieces pieces(memory->data());
    place(&pieces);
    int32_t flags = 0;
    CHECK(split_matrix(matrix.data(), rows.dim, planes, &flags, nullptr) == cudaSuccess);
    const Encoding encoding = {center.data(), scales, planes};
    CHECK(choose_scales(rows, encoding, steps, full, sample, scales, &flags, nullptr) == cudaSuccess);
    CHECK(encode_rows(rows, nullptr, rows.count, encoding, steps, full, seed, prefix, &flags, nullptr) == cudaSuccess);
    CHECK_EQ(flags, 0);
  }

  void place(Pieces* pieces) {
    scales = pieces->take<Scales>(1);
    sample = pieces->take<double>(kSampleRows);
    planes = pieces->take<int8_t>(kProductColumns * 2 * full_depth(rows.dim));
    steps = step_rows_at(rows.count, rows.dim, pieces);
    full = code_rows_at(rows.count, full_depth(rows.dim), pieces);
    seed = code_rows_at(rows.count, kSeedDepth, pieces);
    prefix = code_rows_at(rows.count, kPrefixDepth, pieces);
  }

  int64_t step(int64_t row, int64_t j) const {
    const int8_t* at = steps.planes + row * 2 * full.depth;
    return int64_t{at[j]} * 128 + at[full.depth + j];
  }

  Rows rows;
  std::vector<int16_t> matrix;
  std::vector<double> center;
  std::unique_ptr<device::Block> memory;
  Scales* scales = nullptr;
  double* sample = nullptr;
  int8_t* planes = nullptr;
  StepRows steps;
  CodeRows full, seed, prefix;
};

// Random rows, shrunk until those of either prefix are a contraction by Gershgorin (knn.h).
std::vector<int16_t> random_contraction(int64_t dim) {
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  std::vector<double> wanted(static_cast<size_t>(kSum * dim));
  for (double& entry : wanted) entry = normal(random);
  double most = 0;
  for (int64_t a = 0; a < kSum; ++a) {
    double sum = 0;
    for (int64_t b = a < kSeedOutputs ? 0 : kSeedOutputs; b < (a < kSeedOutputs ? kSeedOutputs : kSum); ++b)
      sum += std::abs(std::inner_product(wanted.begin() + a * dim, wanted.begin() + (a + 1) * dim, wanted.begin() + b * dim, 0.0));
    most = std::max(most, sum);
  }
  std::vector<int16_t> matrix;
  for (const double entry : wanted) matrix.push_back(static_cast<int16_t>(0.97 * 16384 / std::sqrt(most) * entry));  // towards 0
  return matrix;
}

long double clipped(long double value, long double most) { return std::max(-most, std::min(most, value)); }

// ||clip(f) - codes||
long double true_error(const Reals& f, const int8_t* codes) {
  long double squares = 0;
  for (size_t k = 0; k < f.size(); ++k) {
    const long double error = clipped(f[k], 127) - codes[k];
    squares += error * error;
  }
  return std::sqrt(squares);
}

// f of outputs [begin, begin + count) of the contraction and the norm of the rest, of a row that is not rounded to steps.
Reals view_of(const Encoded& encoded, const Reals& y, int64_t begin, int64_t count, const ViewScale& view) {
  Reals f;
  long double rest = 0;
  for (const long double value : y) rest += value * value;
  for (int64_t o = begin; o < begin + count; ++o) {
    long double sum = 0;
    for (size_t j = 0; j < y.size(); ++j) sum += y[j] * encoded.matrix[static_cast<size_t>(o) * y.size() + j];
    sum /= 16384;
    rest -= sum * sum;
    f.push_back(view.scale * sum);
  }
  f.push_back(view.scale * (std::sqrt(std::max(0.0l, rest)) - view.shift));
  return f;
}

void check_rows(const std::string& name, const CodeRows& rows, int64_t count) {
  std::vector<float> most(static_cast<size_t>(padded_rows(count) / 128), 0.0f);
  int64_t wrong = 0;
  for (int64_t row = 0; row < padded_rows(count); ++row) {
    int32_t norm = 0;
    for (int64_t j = 0; j < rows.depth; ++j) norm += rows.codes[row * rows.depth + j] * rows.codes[row * rows.depth + j];
    const int32_t start = row < count ? -(norm / 2) : INT32_MIN;
    wrong += rows.norms[row] != norm || (row >= count && (norm != 0 || rows.residuals[row] != 0));
    for (const int64_t at : {row % 2, row % 2 + 2}) wrong += rows.starts[row / 2 * 4 + at] != start;
    most[static_cast<size_t>(row / 128)] = std::max(most[static_cast<size_t>(row / 128)], rows.residuals[row]);
  }
  for (size_t tile = 0; tile < most.size(); ++tile) wrong += rows.tile_residuals[tile] != most[tile];
  if (wrong != 0) std::cerr << name << "\n";
  CHECK_EQ(wrong, 0);
}

void check_products(const Encoded& encoded) {
  int64_t wrong = 0;
  for (int64_t row = 0; row < encoded.rows.count; ++row) {
    for (int64_t o = 0; o < kSum; ++o) {
      int64_t sum = 0;
      for (int64_t j = 0; j < encoded.rows.dim; ++j) sum += encoded.step(row, j) * encoded.matrix[static_cast<size_t>(o * encoded.rows.dim + j)];
      wrong += sum != encoded.steps.products[row * kProductColumns + o];
    }
  }
  CHECK_EQ(wrong, 0);
}

// The value of rank floor((count - 1) share).
double percentile_of(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(static_cast<double>(values.size() - 1) * share)];
}

}  // namespace

TEST(residuals_cover_the_true_errors_of_all_views) {
  for (const int64_t dim : {5, 65, 200}) {
    const std::vector<int16_t> matrix = random_contraction(dim);
    for (data::Set& set : data::sets(dim == 65 ? 140 : 40, dim)) {
      device::next_order();
      const Encoded encoded(data::rows_of(set), matrix);
      const Scales& scales = *encoded.scales;
      const long double most = std::min(largest_step(dim), kLargestPlaneValue);
      int64_t wrong = 0;
      for (int64_t row = 0; row < encoded.rows.count; ++row) {
        const std::vector<double> x = data::widened(encoded.rows, row);
        Reals f, y;
        long double step_squares = 0;
        for (int64_t j = 0; j < dim; ++j) {
          const long double difference = static_cast<long double>(x[static_cast<size_t>(j)]) - encoded.center[static_cast<size_t>(j)];
          f.push_back(scales.full.scale * difference);
          y.push_back(clipped(scales.step_scale * difference, most));
          step_squares += (y.back() - encoded.step(row, j)) * (y.back() - encoded.step(row, j));
        }
        wrong += !(true_error(f, encoded.full.codes + row * encoded.full.depth) <= encoded.full.residuals[row]);
        wrong += !(std::sqrt(step_squares) <= encoded.steps.errors[row]);
        wrong +=
            !(true_error(view_of(encoded, y, 0, kSeedOutputs, scales.seed), encoded.seed.codes + row * kSeedDepth) <= encoded.seed.residuals[row]);
        wrong += !(true_error(view_of(encoded, y, kSeedOutputs, kPrefixOutputs, scales.prefix), encoded.prefix.codes + row * kPrefixDepth) <=
                   encoded.prefix.residuals[row]);
        // rounding to nearest codes is all that a bound should hold, but for clipped rows
        wrong += encoded.steps.errors[row] > 0.5001 * std::sqrt(static_cast<double>(dim)) + 1e-9;
      }
      if (wrong != 0) std::cerr << set.name << " dim " << dim << ": " << wrong << " bounds\n";
      CHECK_EQ(wrong, 0);
      CHECK(scales.prefix.per_unit >= static_cast<long double>(scales.prefix.scale) * scales.step_scale);
      check_rows(set.name + " full", encoded.full, encoded.rows.count);
      check_rows(set.name + " seed", encoded.seed, encoded.rows.count);
      check_rows(set.name + " prefix", encoded.prefix, encoded.rows.count);
      if (dim == 65) check_products(encoded);
    }
  }
}

TEST(scales_are_percentiles_of_magnitudes) {
  for (data::Set& set : data::sets(67, 70)) {
    device::next_order();
    const Encoded encoded(data::rows_of(set), random_contraction(70));
    std::vector<double> magnitudes;
    for (int64_t row = 0; row < encoded.rows.count; ++row) {
      const std::vector<double> x = data::widened(encoded.rows, row);
      double most = 0;
      for (size_t j = 0; j < x.size(); ++j) most = std::max(most, std::abs(x[j] - encoded.center[j]));
      magnitudes.push_back(most);
    }
    const double magnitude = percentile_of(magnitudes, 0.8), largest = percentile_of(magnitudes, 0.999);
    CHECK_EQ(encoded.scales->full.scale, int8_scale(magnitude));
    CHECK_EQ(encoded.scales->step_scale, largest > 0 ? std::min(largest_step(70), kLargestPlaneValue) / largest : 1.0);
    if (set.name != "gaussian") continue;
    double sum = 0;
    for (int64_t row = 0; row < encoded.rows.count; ++row) {
      double rest = 0;
      for (int64_t j = 0; j < 70; ++j) rest += static_cast<double>(encoded.step(row, j) * encoded.step(row, j));
      for (int64_t o = 0; o < kSeedOutputs; ++o) rest -= std::pow(encoded.steps.products[row * kProductColumns + o] / 16384.0, 2);
      sum += std::sqrt(rest);
    }
    CHECK(std::abs(encoded.scales->seed.shift - sum / 67) < 1e-9 * sum);
  }
}

TEST(the_largest_product_fits) {
  // One output takes all coordinates alike, and every step is the largest: 256 times 1024 times largest_step(256) is just below 2^31.
  data::Set set = data::fill(data::make("ones", 3, 256), [](int64_t r, int64_t) { return r == 0 ? 0.0 : r == 1 ? 1.0 : -1.0; });
  std::vector<int16_t> matrix(static_cast<size_t>(kSum * 256));
  for (const int64_t o : {0, kSeedOutputs}) std::fill_n(matrix.begin() + o * 256, 256, static_cast<int16_t>(1024));
  const Encoded encoded(data::rows_of(set), matrix);
  check_products(encoded);
  CHECK(encoded.steps.products[kProductColumns] > 2140000000);
}

TEST_MAIN()
