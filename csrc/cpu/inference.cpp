// Linear layers and attention on the matrix unit: packing, the order of the products, and who does which.
#include "tgq/inference.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/kernels.h"
#include "cpu/matrix.h"
#include "cpu/parallel.h"

namespace tgq {
namespace {

constexpr std::int64_t kRowBlocks = 16;       // blocks of rows that read a panel while it is cached: 512 rows
constexpr std::int64_t kPanelsAtOnce = 12;    // panels that a thread claims, at most
constexpr std::int64_t kAttentionBlocks = 3;  // blocks of rows that read an item's tokens while they are cached

const MatrixUnit* unit_in_force() {
#if defined(TGQ_X86)
  const Isa* isa = find_isa(nullptr);
  if (isa != nullptr && std::strcmp(isa->name, "amx") == 0) return &amx_matrix_unit();
#endif
  return nullptr;
}

const RowKernels& row_kernels() {
#if defined(TGQ_X86)
  return avx512_row_kernels();
#else
  std::abort();  // not reached: there is no matrix unit
#endif
}

// Grows, never shrinks: buffers of one thread that serve its next call again.
class Scratch {
 public:
  template <typename T>
  T* take(std::int64_t count) {
    const auto bytes = static_cast<std::size_t>(count) * sizeof(T);
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(std::uint8_t* memory) const { std::free(memory); }
  };
  std::unique_ptr<std::uint8_t, Free> memory_;
  std::size_t size_ = 0;
};

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
int parts_of(DType dtype) { return dtype == DType::bf16 ? 1 : kFloatParts; }
std::int64_t size_of(DType dtype) { return dtype == DType::bf16 ? 2 : 4; }
bool supported(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16; }

const std::uint8_t* at(const void* data, std::int64_t index, DType dtype) {
  return static_cast<const std::uint8_t*>(data) + index * size_of(dtype);
}
std::uint8_t* at(void* data, std::int64_t index, DType dtype) { return static_cast<std::uint8_t*>(data) + index * size_of(dtype); }

Rows rows_at(const void* data, std::int64_t index, std::int64_t stride, DType dtype) {
  return {at(data, index, dtype), stride, dtype == DType::bf16};
}

// Rows × one panel over its whole depth, part by part.
void multiply_all_steps(const MatrixUnit& unit, const std::uint8_t* rows, std::int64_t all_steps, std::int64_t blocks,
                        const std::uint8_t* panel, int parts, float* sums, std::int64_t stride, const Finish* finish) {
  for (std::int64_t step = 0; step < all_steps; step += kStepsAtOnce) {
    const std::int64_t steps = std::min(kStepsAtOnce, all_steps - step);
    unit.multiply(rows + row_tile_bytes(step, parts), row_tile_bytes(all_steps, parts), blocks, panel + panel_bytes(step, parts), steps,
                  parts, step > 0, sums, stride, step + steps == all_steps ? finish : nullptr, nullptr);
  }
}

// Geometry of a packed layer: panels of a group follow one another.
struct Layout {
  explicit Layout(const PackedShape& shape)
      : parts(parts_of(shape.dtype)), steps(ceil_div(shape.in, kStep)), group_panels(ceil_div(shape.out, kBlock)) {}
  int parts;
  std::int64_t steps, group_panels;
  std::int64_t panel() const { return panel_bytes(steps, parts); }
};

}  // namespace

bool has_matrix_unit() { return unit_in_force() != nullptr; }

std::int64_t packed_bytes(const PackedShape& shape) {
  const Layout layout(shape);
  return shape.groups * layout.group_panels * layout.panel();
}

Status pack_weights(const PackedShape& shape, const void* weights, std::int64_t group_stride, std::int64_t out_stride,
                    std::int64_t in_stride, std::uint8_t* packed, int threads) {
  const MatrixUnit* unit = unit_in_force();
  if (unit == nullptr) return Status::unsupported;
  if (!supported(shape.dtype) || (in_stride != 1 && out_stride != 1)) return Status::bad_argument;
  const Layout layout(shape);
  return parallel_for(shape.groups * layout.group_panels, 1, threads, {unit->begin, unit->end}, [&](std::int64_t i, std::int64_t) {
    const std::int64_t group = i / layout.group_panels, column = i % layout.group_panels * kBlock;
    const Rows from = rows_at(weights, group * group_stride + column * out_stride, out_stride, shape.dtype);
    unit->pack_columns(from, in_stride, static_cast<int>(std::min<std::int64_t>(kBlock, shape.out - column)), shape.in,
                       layout.steps, layout.parts, packed + i * layout.panel());
  });
}

namespace {

// One layer over up to kRowBlocks blocks of rows at a time: rows are packed, panels multiplied and, with a residual, whole rows
// finished. Where another layer follows at once, its rows are left packed in `next`.
class Linear {
 public:
  Linear(const LinearCall& call, const MatrixUnit& unit)
      : call_(call), unit_(unit), worker_{unit.begin, unit.end}, layout_(call.shape), panels_(ceil_div(call.out.cols, kBlock)),
        whole_rows_(call.residual.data != nullptr) {}

  std::int64_t packed_bytes(std::int64_t blocks) const { return blocks * block_bytes(); }

  // Packs rows [first, first + count).
  Status pack(std::int64_t first, std::int64_t count, std::uint8_t* rows) const {
    return parallel_for(ceil_div(count, kBlock), 1, call_.threads, worker_, [&](std::int64_t block, std::int64_t) {
      const std::int64_t row = block * kBlock;
      unit_.pack_rows(rows_at(call_.x.data, (first + row) * call_.x.row_stride, call_.x.row_stride, dtype()),
                      std::min<std::int64_t>(kBlock, count - row), call_.shape.in, layout_.steps, layout_.parts,
                      rows + block * block_bytes());
    });
  }

  // Packs and multiplies rows [first, first + count) group by group: a group's rows are multiplied while they are cached.
  Status run_groups(std::int64_t first, std::int64_t count) {
    first_ = first;
    count_ = count;
    const std::int64_t groups = call_.shape.groups, blocks = ceil_div(count, kBlock);
    const std::int64_t chunk = std::min(blocks, ceil_div(blocks * groups, 2 * call_.threads)), chunks = ceil_div(blocks, chunk);
    return parallel_for(groups * chunks, 1, call_.threads, worker_, [&](std::int64_t i, std::int64_t) {
      static thread_local Scratch packed, sums;
      const std::int64_t group = i / chunks, block = i % chunks * chunk, row = block * kBlock;
      const std::int64_t here = std::min(chunk, blocks - block);
      std::uint8_t* rows = packed.take<std::uint8_t>(here * block_bytes());
      const std::int64_t value = (first + row) * call_.x.row_stride + group * call_.shape.in;
      unit_.pack_rows(rows_at(call_.x.data, value, call_.x.row_stride, dtype()), std::min(here * kBlock, count - row), call_.shape.in,
                      layout_.steps, layout_.parts, rows);
      float* taken = sums.take<float>(here * kBlock * kBlock);
      for (std::int64_t panel = group * layout_.group_panels; panel < (group + 1) * layout_.group_panels; ++panel) {
        Finish finish = finish_of(panel);
        finish.out = out_at(row, panel * kBlock);
        finish.rows = std::min(here * kBlock, count - row);
        multiply_all_steps(unit_, rows, layout_.steps, here, call_.packed + panel * layout_.panel(), layout_.parts, taken, kBlock,
                           &finish);
      }
    });
  }

  // Multiplies those rows; with `next`, what comes out is packed for a layer of `call_.out.cols` inputs.
  Status multiply(std::int64_t first, std::int64_t count, const std::uint8_t* rows, std::uint8_t* next) {
    static thread_local Scratch sums;
    first_ = first;
    count_ = count;
    blocks_ = ceil_div(count, kBlock);
    rows_ = rows;
    next_ = next;
    if (whole_rows_) sums_ = sums.take<float>(blocks_ * kBlock * panels_ * kBlock);
    const std::int64_t grain = std::min(kPanelsAtOnce, ceil_div(panels_, call_.threads));
    const Status status = parallel_for(panels_, grain, call_.threads, worker_,
                                       [&](std::int64_t begin, std::int64_t end) { multiply_panels(begin, end); });
    if (status != Status::ok || !whole_rows_) return status;
    return parallel_for(blocks_, 1, call_.threads, worker_, [&](std::int64_t block, std::int64_t) { normalise(block); });
  }

 private:
  DType dtype() const { return call_.shape.dtype; }
  std::int64_t block_bytes() const { return 2 * row_tile_bytes(layout_.steps, layout_.parts); }
  std::int64_t sums_width() const { return panels_ * kBlock; }
  void* out_at(std::int64_t row, std::int64_t column) const {
    return at(const_cast<void*>(call_.out.data), (first_ + row) * call_.out.row_stride + column, dtype());
  }

  // The sums of all panels [begin, end) over one part of the inner dimension, then over the next.
  void multiply_panels(std::int64_t begin, std::int64_t end) const {
    static thread_local Scratch scratch;
    const std::int64_t stride = whole_rows_ ? sums_width() : kBlock, panel_sums = whole_rows_ ? kBlock : blocks_ * kBlock * kBlock;
    float* sums = whole_rows_ ? sums_ + begin * kBlock : scratch.take<float>((end - begin) * panel_sums);
    for (std::int64_t step = 0; step < layout_.steps; step += kStepsAtOnce) {
      const std::int64_t steps = std::min(kStepsAtOnce, layout_.steps - step);
      for (std::int64_t panel = begin; panel < end; ++panel) {
        const std::int64_t source = panel + call_.first_column / kBlock;
        const std::uint8_t* columns = call_.packed + source * layout_.panel() + panel_bytes(step, layout_.parts);
        const std::uint8_t* rows = rows_ + row_tile_bytes(step, layout_.parts);
        const Finish finish = finish_of(panel);
        const bool last = step + steps == layout_.steps;
        unit_.multiply(rows, row_tile_bytes(layout_.steps, layout_.parts), blocks_, columns, steps, layout_.parts, step > 0,
                       sums + (panel - begin) * panel_sums, stride, last && !whole_rows_ ? &finish : nullptr,
                       panel + 1 < end ? columns + layout_.panel() : nullptr);
      }
    }
  }

  Finish finish_of(std::int64_t panel) const {
    const std::int64_t column = panel * kBlock;
    return {next_ == nullptr ? out_at(0, column) : next_ + row_tile_bytes(panel, layout_.parts),
            call_.out.row_stride,
            next_ == nullptr ? 0 : row_tile_bytes(panels_, layout_.parts),
            dtype() == DType::bf16,
            count_,
            call_.out.cols - column,
            call_.bias == nullptr ? nullptr : call_.bias + call_.first_column + column,
            nullptr,
            call_.gelu ? Activation::gelu : Activation::none};
  }

  void normalise(std::int64_t block) const {
    const std::int64_t row = block * kBlock, from = (first_ + row) * call_.residual.row_stride;
    row_kernels().normalise(sums_ + row * sums_width(), sums_width(), std::min<std::int64_t>(kBlock, count_ - row), call_.out.cols,
                            call_.bias, rows_at(call_.residual.data, from, call_.residual.row_stride, dtype()), call_.norm_weight,
                            call_.norm_shift, call_.norm_eps, out_at(row, 0), call_.out.row_stride);
  }

  const LinearCall& call_;
  const MatrixUnit& unit_;
  const Worker worker_;
  const Layout layout_;
  const std::int64_t panels_;
  const bool whole_rows_;
  std::int64_t first_ = 0, count_ = 0, blocks_ = 0;  // the rows at hand
  const std::uint8_t* rows_ = nullptr;
  std::uint8_t* next_ = nullptr;
  float* sums_ = nullptr;
};

bool valid(const LinearCall& call) {
  const PackedShape& shape = call.shape;
  const bool several = shape.groups > 1;
  return supported(shape.dtype) && call.x.dtype == shape.dtype && call.out.dtype == shape.dtype && call.x.rows == call.out.rows &&
         call.x.cols == shape.groups * shape.in && call.first_column % kBlock == 0 && call.threads > 0 &&
         call.first_column + call.out.cols <= shape.groups * shape.out &&
         !(several && (call.first_column != 0 || shape.out % kBlock != 0)) &&
         (call.residual.data == nullptr ? call.norm_weight == nullptr : !several && call.bias != nullptr) &&
         (call.norm_weight == nullptr || call.norm_shift != nullptr);
}

}  // namespace

Status linear(const LinearCall& call) {
  const MatrixUnit* unit = unit_in_force();
  if (unit == nullptr) return Status::unsupported;
  if (!valid(call)) return Status::bad_argument;
  static thread_local Scratch packed;
  try {
    Linear layer(call, *unit);
    for (std::int64_t first = 0; first < call.x.rows; first += kRowBlocks * kBlock) {
      const std::int64_t count = std::min(kRowBlocks * kBlock, call.x.rows - first);
      Status status = Status::ok;
      if (call.shape.groups > 1) {
        status = layer.run_groups(first, count);
      } else {
        std::uint8_t* rows = packed.take<std::uint8_t>(layer.packed_bytes(ceil_div(count, kBlock)));
        status = layer.pack(first, count, rows);
        if (status == Status::ok) status = layer.multiply(first, count, rows, nullptr);
      }
      if (status != Status::ok) return status;
    }
    return Status::ok;
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
}

Status feed_forward(const LinearCall& up, const LinearCall& down) {
  const MatrixUnit* unit = unit_in_force();
  if (unit == nullptr) return Status::unsupported;
  if (!valid(up) || !valid(down) || up.shape.groups != 1 || down.shape.groups != 1 || up.first_column != 0 ||
      up.residual.data != nullptr || up.out.cols != down.x.cols || up.x.rows != down.x.rows || up.shape.dtype != down.shape.dtype)
    return Status::bad_argument;
  static thread_local Scratch packed, packed_hidden;
  try {
    Linear first_layer(up, *unit), second_layer(down, *unit);
    for (std::int64_t first = 0; first < up.x.rows; first += kRowBlocks * kBlock) {
      const std::int64_t count = std::min(kRowBlocks * kBlock, up.x.rows - first), blocks = ceil_div(count, kBlock);
      std::uint8_t* rows = packed.take<std::uint8_t>(first_layer.packed_bytes(blocks));
      std::uint8_t* hidden = packed_hidden.take<std::uint8_t>(second_layer.packed_bytes(blocks));
      Status status = first_layer.pack(first, count, rows);
      if (status == Status::ok) status = first_layer.multiply(first, count, rows, hidden);
      if (status == Status::ok) status = second_layer.multiply(first, count, hidden, nullptr);
      if (status != Status::ok) return status;
    }
    return Status::ok;
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
}

namespace {

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
