// Elements of the stored types, and the fixed-order fp32 dot that the CPU returns, split over sixteen lanes.
#pragma once

#include <cstdint>
#include <cmath>

#include "search/search.h"
#include "search/selection.h"

namespace tgq::cuda {

constexpr std::uint32_t kLanes = 16;

struct F32 {
  using Stored = float;
  TGQ_HD static float value(Stored v) { return v; }
};

struct BF16 {
  using Stored = std::uint16_t;
  TGQ_HD static float value(Stored bits) { return bits_float(static_cast<std::uint32_t>(bits) << 16); }
};

struct F16 {
  using Stored = std::uint16_t;
  TGQ_HD static float value(Stored half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    const std::uint32_t exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
    if (exponent == 31) return bits_float(sign | 0x7f800000u | (fraction << 13));
    if (exponent == 0) {
      const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
      return sign ? -magnitude : magnitude;
    }
    return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
  }
};

// Calls body(F32 | F16 | BF16) for the type: the choice is made once, outside of loops.
template <class Body>
TGQ_HD void with_type(DType dtype, Body body) {
  if (dtype == DType::f32) body(F32{});
  else if (dtype == DType::f16) body(F16{});
  else body(BF16{});
}

// Round to nearest, ties to even; NaN stays NaN.
TGQ_HD inline std::uint16_t round_to_bf16(float value) {
  const std::uint32_t bits = float_bits(value);
  if (is_nan(value)) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Partial sum `lane` of the fixed-order dot: elements lane, lane + 16, … in rising order. `a` is dense.
template <class Type>
TGQ_HD float lane_sum(const float* a, const typename Type::Stored* b, std::int64_t b_stride, std::int64_t size,
                      std::uint32_t lane) {
  float sum = 0.0f;
#if defined(__CUDA_ARCH__)
#pragma unroll 8
#endif
  for (std::int64_t d = lane; d < size; d += kLanes) sum = fmaf(a[d], Type::value(b[d * b_stride]), sum);
  return sum;
}

// The tree that adds the sixteen partial sums: (j, j + 8), then 4, 2, 1. Addition commutes, so a butterfly of shuffles
// gives the same bits.
inline float add_lanes(float* sums) {
  for (std::uint32_t half = kLanes / 2; half > 0; half /= 2)
    for (std::uint32_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}
#if defined(__CUDACC__)
__device__ inline float add_lanes(float sum) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance, kLanes);
  return sum;
}
#endif

}  // namespace tgq::cuda
