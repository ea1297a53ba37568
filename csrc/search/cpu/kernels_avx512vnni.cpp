// The byte filter of processors with AVX-512 VNNI: one instruction per 64 products.
#if defined(TGQ_X86)
#include <immintrin.h>

#include "search/cpu/kernels.h"

namespace tgq {
namespace {

inline float largest(const float* from, int64_t size) {
  __m512 most = _mm512_setzero_ps();
  for (int64_t d = 0; d < size; d += 16) most = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(from + d)), most);
  return _mm512_reduce_max_ps(most);
}

template <int Zero>
void encode(const float* rows, int64_t row_stride, int num_rows, int64_t width, int64_t row_bytes, uint8_t* codes, float* scale,
            float* norm, float* error) {
  const int padded = (num_rows + kPanel - 1) / kPanel * kPanel;
  const __m128i zero = _mm_set1_epi8(static_cast<char>(Zero));
  for (int r = 0; r < padded; ++r) {
    if (r % 8 == 0)  // ahead, since all of a row waits for its scale
      for (int i = r; i < r + 8; ++i) scale[i] = code_scale(largest(rows + i * row_stride, i < num_rows ? width : 0), kByteLimit);
    const float* from = rows + r * row_stride;
    const int64_t size = r < num_rows ? width : 0;
    const float unit = scale[r];
    const __m512 step = _mm512_set1_ps(unit), inverse = _mm512_set1_ps(unit > 0 ? 1.0f / unit : 0.0f);
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, lost_squares[2] = {squares[0], squares[0]};
    for (int64_t d = 0; d < row_bytes; d += 32)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = d + 16 * half;
        const __m512 value = at < size ? _mm512_loadu_ps(from + at) : _mm512_setzero_ps();
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
        const __m512 count = _mm512_cvtepi32_ps(whole), kept = _mm512_mul_ps(count, step);
        const __m512 lost = _mm512_fnmadd_ps(count, step, value);
        squares[half] = _mm512_fmadd_ps(kept, kept, squares[half]);
        lost_squares[half] = _mm512_fmadd_ps(lost, lost, lost_squares[half]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + r * row_bytes + at),
                         _mm_xor_si128(_mm512_cvtsepi32_epi8(whole), zero));
      }
    norm[r] = norm_upper_bound(_mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])));
    error[r] = norm_upper_bound(_mm512_reduce_add_ps(_mm512_add_ps(lost_squares[0], lost_squares[1])));
  }
}

constexpr int kRows = 8;  // sixteen sums hide the latency of the instruction

// Sums of eight rows and 32 queries: sums[row * kPanel + query].
inline void multiply(const uint8_t* rows, int64_t stride, int64_t row_bytes, const uint32_t* queries, const int32_t* offset,
                     int32_t* sums) {
  __m512i total[kRows][2];
  for (int r = 0; r < kRows; ++r)
    for (int half = 0; half < 2; ++half) total[r][half] = _mm512_loadu_si512(offset + 16 * half);
  for (int64_t line = 0; line < row_bytes; line += kCodeLine, queries += 512)
    for (int word = 0; word < 16; ++word) {
      const __m512i left = _mm512_loadu_si512(queries + 16 * word), right = _mm512_loadu_si512(queries + 256 + 16 * word);
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        __builtin_memcpy(&four, rows + r * stride + line + 4 * word, sizeof four);
        const __m512i row = _mm512_set1_epi32(four);
        total[r][0] = _mm512_dpbusd_epi32(total[r][0], row, left);
        total[r][1] = _mm512_dpbusd_epi32(total[r][1], row, right);
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int half = 0; half < 2; ++half) _mm512_store_si512(sums + r * kPanel + 16 * half, total[r][half]);
}

// Sums of group g: sums[row * kPanel + query].
inline void multiply_group(const FilterBlock& block, const FilterPanel& panel, int g, int32_t* sums, Prefetcher& prefetcher) {
  for (int r = 0; r < kPanel; r += kRows) {
    prefetcher.turn();  // few lines at a time: they compete with the loads for buffers
    multiply(block.codes + (g * kPanel + r) * block.stride, block.stride, block.row_bytes, panel.codes, panel.offset,
             sums + r * kPanel);
  }
}

// Scores of a row, by its sums, and of sixteen queries.
inline __m512 to_scores(const int32_t* sums, const float* row_scale, const float* query_scale) {
  const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
  return _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(*row_scale)), _mm512_loadu_ps(query_scale));
}

template <bool Symmetric>
int filter_rows(const FilterBlock& block, const FilterPanel& panel, FilterHit* hits, uint8_t* dense) {
  alignas(64) int32_t sums[kPanel * kPanel];
  Prefetcher prefetcher(block.ahead, block.groups * (kPanel / kRows));
  const __m512 slack = _mm512_set1_ps(0x1p-22f);
  int total = 0;
  for (int g = 0; g < block.groups; ++g) {
    multiply_group(block, panel, g, sums, prefetcher);
    __m512 margin[2], threshold[2];
    for (int half = 0; half < 2; ++half) {
      const __m512 f = _mm512_loadu_ps(panel.threshold + 16 * half);
      __m512 m = _mm512_fmadd_ps(_mm512_loadu_ps(panel.slope + 16 * half), _mm512_set1_ps(block.group_norm[g]),
                                 _mm512_set1_ps(block.constant));
      m = _mm512_fmadd_ps(_mm512_loadu_ps(panel.lift + 16 * half), _mm512_set1_ps(block.group_error[g]), m);
      margin[half] = m;
      threshold[half] = _mm512_fnmadd_ps(_mm512_abs_ps(f), slack, _mm512_sub_ps(f, m));
    }
    int found = 0;
    for (int r = 0; r < kPanel; ++r) {
      const int at = g * kPanel + r;
      __m512 score[2];
      uint32_t mask = 0;
      for (int half = 0; half < 2; ++half) {
        score[half] = to_scores(sums + r * kPanel + 16 * half, block.scale + at, panel.scale + 16 * half);
        __mmask16 hit = _mm512_cmp_ps_mask(score[half], threshold[half], _CMP_NLT_UQ);
        if constexpr (Symmetric) {
          const __m512 most = _mm512_add_ps(score[half], margin[half]);
          const __m512 bound = _mm512_fmadd_ps(_mm512_abs_ps(most), slack, most);
          hit |= _mm512_cmp_ps_mask(bound, _mm512_set1_ps(block.row_threshold[at]), _CMP_NLT_UQ);
        }
        mask |= static_cast<uint32_t>(hit) << (16 * half);
      }
      if (mask == 0) continue;
      alignas(64) float scores[kPanel];
      _mm512_store_ps(scores, score[0]);
      _mm512_store_ps(scores + 16, score[1]);
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

int filter_block(const FilterBlock& block, const FilterPanel& panel, FilterHit* hits, uint8_t* dense) {
  return block.row_threshold == nullptr ? filter_rows<false>(block, panel, hits, dense) : filter_rows<true>(block, panel, hits, dense);
}

void raise_maxima(const FilterBlock& block, const FilterPanel& panel, Maxima maxima) {
  alignas(64) int32_t sums[kPanel * kPanel];
  Prefetcher prefetcher(block.ahead, block.groups * (kPanel / kRows));
  for (int g = 0; g < block.groups; ++g) {
    multiply_group(block, panel, g, sums, prefetcher);
    for (int begin = 0; begin < kPanel; begin += maxima.run) {
      float* best = maxima.turn();
      for (int half = 0; half < 2; ++half) {
        __m512 most = _mm512_loadu_ps(best + 16 * half);
        for (int r = begin; r < begin + maxima.run; ++r)  // of a NaN and a number, the second operand
          most = _mm512_max_ps(
              to_scores(sums + r * kPanel + 16 * half, block.scale + g * kPanel + r, panel.scale + 16 * half), most);
        _mm512_storeu_ps(best + 16 * half, most);
      }
    }
  }
}

void nothing() {}

}  // namespace

const Filter& avx512vnni_filter() {
  static const Filter filter{"avx512vnni", 1, encode<kByteZero>, encode<0>, nullptr, filter_block, raise_maxima, nothing, nothing};
  return filter;
}

}  // namespace tgq
#endif
