#include "search/cpu/row_reader.h"

#include <algorithm>

namespace tgq {

void RowReader::read_row(std::int64_t row, float* to) const {
  const std::int64_t cols = matrix_.cols;
  if (matrix_.dtype == DType::f32) {
    const float* from = static_cast<const float*>(matrix_.data) + row * matrix_.row_stride;
    for (std::int64_t d = 0; d < cols; ++d) to[d] = from[d * matrix_.col_stride];
  } else {
    const auto convert = matrix_.dtype == DType::f16 ? kernels_.half_to_float : kernels_.bfloat_to_float;
    if (matrix_.col_stride == 1) {
      convert(halves(row), cols, to);
    } else {
      for (std::int64_t d = 0; d < cols; ++d) convert(halves(row) + d * matrix_.col_stride, 1, to + d);
    }
  }
  std::fill(to + cols, to + width_, 0.0f);
}

const float* RowReader::read(std::int64_t first, std::int64_t count, float* scratch, std::int64_t* stride) const {
  if (in_place_) {
    *stride = matrix_.row_stride;
    return static_cast<const float*>(matrix_.data) + first * matrix_.row_stride;
  }
  for (std::int64_t i = 0; i < count; ++i) read_row(first + i, scratch + i * width_);
  *stride = width_;
  return scratch;
}

Ahead RowReader::memory(std::int64_t first, std::int64_t count) const {
  if (matrix_.col_stride != 1) return {};
  const std::int64_t size = matrix_.dtype == DType::f32 ? 4 : 2;
  return {static_cast<const char*>(matrix_.data) + first * matrix_.row_stride * size, matrix_.row_stride * size,
          matrix_.cols * size, count};
}

}  // namespace tgq
