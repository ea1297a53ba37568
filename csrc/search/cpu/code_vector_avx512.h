// Sixteen rows in one AVX-512 register.
#pragma once

#include <immintrin.h>

#include "search/cpu/code_filter.h"

namespace tgq {
namespace {  // every kernel file its own copy

struct Wide {
  using Floats = __m512;
  using Ints = __m512i;
  static Floats set(float v) { return _mm512_set1_ps(v); }
  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats largest(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
  static uint32_t not_less(Floats a, Floats b) { return _cvtmask16_u32(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ)); }
  // Hits of the lanes in `mask`, one after another; up to sixteen are written.
  static void put(CodeHit* to, uint32_t mask, Floats bound, int query, int first_row) {
    const __m512i lanes = _mm512_setr_epi32(0, 1 << 16, 2 << 16, 3 << 16, 4 << 16, 5 << 16, 6 << 16, 7 << 16, 8 << 16, 9 << 16, 10 << 16,
                                            11 << 16, 12 << 16, 13 << 16, 14 << 16, 15 << 16);
    const __m512i all = _mm512_add_epi32(lanes, _mm512_set1_epi32(first_row << 16 | query));
    const auto chosen = _cvtu32_mask16(mask);
    const __m512i pair = _mm512_maskz_compress_epi32(chosen, all), bounds = _mm512_castps_si512(_mm512_maskz_compress_ps(chosen, bound));
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi32(pair, low, bounds));
    if (__builtin_popcount(mask) <= 8) return;
    _mm512_storeu_si512(to + 8, _mm512_permutex2var_epi32(pair, _mm512_add_epi32(low, _mm512_set1_epi32(8)), bounds));
  }
  static float dot_halves(const uint16_t* row, const float* query, int64_t size) {
    __m512 sums[4] = {};
    for (int64_t d = 0; d < size; d += 64)
      for (int i = 0; i < 4; ++i) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d + 16 * i));
        sums[i] = _mm512_fmadd_ps(_mm512_cvtph_ps(halves), _mm512_loadu_ps(query + d + 16 * i), sums[i]);
      }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
  }
  template <int Q>
  static void dot(const uint8_t* group, int64_t plane_stride, int lines, const int8_t* queries, int64_t stride, const int32_t* offset,
                  Ints* sums) {
    constexpr int kChains = Q == 1 ? 4 : 2;  // hide the latency of the instruction
    Ints part[Q][kChains];
    for (int q = 0; q < Q; ++q) {
      part[q][0] = _mm512_set1_epi32(offset[q]);
      for (int i = 1; i < kChains; ++i) part[q][i] = _mm512_setzero_si512();
    }
    for (int l = 0; l < lines; ++l, group += plane_stride, queries += 64)
      for (int word = 0; word < 16; word += kChains)
        for (int i = 0; i < kChains; ++i) {
          const Ints rows = _mm512_loadu_si512(group + (word + i) * 64);
          for (int q = 0; q < Q; ++q) {
            int32_t four;
            __builtin_memcpy(&four, queries + q * stride + 4 * (word + i), sizeof four);
            part[q][i] = _mm512_dpbusd_epi32(part[q][i], rows, _mm512_set1_epi32(four));
          }
        }
    for (int q = 0; q < Q; ++q) {
      sums[q] = part[q][0];
      for (int i = 1; i < kChains; ++i) sums[q] = _mm512_add_epi32(sums[q], part[q][i]);
    }
  }
};

}  // namespace
}  // namespace tgq
