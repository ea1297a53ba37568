// AVX2 + FMA + F16C kernels. The sixteen partial sums are two registers of eight.
#if defined(TGQ_X86)
#include "search/cpu/byte_filter_avx2.h"

namespace tgq {
namespace {

// The tree of the fixed-order dot: j + 8, j + 4, j + 2, j + 1.
inline float reduce(__m256 low, __m256 high) {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <int Q, int R>
inline void micro_tile(const float* queries, int64_t query_stride, const float* rows, int64_t row_stride, int64_t width,
                       float* out, int64_t out_stride) {
  __m256 sums[Q][R][2];
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) sums[q][r][0] = sums[q][r][1] = _mm256_setzero_ps();
  for (int64_t d = 0; d < width; d += kLanes)
    for (int half = 0; half < 2; ++half) {
      __m256 query[Q];
      for (int q = 0; q < Q; ++q) query[q] = _mm256_loadu_ps(queries + q * query_stride + d + 8 * half);
      for (int r = 0; r < R; ++r) {
        const __m256 row = _mm256_loadu_ps(rows + r * row_stride + d + 8 * half);
        for (int q = 0; q < Q; ++q) sums[q][r][half] = _mm256_fmadd_ps(query[q], row, sums[q][r][half]);
      }
    }
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) out[q * out_stride + r] = reduce(sums[q][r][0], sums[q][r][1]);
}

void score_tile(const float* queries, int64_t query_stride, int num_queries, const float* rows, int64_t row_stride,
                int num_rows, int64_t width, float* out, int64_t out_stride) {
  int q = 0;
  for (; q + 3 <= num_queries; q += 3) {
    const float* a = queries + q * query_stride;
    float* o = out + q * out_stride;
    int r = 0;
    for (; r + 2 <= num_rows; r += 2) micro_tile<3, 2>(a, query_stride, rows + r * row_stride, row_stride, width, o + r, out_stride);
    for (; r < num_rows; ++r) micro_tile<3, 1>(a, query_stride, rows + r * row_stride, row_stride, width, o + r, out_stride);
  }
  for (; q < num_queries; ++q) {
    const float* a = queries + q * query_stride;
    float* o = out + q * out_stride;
    int r = 0;
    for (; r + 4 <= num_rows; r += 4) micro_tile<1, 4>(a, query_stride, rows + r * row_stride, row_stride, width, o + r, out_stride);
    for (; r < num_rows; ++r) micro_tile<1, 1>(a, query_stride, rows + r * row_stride, row_stride, width, o + r, out_stride);
  }
}

void score_pairs(const float* const* a, const float* const* b, int count, int64_t width, float* out) {
  int i = 0;
  for (; i + 4 <= count; i += 4) {  // four chains hide the latency of the multiply-adds
    __m256 low[4], high[4];
    for (int p = 0; p < 4; ++p) low[p] = high[p] = _mm256_setzero_ps();
    for (int64_t d = 0; d < width; d += kLanes)
      for (int p = 0; p < 4; ++p) {
        low[p] = _mm256_fmadd_ps(_mm256_loadu_ps(a[i + p] + d), _mm256_loadu_ps(b[i + p] + d), low[p]);
        high[p] = _mm256_fmadd_ps(_mm256_loadu_ps(a[i + p] + d + 8), _mm256_loadu_ps(b[i + p] + d + 8), high[p]);
      }
    for (int p = 0; p < 4; ++p) out[i + p] = reduce(low[p], high[p]);
  }
  for (; i < count; ++i) micro_tile<1, 1>(a[i], 0, b[i], 0, width, out + i, 0);
}

int collect(const float* scores, int count, float threshold, const float* thresholds, uint32_t* positions) {
  const __m256 bound = _mm256_set1_ps(threshold);
  int found = 0, i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 value = _mm256_loadu_ps(scores + i);
    __m256 hit = _mm256_cmp_ps(value, bound, _CMP_GE_OQ);
    if (thresholds != nullptr) hit = _mm256_or_ps(hit, _mm256_cmp_ps(value, _mm256_loadu_ps(thresholds + i), _CMP_GE_OQ));
    unsigned mask = static_cast<unsigned>(_mm256_movemask_ps(hit));
    for (; mask != 0; mask &= mask - 1) positions[found++] = static_cast<uint32_t>(i + __builtin_ctz(mask));
  }
  for (; i < count; ++i)
    if (scores[i] >= threshold || (thresholds != nullptr && scores[i] >= thresholds[i])) positions[found++] = static_cast<uint32_t>(i);
  return found;
}

void half_to_float(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < count; ++i) to[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(from[i])));
}

void bfloat_to_float(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_ps(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
  }
  for (; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    __builtin_memcpy(to + i, &bits, sizeof bits);
  }
}

// Without VNNI the products of four elements, d, d + 1, d + 4 and d + 5 for d = 0 and 2 modulo 8, meet in 16 bits. A query's codes
// are scaled so that the magnitudes of such four add up to at most 128: 255 * 128 < 2^15, whatever the row. The 126 leaves
// room for four roundings.
struct FourRange {
  static constexpr int limit = 126;
  static float largest(const float* from, int64_t size) {
    __m256 most = _mm256_setzero_ps();
    for (int64_t d = 0; d < size; d += 8) {
      const __m256 value = absolute(_mm256_loadu_ps(from + d));
      const __m256 two = _mm256_hadd_ps(value, value);
      most = _mm256_max_ps(_mm256_add_ps(two, _mm256_permute2f128_ps(two, two, 1)), most);
    }
    return largest_lane(most);
  }
};

struct Pairs {
  using Range = FourRange;
  static constexpr int rows = 4, words = 2;
  static __m256i add(__m256i sums, const __m256i* rows, const __m256i* queries) {
    const __m256i four = _mm256_add_epi16(_mm256_maddubs_epi16(rows[0], queries[0]), _mm256_maddubs_epi16(rows[1], queries[1]));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(four, _mm256_set1_epi16(1)));
  }
};

}  // namespace

const Filter& avx2_filter() {
  static const Filter filter = byte_filter<Pairs>("avx2");
  return filter;
}

const Kernels& avx2_kernels() {
  static const Kernels kernels{"avx2", score_tile, score_pairs, collect, half_to_float, bfloat_to_float};
  return kernels;
}

}  // namespace tgq
#endif
