// Inference of attention layers on the CPU's matrix unit: the C++ interface. docs/inference.md describes it.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace tgq {

// Whether the instruction set in force has a matrix unit; without it every call below returns Status::unsupported.
bool has_matrix_unit();

// Linear layers of `groups` equal shapes side by side: group g maps inputs [g * in, (g + 1) * in) to outputs
// [g * out, (g + 1) * out). One group is an ordinary layer.
struct PackedShape {
  std::int64_t groups, out, in;
  DType dtype;  // f32 or bf16; that of the weights, of inputs and of outputs
};

std::int64_t packed_bytes(const PackedShape& shape);

// Weights [groups, out, in] in the layout that the unit reads. Strides count values; that of `out` or of `in` is 1.
// `packed`: packed_bytes, aligned to 64.
Status pack_weights(const PackedShape& shape, const void* weights, std::int64_t group_stride, std::int64_t out_stride,
                    std::int64_t in_stride, std::uint8_t* packed, int threads);

// out = activation(x Wᵀ + bias) or, with a residual, out = x Wᵀ + bias + residual, with `norm_weight` the LayerNorm of that.
struct LinearCall {
  PackedShape shape;
  const std::uint8_t* packed;
  const float* bias;            // [groups * out], null: zeros
  Matrix x, out;                // [M, groups * in], [M, columns]; rows contiguous
  std::int64_t first_column;    // outputs first_column … first_column + out.cols, a multiple of 32; whole groups if several
  bool gelu;                    // the activation
  Matrix residual;              // [M, out]; its data null: none
  const float *norm_weight, *norm_shift;  // [out]; null: no LayerNorm
  float norm_eps;
  int threads;
};
Status linear(const LinearCall& call);

// down(up(x)) without the values in between in memory: up.out and down.x only name their shape. One group each.
Status feed_forward(const LinearCall& up, const LinearCall& down);

// out[b, r] = softmax(scale q[b, r] x[b]ᵀ + strength[r] guide[b]) x[b]: the tokens x are keys and values of every row; the
// guide is for rows r < guided. out may be q.
struct SharedAttentionCall {
  const void *q, *x;  // [B, rows, width], [B, length, width]; the last two dimensions of q and the last of x contiguous
  void* out;          // [B, rows, width], as q
  std::int64_t batch, rows, length, width;
  std::int64_t q_stride, x_stride, x_row_stride;  // of an item; of an item and of a token
  DType dtype;                                    // f32 or bf16
  const std::uint8_t* visible;                    // [B, length], 0 hides a token; null: all visible
  const float *guide, *strength;                  // [B, length], [guided]; null with guided = 0
  std::int64_t guided;
  float scale;
  int threads;
};
Status shared_attention(const SharedAttentionCall& call);

// Self-attention over [anchored; exploratory; text] per item: who sees whom is tgq_fast.reference.stream_mask's.
struct StreamAttentionCall {
  const void* queries;             // [B, num_anchored + num_exploratory, 3 d]: query, key and value of each row
  const void* text;                // [T, 3 d], or [T, 2 d] (key and value) without text_out; text rows of all items
  const std::int64_t* text_starts;  // [B + 1] item b has rows text_starts[b] … text_starts[b + 1]; null: no text
  void *out, *text_out;            // [B, num_anchored + num_exploratory, d], [T, d] or null
  std::int64_t batch, num_anchored, num_exploratory, heads, head_width;  // head_width: a multiple of 16
  bool anchored_see_exploratory, exploratory_see_anchored, exploratory_see_text, text_sees_queries;
  DType dtype;
  int threads;
};
Status stream_attention(const StreamAttentionCall& call);

}  // namespace tgq
