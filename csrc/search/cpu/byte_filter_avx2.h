// The byte filter in 256-bit registers; what multiplies is the including file's: Dot::add(sums, rows, queries), which adds to each
// 32-bit sum four products of unsigned and signed bytes from each of Dot::words registers, and Dot::Range, the codes of queries
// that it can take.
#pragma once

#include <immintrin.h>

#include "search/cpu/kernels.h"

namespace tgq {
namespace {

inline float sum_lanes(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest_lane(__m256 v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline __m256 absolute(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

// Codes as large as a byte holds.
struct FullRange {
  static constexpr int limit = kByteLimit;
  static float largest(const float* from, int64_t size) {
    __m256 most[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t d = 0; d < size; d += 16)
      for (int half = 0; half < 2; ++half) most[half] = _mm256_max_ps(absolute(_mm256_loadu_ps(from + d + 8 * half)), most[half]);
    return largest_lane(_mm256_max_ps(most[0], most[1]));
  }
};

template <class Range, int Zero>
void encode(const float* rows, int64_t row_stride, int num_rows, int64_t width, int64_t row_bytes, uint8_t* codes, float* scale,
            float* norm, float* error) {
  const int padded = (num_rows + kPanel - 1) / kPanel * kPanel;
  const __m128i zero = _mm_set1_epi8(static_cast<char>(Zero));
  for (int r = 0; r < padded; ++r) {
    if (r % 8 == 0)  // ahead, since all of a row waits for its scale
      for (int i = r; i < r + 8; ++i)
        scale[i] = code_scale(Range::largest(rows + i * row_stride, i < num_rows ? width : 0), Range::limit);
    const float* from = rows + r * row_stride;
    const int64_t size = r < num_rows ? width : 0;
    const float unit = scale[r];
    const __m256 step = _mm256_set1_ps(unit), inverse = _mm256_set1_ps(unit > 0 ? 1.0f / unit : 0.0f);
    __m256 squares[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, lost_squares[2] = {squares[0], squares[0]};
    for (int64_t d = 0; d < row_bytes; d += 16) {
      __m256i whole[2];
      for (int half = 0; half < 2; ++half) {
        const __m256 value = d < size ? _mm256_loadu_ps(from + d + 8 * half) : _mm256_setzero_ps();
        whole[half] = _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse));
        const __m256 count = _mm256_cvtepi32_ps(whole[half]), kept = _mm256_mul_ps(count, step);
        const __m256 lost = _mm256_fnmadd_ps(count, step, value);
        squares[half] = _mm256_fmadd_ps(kept, kept, squares[half]);
        lost_squares[half] = _mm256_fmadd_ps(lost, lost, lost_squares[half]);
      }
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole[0], whole[1]), 0xd8);
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + r * row_bytes + d), _mm_xor_si128(bytes, zero));
    }
    norm[r] = norm_upper_bound(sum_lanes(_mm256_add_ps(squares[0], squares[1])));
    error[r] = norm_upper_bound(sum_lanes(_mm256_add_ps(lost_squares[0], lost_squares[1])));
  }
}

// Sums of R rows and sixteen queries: sums[row * kPanel + query].
template <class Dot, int R>
inline void multiply(const uint8_t* rows, int64_t stride, int64_t row_bytes, const uint32_t* queries, const int32_t* offset,
                     int32_t* sums) {
  constexpr int W = Dot::words;
  __m256i total[R][2];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 2; ++i) total[r][i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(offset + 8 * i));
  for (int64_t line = 0; line < row_bytes; line += kCodeLine, queries += 512)
    for (int word = 0; word < 16; word += W) {
      __m256i query[2][W];
      for (int w = 0; w < W; ++w)
        for (int i = 0; i < 2; ++i)
          query[i][w] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(queries + 16 * (word + w)) + i);
      for (int r = 0; r < R; ++r) {
        __m256i row[W];
        for (int w = 0; w < W; ++w) {
          int32_t four;
          __builtin_memcpy(&four, rows + r * stride + line + 4 * (word + w), sizeof four);
          row[w] = _mm256_set1_epi32(four);
        }
        for (int i = 0; i < 2; ++i) total[r][i] = Dot::add(total[r][i], row, query[i]);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 2; ++i)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * kPanel + 8 * i), total[r][i]);
}

// Sums of group g: sums[row * kPanel + query].
template <class Dot>
inline void multiply_group(const FilterBlock& block, const FilterPanel& panel, int g, int32_t* sums, Prefetcher& prefetcher) {
  constexpr int R = Dot::rows;
  const uint8_t* rows = block.codes + g * kPanel * block.stride;
  for (int half = 0; half < 2; ++half) {
    const uint32_t* queries = panel.codes + 256 * half;
    const int32_t* offset = panel.offset + 16 * half;
    int r = 0;
    for (; r + R <= kPanel; r += R) {
      prefetcher.turn();  // few lines at a time: they compete with the loads for buffers
      multiply<Dot, R>(rows + r * block.stride, block.stride, block.row_bytes, queries, offset, sums + r * kPanel + 16 * half);
    }
    if constexpr (kPanel % R > 0)
      multiply<Dot, kPanel % R>(rows + r * block.stride, block.stride, block.row_bytes, queries, offset,
                                sums + r * kPanel + 16 * half);
  }
}

// Scores of a row, by its sums, and of eight queries.
inline __m256 to_scores(const int32_t* sums, __m256 row_scale, const float* query_scale) {
  const __m256 sum = _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(sums)));
  return _mm256_mul_ps(_mm256_mul_ps(sum, row_scale), _mm256_loadu_ps(query_scale));
}

template <class Dot, bool Symmetric>
int filter_rows(const FilterBlock& block, const FilterPanel& panel, FilterHit* hits, uint8_t* dense) {
  alignas(64) int32_t sums[kPanel * kPanel];
  Prefetcher prefetcher(block.ahead, block.groups * (2 * (kPanel / Dot::rows)));
  const __m256 slack = _mm256_set1_ps(0x1p-22f);
  int total = 0;
  for (int g = 0; g < block.groups; ++g) {
    multiply_group<Dot>(block, panel, g, sums, prefetcher);
    __m256 margin[4], threshold[4];
    for (int i = 0; i < 4; ++i) {
      const __m256 f = _mm256_loadu_ps(panel.threshold + 8 * i);
      __m256 m = _mm256_fmadd_ps(_mm256_loadu_ps(panel.slope + 8 * i), _mm256_set1_ps(block.group_norm[g]),
                                 _mm256_set1_ps(block.constant));
      m = _mm256_fmadd_ps(_mm256_loadu_ps(panel.lift + 8 * i), _mm256_set1_ps(block.group_error[g]), m);
      margin[i] = m;
      threshold[i] = _mm256_fnmadd_ps(absolute(f), slack, _mm256_sub_ps(f, m));
    }
    int found = 0;
    for (int r = 0; r < kPanel; ++r) {
      const int at = g * kPanel + r;
      const __m256 scale = _mm256_set1_ps(block.scale[at]);
      alignas(32) float scores[kPanel];
      uint32_t mask = 0;
      for (int i = 0; i < 4; ++i) {
        const __m256 score = to_scores(sums + r * kPanel + 8 * i, scale, panel.scale + 8 * i);
        __m256 hit = _mm256_cmp_ps(score, threshold[i], _CMP_NLT_UQ);
        if constexpr (Symmetric) {
          const __m256 most = _mm256_add_ps(score, margin[i]);
          const __m256 bound = _mm256_fmadd_ps(absolute(most), slack, most);
          hit = _mm256_or_ps(hit, _mm256_cmp_ps(bound, _mm256_set1_ps(block.row_threshold[at]), _CMP_NLT_UQ));
        }
        _mm256_store_ps(scores + 8 * i, score);
        mask |= static_cast<uint32_t>(_mm256_movemask_ps(hit)) << (8 * i);
      }
      for (; mask != 0; mask &= mask - 1, ++found) {
        const int q = __builtin_ctz(mask);
        if (found < kDense) hits[total + found] = {static_cast<uint16_t>(q), static_cast<uint16_t>(at), scores[q]};
      }
    }
    dense[g] = found > kDense;
    if (found <= kDense) total += found;
  }
  return total;
}

template <class Dot>
int filter_block(const FilterBlock& block, const FilterPanel& panel, FilterHit* hits, uint8_t* dense) {
  return block.row_threshold == nullptr ? filter_rows<Dot, false>(block, panel, hits, dense)
                                    : filter_rows<Dot, true>(block, panel, hits, dense);
}

template <class Dot>
void raise_maxima(const FilterBlock& block, const FilterPanel& panel, Maxima maxima) {
  alignas(64) int32_t sums[kPanel * kPanel];
  Prefetcher prefetcher(block.ahead, block.groups * (2 * (kPanel / Dot::rows)));
  for (int g = 0; g < block.groups; ++g) {
    multiply_group<Dot>(block, panel, g, sums, prefetcher);
    for (int begin = 0; begin < kPanel; begin += maxima.run) {
      float* best = maxima.turn();
      for (int i = 0; i < 4; ++i) {
        __m256 most = _mm256_loadu_ps(best + 8 * i);
        for (int r = begin; r < begin + maxima.run; ++r) {  // of a NaN and a number, the second operand
          const __m256 scale = _mm256_set1_ps(block.scale[g * kPanel + r]);
          most = _mm256_max_ps(to_scores(sums + r * kPanel + 8 * i, scale, panel.scale + 8 * i), most);
        }
        _mm256_storeu_ps(best + 8 * i, most);
      }
    }
  }
}

void nothing() {}

template <class Dot>
constexpr Filter byte_filter(const char* name) {
  return {name,    1,      encode<FullRange, kByteZero>, encode<typename Dot::Range, 0>, nullptr, filter_block<Dot>,
          raise_maxima<Dot>, nothing, nothing};
}

}  // namespace
}  // namespace tgq
