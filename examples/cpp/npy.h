// Reads what numpy.save writes of a float32 matrix: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Matrix {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<float> values;  // [rows, columns]
};

inline Matrix read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  unsigned char start[8] = {};
  file.read(reinterpret_cast<char*>(start), sizeof start);
  if (!file || std::memcmp(start, "\x93NUMPY", 6) != 0) throw std::runtime_error(path + ": is no .npy file");
  // Little-endian length of the header: two bytes in version 1, four later.
  uint32_t length = 0;
  for (int i = 0; i < (start[6] == 1 ? 2 : 4); ++i) length |= static_cast<uint32_t>(file.get() & 0xff) << (8 * i);
  if (!file || length > 1 << 16) throw std::runtime_error(path + ": its header is damaged");
  std::string header(length, ' ');
  file.read(header.data(), length);
  if (header.find("'<f4'") == std::string::npos || header.find("'fortran_order': False") == std::string::npos)
    throw std::runtime_error(path + ": expected a float32 matrix in C order; save numpy.ascontiguousarray(x, numpy.float32)");
  Matrix matrix;
  const size_t shape = header.find("'shape': (");
  long long rows = 0, columns = 0;
  char end = 0;
  if (shape == std::string::npos || std::sscanf(header.c_str() + shape, "'shape': (%lld, %lld%c", &rows, &columns, &end) != 3 || end != ')')
    throw std::runtime_error(path + ": expected two dimensions, [rows, dim]");
  matrix.rows = rows;
  matrix.columns = columns;
  matrix.values.resize(static_cast<size_t>(rows * columns));
  file.read(reinterpret_cast<char*>(matrix.values.data()), static_cast<std::streamsize>(matrix.values.size() * sizeof(float)));
  if (!file) throw std::runtime_error(path + ": is cut off");
  return matrix;
}
