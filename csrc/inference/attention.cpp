// Attention on the matrix unit: an item's rows over its own tokens, and heads of few rows.
#include "inference/inference.h"

#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "inference/matrix_call.h"

namespace tgq {
namespace {

constexpr std::int64_t kAttentionBlocks = 3;  // blocks of rows that read an item's tokens while they are cached

// One item's tokens, packed as columns of both products, and blocks of its rows.
class SharedAttention {
 public:
  SharedAttention(const SharedAttentionCall& call, const MatrixUnit& unit)
      : call_(call), unit_(unit), parts_(parts_of(call.dtype)), width_steps_(ceil_div(call.width, kStep)),
        length_steps_(ceil_div(call.length, kStep)), key_panel_(panel_bytes(width_steps_, parts_)),
        value_panel_(panel_bytes(length_steps_, parts_)), key_panels_(ceil_div(call.length, kBlock)),
        value_panels_(ceil_div(call.width, kBlock)) {
    static thread_local Scratch scratch;
    const std::int64_t rows = kAttentionBlocks * 2 * row_tile_bytes(width_steps_, parts_);
    const std::int64_t weights = kAttentionBlocks * 2 * row_tile_bytes(length_steps_, parts_);
    const std::int64_t sums = kAttentionBlocks * kBlock * std::max<std::int64_t>(key_panels_, 1) * kBlock;
    keys_ = scratch.take<std::uint8_t>(key_panels_ * key_panel_ + value_panels_ * value_panel_ + rows + weights +
                                       sums * static_cast<std::int64_t>(sizeof(float)));
    values_ = keys_ + key_panels_ * key_panel_;
    rows_ = values_ + value_panels_ * value_panel_;
    weights_ = rows_ + rows;
    sums_ = reinterpret_cast<float*>(weights_ + weights);
  }

  // Row blocks [begin, end) of item b.
  void run(std::int64_t b, std::int64_t begin, std::int64_t end) {
    const void* tokens = at(call_.x, b * call_.x_stride, call_.dtype);
    for (std::int64_t panel = 0; panel < key_panels_; ++panel)
      unit_.pack_columns(rows_at(tokens, panel * kBlock * call_.x_row_stride, call_.x_row_stride, call_.dtype), 1,
                         static_cast<int>(std::min<std::int64_t>(kBlock, call_.length - panel * kBlock)), call_.width, width_steps_,
                         parts_, keys_ + panel * key_panel_);
    for (std::int64_t panel = 0; panel < value_panels_; ++panel)
      unit_.pack_columns(rows_at(tokens, panel * kBlock, 1, call_.dtype), call_.x_row_stride,
                         static_cast<int>(std::min<std::int64_t>(kBlock, call_.width - panel * kBlock)), call_.length, length_steps_,
                         parts_, values_ + panel * value_panel_);
    for (std::int64_t block = begin; block < end; block += kAttentionBlocks)
      attend(b, block * kBlock, std::min(kAttentionBlocks, end - block));
  }

 private:
  void attend(std::int64_t b, std::int64_t row, std::int64_t blocks) {
    const std::int64_t count = std::min(blocks * kBlock, call_.rows - row), first = b * call_.q_stride + row * call_.width;
    unit_.pack_rows(rows_at(call_.q, first, call_.width, call_.dtype), count, call_.width, width_steps_, parts_, rows_);
    const std::int64_t stride = key_panels_ * kBlock;
    for (std::int64_t panel = 0; panel < key_panels_; ++panel)
      multiply_all_steps(unit_, rows_, width_steps_, blocks, keys_ + panel * key_panel_, parts_, sums_ + panel * kBlock, stride,
                         nullptr);
    const std::int64_t guided = std::clamp<std::int64_t>(call_.guided - row, 0, count);
    if (guided > 0)  // the softmax multiplies by the scale
      row_kernels().add_outer(sums_, stride, guided, call_.length, call_.strength + row, call_.guide + b * call_.length,
                              1.0f / call_.scale);
    float inverse[kAttentionBlocks * kBlock];
    for (std::int64_t block = 0; block < blocks; ++block)
      row_kernels().softmax(sums_ + block * kBlock * stride, stride, call_.length, call_.scale,
                            call_.visible == nullptr ? nullptr : call_.visible + b * call_.length, length_steps_, parts_,
                            weights_ + block * 2 * row_tile_bytes(length_steps_, parts_), inverse + block * kBlock);
    for (std::int64_t panel = 0; panel < value_panels_; ++panel) {
      const Finish finish{at(call_.out, first + panel * kBlock, call_.dtype), call_.width, 0, call_.dtype == DType::bf16, count,
                          call_.width - panel * kBlock, nullptr, inverse, Activation::none};
      multiply_all_steps(unit_, weights_, length_steps_, blocks, values_ + panel * value_panel_, parts_, sums_, kBlock, &finish);
    }
  }

  const SharedAttentionCall& call_;
  const MatrixUnit& unit_;
  const int parts_;
  const std::int64_t width_steps_, length_steps_, key_panel_, value_panel_, key_panels_, value_panels_;
  std::uint8_t *keys_, *values_, *rows_, *weights_;
  float* sums_;
};

}  // namespace

Status shared_attention(const SharedAttentionCall& call) {
  const MatrixUnit* unit = unit_in_force();
  if (unit == nullptr) return Status::unsupported;
  if (!supported(call.dtype) || call.threads < 1 || call.length < 1 || call.guided < 0 || call.guided > call.rows ||
      (call.guided > 0 && (call.guide == nullptr || call.strength == nullptr)))
    return Status::bad_argument;
  // An item is one task; of fewer items than threads each is split, and its tokens are packed by every part.
  const std::int64_t blocks = ceil_div(call.rows, kBlock);
  const std::int64_t splits = call.batch == 0 ? 1 : std::min(blocks, ceil_div(call.threads, call.batch));
  return parallel_for(call.batch * splits, 1, call.threads, {unit->begin, unit->end}, [&](std::int64_t i, std::int64_t) {
    const std::int64_t split = i % splits;
    SharedAttention(call, *unit).run(i / splits, blocks * split / splits, blocks * (split + 1) / splits);
  });
}

Status stream_attention(const StreamAttentionCall& call) {
  const MatrixUnit* unit = unit_in_force();
  if (unit == nullptr) return Status::unsupported;
  if (!supported(call.dtype) || call.threads < 1 || call.head_width < 16 || call.head_width % 16 != 0) return Status::bad_argument;
  const std::int64_t d = call.heads * call.head_width, queries = call.num_anchored + call.num_exploratory;
  const std::int64_t text_width = call.text_out == nullptr ? 2 * d : 3 * d, text_key = text_width - 2 * d;
  return parallel_for(call.batch * call.heads, call.heads, call.threads, {unit->begin, unit->end}, [&](std::int64_t begin, std::int64_t end) {
    static thread_local Scratch scratch;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t item = i / call.heads, column = i % call.heads * call.head_width;
      const std::int64_t start = call.text_starts == nullptr ? 0 : call.text_starts[item];
      const std::int64_t stop = call.text_starts == nullptr ? 0 : call.text_starts[item + 1];
      const auto query = [&](std::int64_t which) { return at(call.queries, item * queries * 3 * d + which * d + column, call.dtype); };
      const void* text_rows = call.text == nullptr ? call.queries : call.text;  // not read where there is no text
      const auto text = [&](std::int64_t offset) { return at(text_rows, start * text_width + offset + column, call.dtype); };
      StreamHead head;
      head.queries = query(0);
      head.keys = query(1);
      head.values = query(2);
      head.text_queries = call.text_out == nullptr ? nullptr : text(0);
      head.text_keys = text(text_key);
      head.text_values = text(text_key + d);
      head.out = at(call.out, item * queries * d + column, call.dtype);
      head.text_out = call.text_out == nullptr ? nullptr : at(call.text_out, start * d + column, call.dtype);
      head.stride = 3 * d;
      head.text_stride = head.text_query_stride = text_width;
      head.out_stride = d;
      head.bfloat = call.dtype == DType::bf16;
      head.num_anchored = static_cast<int>(call.num_anchored);
      head.num_exploratory = static_cast<int>(call.num_exploratory);
      head.num_text = static_cast<int>(stop - start);
      head.anchored_see_exploratory = call.anchored_see_exploratory;
      head.exploratory_see_anchored = call.exploratory_see_anchored;
      head.exploratory_see_text = call.exploratory_see_text;
      head.text_sees_queries = call.text_sees_queries;
      head.width = static_cast<int>(call.head_width);
      head.scale = 1.0f / std::sqrt(static_cast<float>(call.head_width));
      row_kernels().attend(head, scratch.take<float>(attend_scratch(head)));
    }
  });
}

}  // namespace tgq
