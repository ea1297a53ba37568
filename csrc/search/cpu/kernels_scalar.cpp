// Plain C++ kernels: they define what the other instruction sets compute, and run everywhere.
#include <cmath>
#include <cstring>

#include "common/half.h"
#include "search/cpu/kernels.h"
#include "search/search.h"
#include "search/selection.h"

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

int collect(const float* scores, int count, float threshold, const float* thresholds, uint32_t* positions) {
  int found = 0;
  for (int i = 0; i < count; ++i)
    if (scores[i] >= threshold || (thresholds != nullptr && scores[i] >= thresholds[i])) positions[found++] = static_cast<uint32_t>(i);
  return found;
}

void half_to_float(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = half_value(from[i]);
}

void bfloat_to_float(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = bits_float(static_cast<uint32_t>(from[i]) << 16);
}

template <int Zero>
void encode(const float* rows, int64_t row_stride, int num_rows, int64_t width, int64_t row_bytes, uint8_t* codes, float* scale,
            float* norm, float* error) {
  const int padded = (num_rows + kPanel - 1) / kPanel * kPanel;
  for (int r = 0; r < padded; ++r) {
    const int64_t size = r < num_rows ? width : 0;
    float largest = 0;
    for (int64_t d = 0; d < size; ++d) largest = std::fmax(largest, std::fabs(rows[r * row_stride + d]));
    const float unit = code_scale(largest, kByteLimit), inverse = unit > 0 ? 1.0f / unit : 0.0f;
    double squares = 0, lost_squares = 0;
    for (int64_t d = 0; d < row_bytes; ++d) {
      const float value = d < size ? rows[r * row_stride + d] : 0.0f;
      const int count = unit > 0 && !is_nan(value) ? static_cast<int>(std::nearbyint(value * inverse)) : 0;
      codes[r * row_bytes + d] = static_cast<uint8_t>(count + Zero);
      const double kept = static_cast<double>(count) * unit, lost = value - kept;
      squares += kept * kept;
      lost_squares += lost * lost;
    }
    scale[r] = unit;
    norm[r] = norm_upper_bound(static_cast<float>(squares));
    error[r] = norm_upper_bound(static_cast<float>(lost_squares));
  }
}

float filter_score(const FilterBlock& block, const FilterPanel& panel, int r, int q) {
  uint32_t sum = static_cast<uint32_t>(panel.offset[q]);  // wraps on the way, fits at the end
  for (int64_t d = 0; d < block.row_bytes; ++d) {
    const uint32_t word = panel.codes[((d / kCodeLine * 2 + q / 16) * 16 + d % kCodeLine / 4) * 16 + q % 16];
    sum += static_cast<uint32_t>(block.codes[r * block.stride + d] * static_cast<int8_t>(word >> (8 * (d % 4))));
  }
  return static_cast<float>(static_cast<int32_t>(sum)) * block.scale[r] * panel.scale[q];
}

int filter_block(const FilterBlock& block, const FilterPanel& panel, FilterHit* hits, uint8_t* dense) {
  int total = 0;
  for (int g = 0; g < block.groups; ++g) {
    int found = 0;
    for (int r = g * kPanel; r < (g + 1) * kPanel; ++r)
      for (int q = 0; q < kPanel; ++q) {
        const float score = filter_score(block, panel, r, q);
        const float margin = panel.slope[q] * block.group_norm[g] + panel.lift[q] * block.group_error[g] + block.constant;
        const float bound = score + margin;
        bool keep = !(score < filter_threshold(panel.threshold[q], margin));
        if (block.row_threshold != nullptr) keep = keep || !(bound + std::fabs(bound) * 0x1p-22f < block.row_threshold[r]);
        if (!keep) continue;
        if (found < kDense) hits[total + found] = {static_cast<uint16_t>(q), static_cast<uint16_t>(r), score};
        ++found;
      }
    dense[g] = found > kDense;
    if (!dense[g]) total += found;
  }
  return total;
}

void raise_maxima(const FilterBlock& block, const FilterPanel& panel, Maxima maxima) {
  for (int begin = 0; begin < block.groups * kPanel; begin += maxima.run) {
    float* best = maxima.turn();
    for (int r = begin; r < begin + maxima.run; ++r)
      for (int q = 0; q < kPanel; ++q) {
        const float score = filter_score(block, panel, r, q);
        best[q] = score > best[q] ? score : best[q];
      }
  }
}

void nothing() {}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels kernels{"scalar", score_tile, score_pairs, collect, half_to_float, bfloat_to_float};
  return kernels;
}

const Filter& scalar_filter() {
  static const Filter filter{"scalar", 1, encode<kByteZero>, encode<0>, nullptr, filter_block, raise_maxima, nothing, nothing};
  return filter;
}

float fixed_order_dot(const float* a, const float* b, std::int64_t size) {
  float partial[kLanes] = {};
  for (std::int64_t i = 0; i < size; ++i) partial[i % kLanes] = std::fma(a[i], b[i], partial[i % kLanes]);
  return reduce(partial) + 0.0f;
}

}  // namespace tgq
