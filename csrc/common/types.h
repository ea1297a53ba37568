// What every part of the core speaks of: element types, matrices, and how a call ended.
#pragma once

#include <cstdint>

namespace tgq {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// A strided matrix in memory that the caller owns. Strides count elements; they may be zero or negative.
struct Matrix {
  const void* data;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t row_stride;
  std::int64_t col_stride;
  DType dtype;
};

enum class Status : int { ok = 0, bad_argument = 1, out_of_memory = 2, cancelled = 3, unsupported = 4 };

}  // namespace tgq
