// Linear layers on the matrix unit: packing, the order of the products, and who does which.
#include "inference/inference.h"

#include <algorithm>
#include <new>

#include "common/parallel.h"
#include "inference/matrix_call.h"

namespace tgq {
namespace {

constexpr std::int64_t kRowBlocks = 16;     // blocks of rows that read a panel while it is cached: 512 rows
constexpr std::int64_t kPanelsAtOnce = 12;  // panels that a thread claims, at most

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

}  // namespace tgq
