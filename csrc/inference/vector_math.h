// AVX-512 helpers of the inference kernels. Only for files compiled with those flags.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace tgq {
namespace {  // every kernel file its own copy

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 widen(__m256i bfloats) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloats), 16)); }

// 16 values at index i of an array of fp32 or bf16; zero where the mask is.
inline __m512 load16(const void* from, int64_t i, bool bfloat, __mmask16 mask = 0xffff) {
  if (!bfloat) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(from) + i);
  return widen(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from) + i));
}

inline void store16(void* to, int64_t i, bool bfloat, __m512 value, __mmask16 mask = 0xffff) {
  if (!bfloat) {
    _mm512_mask_storeu_ps(static_cast<float*>(to) + i, mask, value);
  } else {
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + i, mask, rounded);
  }
}

// 32 values as bf16 numbers that add up to them: one, or kFloatParts.
template <int Parts>
inline void split(__m512 low, __m512 high, __m512i* parts) {
  for (int p = 0; p < Parts; ++p) {
    parts[p] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    if (p + 1 == Parts) break;
    low = _mm512_sub_ps(low, widen(_mm512_castsi512_si256(parts[p])));
    high = _mm512_sub_ps(high, widen(_mm512_extracti64x4_epi64(parts[p], 1)));
  }
}

// 2^x for x <= 128; 0 below -150. Relative error below 2e-7 (polynomial 1e-8).
inline __m512 exp2_of(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // in this order NaN stays, and -inf has no fraction to be NaN
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);  // -0.5 … 0.5
  __m512 p = _mm512_set1_ps(1.5403530393381608e-4f);
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.3333558146428443e-3f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(9.618129107628477e-3f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(5.550410866482158e-2f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(2.402265069591007e-1f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(6.931471805599453e-1f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// x Φ(x) with Φ(-t) = 2^p(t): max(x, 0) - t 2^p(t), t = |x|. Absolute error below 4e-8 max(1, |x|); Φ is zero from t = 9 on.
inline __m512 gelu(__m512 x) {
  const __m512 t = _mm512_abs_ps(x);
  __m512 p = _mm512_set1_ps(3.053299906241591e-07f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-6.581887191714486e-06f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(5.7531440688762814e-05f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.0002304210065631196f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-8.006463758647442e-05f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.007027224637567997f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.05248776450753212f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.4592075049877167f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.151105523109436f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.0f));
  // Not less-than, so that NaN takes the product and stays.
  const __mmask16 near = _mm512_cmp_ps_mask(t, _mm512_set1_ps(9.0f), _CMP_NGE_UQ);
  const __m512 tail = _mm512_maskz_mul_ps(near, t, exp2_of(p));
  return _mm512_sub_ps(_mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps()), tail);
}

}  // namespace
}  // namespace tgq
