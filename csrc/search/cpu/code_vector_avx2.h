// Sixteen rows in two AVX2 registers; what multiplies is the including file's: Dot::add(sums, rows, query) adds to each 32-bit sum
// four products of unsigned and signed bytes.
#pragma once

#include <immintrin.h>

#include "search/cpu/code_filter.h"

namespace tgq {
namespace {  // every kernel file its own copy

template <class Dot>
struct Halves {
  struct Floats {
    __m256 low, high;
  };
  struct Ints {
    __m256i low, high;
  };
  static Floats set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static void store(float* to, Floats v) {
    _mm256_storeu_ps(to, v.low);
    _mm256_storeu_ps(to + 8, v.high);
  }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
  static Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static Floats least(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
  static Floats largest(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  static Floats to_float(Ints v) { return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)}; }
  static uint32_t not_less(Floats a, Floats b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_NLT_UQ))) |
           static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_NLT_UQ))) << 8;
  }
  static float dot_halves(const uint16_t* row, const float* query, int64_t size) {
    __m256 sums[4] = {};
    for (int64_t d = 0; d < size; d += 32)
      for (int i = 0; i < 4; ++i) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + d + 8 * i));
        sums[i] = _mm256_fmadd_ps(_mm256_cvtph_ps(halves), _mm256_loadu_ps(query + d + 8 * i), sums[i]);
      }
    const __m256 all = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  template <int Q>
  static void dot(const uint8_t* group, int64_t plane_stride, int lines, const int8_t* queries, int64_t stride, const int32_t* offset,
                  Ints* sums) {
    for (int q = 0; q < Q; ++q) sums[q] = {_mm256_set1_epi32(offset[q]), _mm256_set1_epi32(offset[q])};
    for (int l = 0; l < lines; ++l, group += plane_stride, queries += 64)
      for (int word = 0; word < 16; ++word) {
        const __m256i* rows = reinterpret_cast<const __m256i*>(group + word * 64);
        const __m256i low = _mm256_loadu_si256(rows), high = _mm256_loadu_si256(rows + 1);
        for (int q = 0; q < Q; ++q) {
          int32_t four;
          __builtin_memcpy(&four, queries + q * stride + 4 * word, sizeof four);
          const __m256i query = _mm256_set1_epi32(four);
          sums[q] = {Dot::add(sums[q].low, low, query), Dot::add(sums[q].high, high, query)};
        }
      }
  }
};

}  // namespace
}  // namespace tgq
