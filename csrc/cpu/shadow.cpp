// Byte codes of a whole pool, for searches to come.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "cpu/pass.h"
#include "cpu/team.h"

namespace tgq {
namespace {

constexpr std::int64_t kClaim = 1024;  // rows that a thread encodes at a time, a multiple of kPanel

}  // namespace

std::int64_t shadow_width(std::int64_t cols) { return round_up(cols, kCodeLine); }

Status build_shadow(const Matrix& pool, std::uint8_t* codes, float* scale, float* norm, float* error, int threads) {
  if (!valid(pool) || threads < 1 ||
      (pool.rows > 0 && (codes == nullptr || scale == nullptr || norm == nullptr || error == nullptr)))
    return Status::bad_argument;
  const Isa* isa = find_isa(nullptr);
  if (isa == nullptr) return Status::unsupported;
  const Filter& filter = isa->byte_filter == nullptr ? scalar_filter() : *isa->byte_filter;
  const std::int64_t width = round_up(pool.cols, kLanes), bytes = shadow_width(pool.cols);
  std::atomic<std::int64_t> next{0};
  Progress progress;
  const auto encode = [&](int) {
    const RowReader reader(pool, *isa->kernels, width);
    const Buffer<float> rows(static_cast<std::size_t>(kPanel * width));
    const Buffer<std::uint8_t> block(static_cast<std::size_t>(kPanel * bytes));
    float scales[kPanel], norms[kPanel], errors[kPanel];
    for (std::int64_t begin = next.fetch_add(kClaim); begin < pool.rows; begin = next.fetch_add(kClaim))
      for (std::int64_t first = begin; first < std::min(begin + kClaim, pool.rows); first += kPanel) {
        const auto count = static_cast<int>(std::min<std::int64_t>(kPanel, pool.rows - first));
        std::int64_t stride = 0;
        const float* from = reader.read(first, count, rows.data(), &stride);
        filter.encode_rows(from, stride, count, width, bytes, block.data(), scales, norms, errors);
        std::copy(block.data(), block.data() + count * bytes, codes + first * bytes);
        std::copy(scales, scales + count, scale + first);
        std::copy(norms, norms + count, norm + first);
        std::copy(errors, errors + count, error + first);
      }
  };
  try {
    return run_team(static_cast<int>(std::min<std::int64_t>(threads, 1 + pool.rows / kClaim)), encode, progress, {});
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
}

}  // namespace tgq
