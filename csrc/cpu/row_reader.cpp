// Rows as the kernels read them, and what the filters need beside them.
#include <algorithm>
#include <cstring>

#include "cpu/scan.h"

namespace tgq {

MarginConstants margin_constants(const Filter& filter, std::int64_t dimensions) {
  const auto relative = [](double roundings) { return roundings * 0x1p-24 / (1.0 - roundings * 0x1p-24) * 1.01; };
  MarginConstants c;
  // Sums of byte codes are exact: what rounds is their conversion and the two scales.
  c.filter_error = static_cast<float>(relative(filter.code_bytes == 1 ? 4.0 : 2.0 * dimensions + 64));
  c.exact_error = static_cast<float>(relative(dimensions / 16.0 + 8));
  c.absolute = static_cast<float>((8.0 * dimensions + 512) * 0x1p-126);
  return c;
}

void pack_panel(const std::uint8_t* codes, std::int64_t row_bytes, std::uint32_t* panel) {
  for (std::int64_t line = 0; line < row_bytes; line += kCodeLine)
    for (int half = 0; half < 2; ++half)
      for (int word = 0; word < 16; ++word)
        for (int q = 0; q < 16; ++q)
          std::memcpy(panel++, codes + (16 * half + q) * row_bytes + line + 4 * word, sizeof *panel);
}

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
