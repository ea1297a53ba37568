// Plain C++ kernels: they define what the other instruction sets compute, and run everywhere.
#include <cmath>
#include <cstring>

#include "cpu/kernels.h"
#include "tgq/search.h"
#include "tgq/selection.h"

namespace tgq {
namespace {

float reduce(const float* partial) {
  float sums[kLanes];
  std::memcpy(sums, partial, sizeof sums);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

float dot(const float* a, const float* b, int64_t width) {
  float partial[kLanes] = {};
  for (int64_t d = 0; d < width; d += kLanes)
    for (int j = 0; j < kLanes; ++j) partial[j] = std::fma(a[d + j], b[d + j], partial[j]);
  return reduce(partial);
}

void score_tile(const float* queries, int64_t query_stride, int num_queries, const float* rows, int64_t row_stride,
                int num_rows, int64_t width, float* out, int64_t out_stride) {
  for (int q = 0; q < num_queries; ++q)
    for (int r = 0; r < num_rows; ++r)
      out[q * out_stride + r] = dot(queries + q * query_stride, rows + r * row_stride, width);
}

void score_pairs(const float* const* a, const float* const* b, int count, int64_t width, float* out) {
  for (int i = 0; i < count; ++i) out[i] = dot(a[i], b[i], width);
}

int collect(const float* scores, int count, float floor, const float* floors, uint32_t* positions) {
  int found = 0;
  for (int i = 0; i < count; ++i)
    if (scores[i] >= floor || (floors != nullptr && scores[i] >= floors[i])) positions[found++] = static_cast<uint32_t>(i);
  return found;
}

float half_value(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

void half_to_float(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = half_value(from[i]);
}

float bfloat_value(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

void bfloat_to_float(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = bfloat_value(from[i]);
}

// Round to nearest, ties to even; NaN stays NaN; denormals flush to zero, as the matrix unit would read them.
uint16_t round_to_bfloat(float value) {
  uint32_t bits = float_bits(value);
  if (is_nan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  bits += 0x7fffu + ((bits >> 16) & 1u);
  uint16_t rounded = static_cast<uint16_t>(bits >> 16);
  if ((rounded & 0x7f80u) == 0) rounded &= 0x8000u;
  return rounded;
}

uint16_t* tile_cell(uint16_t* tiles, int64_t depth, int64_t row, int64_t d) {
  const int64_t steps = depth / kTileDepth;
  const int64_t tile = (row / kTileRows) * steps + d / kTileDepth;
  return tiles + (tile * kTileRows + row % kTileRows) * kTileDepth + d % kTileDepth;
}

void round_rows(const float* rows, int64_t row_stride, int num_rows, int64_t width, int64_t depth, uint16_t* tiles,
                float* norm, float* error) {
  const int padded = (num_rows + kPanel - 1) / kPanel * kPanel;
  for (int r = 0; r < padded; ++r) {
    double squares = 0, error_squares = 0;
    for (int64_t d = 0; d < depth; ++d) {
      const float value = r < num_rows && d < width ? rows[r * row_stride + d] : 0.0f;
      const uint16_t rounded = round_to_bfloat(value);
      const float kept = bfloat_value(rounded);
      *tile_cell(tiles, depth, r, d) = rounded;
      squares += static_cast<double>(kept) * kept;
      const double lost = static_cast<double>(value) - kept;
      error_squares += lost * lost;
    }
    norm[r] = norm_upper_bound(static_cast<float>(squares));
    error[r] = norm_upper_bound(static_cast<float>(error_squares));
  }
}

void pack_panel(const uint16_t* rounded_tiles, int64_t depth, uint16_t* panel) {
  for (int q = 0; q < kPanel; ++q)
    for (int64_t d = 0; d < depth; ++d) {
      const int64_t step = d / kTileDepth, pair = d % kTileDepth / 2;
      panel[(((step * 2 + q / 16) * 16 + pair) * 16 + q % 16) * 2 + d % 2] =
          *tile_cell(const_cast<uint16_t*>(rounded_tiles), depth, q, d);
    }
}

int filter_block(const uint16_t* tiles, int groups, int64_t depth, const uint16_t* panel, const float* floor,
                 const float* slope, const float* lift, float constant, const float* group_norm, const float* group_error,
                 const float* row_floor, FilterHit* hits, uint8_t* dense) {
  int total = 0;
  for (int g = 0; g < groups; ++g) {
    int found = 0;
    for (int r = g * kPanel; r < (g + 1) * kPanel; ++r)
      for (int q = 0; q < kPanel; ++q) {
        float score = 0;
        for (int64_t d = 0; d < depth; ++d) {
          const int64_t step = d / kTileDepth, pair = d % kTileDepth / 2;
          const uint16_t x = *tile_cell(const_cast<uint16_t*>(tiles), depth, r, d);
          const uint16_t y = panel[(((step * 2 + q / 16) * 16 + pair) * 16 + q % 16) * 2 + d % 2];
          score += bfloat_value(x) * bfloat_value(y);
        }
        const float margin = slope[q] * group_norm[g] + lift[q] * group_error[g] + constant;
        const float bound = score + margin;
        bool keep = !(score < filter_floor(floor[q], margin));
        if (row_floor != nullptr) keep = keep || !(bound + std::fabs(bound) * 0x1p-22f < row_floor[r]);
        if (!keep) continue;
        if (found < kDense) hits[total + found] = {static_cast<uint16_t>(q), static_cast<uint16_t>(r), score};
        ++found;
      }
    dense[g] = found > kDense;
    if (!dense[g]) total += found;
  }
  return total;
}

void nothing() {}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels kernels{"scalar", score_tile, score_pairs, collect, half_to_float, bfloat_to_float};
  return kernels;
}

const Filter& scalar_filter() {
  static const Filter filter{"scalar", round_rows, pack_panel, filter_block, nothing, nothing};
  return filter;
}

float fixed_order_dot(const float* a, const float* b, std::int64_t size) {
  float partial[kLanes] = {};
  for (std::int64_t i = 0; i < size; ++i) partial[i % kLanes] = std::fma(a[i], b[i], partial[i % kLanes]);
  return reduce(partial) + 0.0f;
}

}  // namespace tgq
