// AVX-512 kernels. The sixteen partial sums of the fixed-order dot are one register.
#if defined(TGQ_X86)
#include <immintrin.h>

#include "search/cpu/kernels.h"

namespace tgq {
namespace {

// One level of the tree for two vectors at a time: adds the halves of `a` and of `b` that `swap` exchanges.
inline __m512 fold(__m512 a, __m512 b, __mmask16 from_b, __m512i swap) {
  return _mm512_add_ps(_mm512_mask_blend_ps(from_b, a, b), _mm512_permutex2var_ps(a, swap, b));
}

// Lane i of the result is the tree sum (j + 8, j + 4, j + 2, j + 1) of sums[i].
inline __m512 reduce16(const __m512* sums) {
  const __m512i swap8 = _mm512_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
  const __m512i swap4 = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  const __m512i swap2 = _mm512_setr_epi32(2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
  const __m512i swap1 = _mm512_setr_epi32(1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
  __m512 eight[8], four[4], two[2];
  for (int i = 0; i < 8; ++i) eight[i] = fold(sums[i], sums[i + 8], 0xFF00, swap8);
  for (int i = 0; i < 4; ++i) four[i] = fold(eight[i], eight[i + 4], 0xF0F0, swap4);
  for (int i = 0; i < 2; ++i) two[i] = fold(four[i], four[i + 2], 0xCCCC, swap2);
  return fold(two[0], two[1], 0xAAAA, swap1);
}

inline float reduce(__m512 sums) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Four queries by four rows: sixteen accumulators, reduced together.
inline void tile_4x4(const float* queries, int64_t query_stride, const float* rows, int64_t row_stride, int64_t width,
                     float* out, int64_t out_stride) {
  __m512 sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t d = 0; d < width; d += kLanes) {
    __m512 query[4];
    for (int q = 0; q < 4; ++q) query[q] = _mm512_loadu_ps(queries + q * query_stride + d);
    for (int r = 0; r < 4; ++r) {
      const __m512 row = _mm512_loadu_ps(rows + r * row_stride + d);
      for (int q = 0; q < 4; ++q) sums[4 * q + r] = _mm512_fmadd_ps(query[q], row, sums[4 * q + r]);
    }
  }
  const __m512 scores = reduce16(sums);
  _mm_storeu_ps(out, _mm512_castps512_ps128(scores));
  _mm_storeu_ps(out + out_stride, _mm512_extractf32x4_ps(scores, 1));
  _mm_storeu_ps(out + 2 * out_stride, _mm512_extractf32x4_ps(scores, 2));
  _mm_storeu_ps(out + 3 * out_stride, _mm512_extractf32x4_ps(scores, 3));
}

// One query by sixteen rows, for narrow query sets: the rows stream through once.
inline void tile_1x16(const float* query, const float* rows, int64_t row_stride, int64_t width, float* out) {
  __m512 sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t d = 0; d < width; d += kLanes) {
    const __m512 q = _mm512_loadu_ps(query + d);
    for (int r = 0; r < 16; ++r) sums[r] = _mm512_fmadd_ps(q, _mm512_loadu_ps(rows + r * row_stride + d), sums[r]);
  }
  _mm512_storeu_ps(out, reduce16(sums));
}

inline float dot(const float* a, const float* b, int64_t width) {
  __m512 sums = _mm512_setzero_ps();
  for (int64_t d = 0; d < width; d += kLanes) sums = _mm512_fmadd_ps(_mm512_loadu_ps(a + d), _mm512_loadu_ps(b + d), sums);
  return reduce(sums);
}

void score_tile(const float* queries, int64_t query_stride, int num_queries, const float* rows, int64_t row_stride,
                int num_rows, int64_t width, float* out, int64_t out_stride) {
  const int whole_rows = num_rows / 4 * 4, whole_queries = num_queries / 4 * 4;
  // Four rows stay in the first-level cache while the queries pass by.
  for (int r = 0; r < whole_rows; r += 4)
    for (int q = 0; q < whole_queries; q += 4)
      tile_4x4(queries + q * query_stride, query_stride, rows + r * row_stride, row_stride, width,
               out + q * out_stride + r, out_stride);
  for (int q = 0; q < whole_queries; ++q)
    for (int r = whole_rows; r < num_rows; ++r)
      out[q * out_stride + r] = dot(queries + q * query_stride, rows + r * row_stride, width);
  for (int q = whole_queries; q < num_queries; ++q) {
    const float* query = queries + q * query_stride;
    int r = 0;
    for (; r + 16 <= num_rows; r += 16) tile_1x16(query, rows + r * row_stride, row_stride, width, out + q * out_stride + r);
    for (; r < num_rows; ++r) out[q * out_stride + r] = dot(query, rows + r * row_stride, width);
  }
}

void score_pairs(const float* const* a, const float* const* b, int count, int64_t width, float* out) {
  int i = 0;
  for (; i + 4 <= count; i += 4) {  // four chains hide the latency of the multiply-adds
    __m512 sums[4];
    for (int p = 0; p < 4; ++p) sums[p] = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += kLanes)
      for (int p = 0; p < 4; ++p)
        sums[p] = _mm512_fmadd_ps(_mm512_loadu_ps(a[i + p] + d), _mm512_loadu_ps(b[i + p] + d), sums[p]);
    for (int p = 0; p < 4; ++p) out[i + p] = reduce(sums[p]);
  }
  for (; i < count; ++i) out[i] = dot(a[i], b[i], width);
}

int collect(const float* scores, int count, float threshold, const float* thresholds, uint32_t* positions) {
  const __m512 bound = _mm512_set1_ps(threshold);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int found = 0, i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 value = _mm512_loadu_ps(scores + i);
    __mmask16 hit = _mm512_cmp_ps_mask(value, bound, _CMP_GE_OQ);
    if (thresholds != nullptr) hit |= _mm512_cmp_ps_mask(value, _mm512_loadu_ps(thresholds + i), _CMP_GE_OQ);
    if (hit == 0) continue;
    _mm512_mask_compressstoreu_epi32(positions + found, hit, _mm512_add_epi32(lane, _mm512_set1_epi32(i)));
    found += __builtin_popcount(hit);
  }
  for (; i < count; ++i)
    if (scores[i] >= threshold || (thresholds != nullptr && scores[i] >= thresholds[i])) positions[found++] = static_cast<uint32_t>(i);
  return found;
}

void half_to_float(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  for (; i < count; ++i) to[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(from[i])));
}

void bfloat_to_float(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    _mm512_storeu_ps(to + i, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  }
  for (; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    __builtin_memcpy(to + i, &bits, sizeof bits);
  }
}

}  // namespace

const Kernels& avx512_kernels() {
  static const Kernels kernels{"avx512", score_tile, score_pairs, collect, half_to_float, bfloat_to_float};
  return kernels;
}

}  // namespace tgq
#endif
