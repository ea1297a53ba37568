// The kernels of inference on a processor with a matrix unit: products of packed matrices and the row-wise work around
// them. docs/inference.md has the layouts and the error of the products.
//
// As in search/cpu/kernels.h: kernel files include this and intrinsics only, because they have target flags of their own.
#pragma once

#include <stdint.h>

namespace tgq {

constexpr int kTile = 16;              // rows of a tile, and fp32 columns
constexpr int kBlock = 2 * kTile;      // rows, and columns, that are multiplied at a time
constexpr int kStep = 32;              // values of the inner dimension in a tile of bf16
constexpr int64_t kTileBytes = 1024;
constexpr int kFloatParts = 3;         // bf16 numbers whose sum is an fp32 number
// Steps to multiply in one go, 768 values: the rows of a task stay in the second-level cache, and sums of parts keep small
// products away from the rounding of a large total.
constexpr int64_t kStepsAtOnce = 24;

// A matrix in memory, values of fp32 or (bfloat) bf16. Strides count values.
struct Rows {
  const void* data;
  int64_t stride;
  bool bfloat;
};

// Rows as the unit reads them: tiles of kTile rows by kStep values, [rows / kTile][step][part].
static constexpr int64_t row_tile_bytes(int64_t steps, int parts) { return steps * parts * kTileBytes; }

// Columns as the unit reads them: a panel has kBlock columns, as [step][part][left and right tile].
static constexpr int64_t panel_bytes(int64_t steps, int parts) { return steps * parts * 2 * kTileBytes; }

enum class Activation : int { none = 0, gelu = 1 };

// out[r, c] = activation(row_scale[r] * sum[r, c] + bias[c]), for the first `rows` and `columns` of what was multiplied. With
// `row_tile` the values of a panel go to `out` as one step of row tiles instead, as pack_rows would have packed them.
struct Finish {
  void* out;
  int64_t stride;    // values
  int64_t row_tile;  // bytes between row tiles; 0: rows of values
  bool bfloat;
  int64_t rows, columns;
  const float* bias;       // null: zeros
  const float* row_scale;  // null: ones
  Activation activation;
};

// One head of self-attention over [anchored; exploratory; text] of one item. Rows are `stride` values apart.
struct StreamHead {
  const void *queries, *keys, *values;                 // of the num_anchored + num_exploratory query rows
  const void *text_queries, *text_keys, *text_values;  // text_queries null: text rows are not wanted
  void *out, *text_out;
  int64_t stride, text_stride, text_query_stride, out_stride;
  bool bfloat;
  int num_anchored, num_exploratory, num_text;
  bool anchored_see_exploratory, exploratory_see_anchored, exploratory_see_text, text_sees_queries;
  int width;  // of the head, a multiple of 16
  float scale;
};

struct MatrixUnit {
  void (*begin)();  // on each thread before use
  void (*end)();
  // `rows` rows of `width` values → row tiles [ceil(rows / kBlock) * 2][steps][parts], zero where there is no value.
  void (*pack_rows)(const Rows& from, int64_t rows, int64_t width, int64_t steps, int parts, uint8_t* to);
  // Up to kBlock columns → one panel. Column c, value d is from.data[c * from.stride + d * depth_stride]; one of the strides is 1.
  void (*pack_columns)(const Rows& from, int64_t depth_stride, int columns, int64_t depth, int64_t steps, int parts,
                       uint8_t* to);
  // rows × panel over steps of the inner dimension, for `blocks` of kBlock rows whose row tiles begin `row_tile` bytes apart:
  // sums[kBlock * blocks, kBlock] = or += (add) the product or, with `finish`, what it makes of them. `ahead` is read next;
  // null: nothing.
  void (*multiply)(const uint8_t* rows, int64_t row_tile, int64_t blocks, const uint8_t* panel, int64_t steps, int parts, bool add,
                   float* sums, int64_t stride, const Finish* finish, const uint8_t* ahead);
};

static inline int64_t attend_scratch(const StreamHead& head) {
  const int64_t keys = (head.num_anchored + head.num_exploratory + head.num_text + 31) / 32 * 32;
  return keys * (2 * head.width + 4) + 4 * head.width;
}

// What happens to rows between products.
struct RowKernels {
  // out = LayerNorm(sums + bias + residual), row by row, or the sum itself where `weight` is null; residual and out are of one
  // dtype.
  void (*normalise)(const float* sums, int64_t stride, int64_t rows, int64_t width, const float* bias, const Rows& residual,
                    const float* weight, const float* shift, float eps, void* out, int64_t out_stride);
  // sums[r, c] += factor * column[r] * row[c] for `rows` rows of `width` values.
  void (*add_outer)(float* sums, int64_t stride, int64_t rows, int64_t width, const float* column, const float* row, float factor);
  // exp(scale * (scores - largest)) of one block of kBlock rows as row tiles [2][steps][parts], zero from `length` on and
  // where `visible` is 0; inverse[r] = 1 / its sum, or 0 where nothing is visible.
  void (*softmax)(const float* scores, int64_t stride, int64_t length, float scale, const uint8_t* visible, int64_t steps, int parts,
                  uint8_t* to, float* inverse);
  // `scratch`: attend_scratch(head) floats.
  void (*attend)(const StreamHead& head, float* scratch);
};

#if defined(TGQ_X86)
const MatrixUnit& amx_matrix_unit();
const RowKernels& avx512_row_kernels();
#endif

}  // namespace tgq
