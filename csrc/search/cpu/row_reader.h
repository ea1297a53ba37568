// Pool rows as fp32.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "search/cpu/kernels.h"

namespace tgq {

// Hands out rows of a strided matrix as fp32, padded with zeros to the kernels' width; in place where the memory allows.
class RowReader {
 public:
  RowReader(const Matrix& matrix, const Kernels& kernels, std::int64_t width)
      : matrix_(matrix), kernels_(kernels), width_(width),
        in_place_(matrix.dtype == DType::f32 && matrix.col_stride == 1 && matrix.cols == width && width > 0) {}

  // Rows [first, first + count): a pointer to the first and the distance between two. `scratch` holds count * width.
  const float* read(std::int64_t first, std::int64_t count, float* scratch, std::int64_t* stride) const;
  void read_row(std::int64_t row, float* to) const;
  bool in_place() const { return in_place_; }
  // The memory of rows [first, first + count) as it is stored; nothing where a row is not one piece.
  Ahead memory(std::int64_t first, std::int64_t count) const;
  const std::uint16_t* halves(std::int64_t row) const {
    return static_cast<const std::uint16_t*>(matrix_.data) + row * matrix_.row_stride;
  }

 private:
  Matrix matrix_;
  const Kernels& kernels_;
  std::int64_t width_;
  bool in_place_;
};

}  // namespace tgq
