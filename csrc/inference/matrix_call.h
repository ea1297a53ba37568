#ifndef TGQ_CPU_MATRIX_CALL_H_
#define TGQ_CPU_MATRIX_CALL_H_
// What linear layers and attention on the matrix unit share: which kernels run, scratch memory, and where elements lie.
#include "inference/inference.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "common/integers.h"
#include "common/isa.h"
#include "inference/matrix.h"

namespace tgq {

inline const MatrixUnit* unit_in_force() {
#if defined(TGQ_X86)
  Isa isa;
  if (find_isa(nullptr, &isa) && isa == Isa::amx) return &amx_matrix_unit();
#endif
  return nullptr;
}

inline const RowKernels& row_kernels() {
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

inline int parts_of(DType dtype) { return dtype == DType::bf16 ? 1 : kFloatParts; }
inline std::int64_t size_of(DType dtype) { return dtype == DType::bf16 ? 2 : 4; }
inline bool supported(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16; }

inline const std::uint8_t* at(const void* data, std::int64_t index, DType dtype) {
  return static_cast<const std::uint8_t*>(data) + index * size_of(dtype);
}
inline std::uint8_t* at(void* data, std::int64_t index, DType dtype) { return static_cast<std::uint8_t*>(data) + index * size_of(dtype); }

inline Rows rows_at(const void* data, std::int64_t index, std::int64_t stride, DType dtype) {
  return {at(data, index, dtype), stride, dtype == DType::bf16};
}

// Rows × one panel over its whole depth, part by part.
inline void multiply_all_steps(const MatrixUnit& unit, const std::uint8_t* rows, std::int64_t all_steps, std::int64_t blocks,
                        const std::uint8_t* panel, int parts, float* sums, std::int64_t stride, const Finish* finish) {
  for (std::int64_t step = 0; step < all_steps; step += kStepsAtOnce) {
    const std::int64_t steps = std::min(kStepsAtOnce, all_steps - step);
    unit.multiply(rows + row_tile_bytes(step, parts), row_tile_bytes(all_steps, parts), blocks, panel + panel_bytes(step, parts), steps,
                  parts, step > 0, sums, stride, step + steps == all_steps ? finish : nullptr, nullptr);
  }
}

}  // namespace tgq

#endif  // TGQ_CPU_MATRIX_CALL_H_
