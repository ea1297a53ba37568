// The margin of the tensor-core filter: how far a filter score can lie from the exact one. docs/topk_cuda.md proves it.
//
// With q~, x~ the rounded query and row, dq = q - q~, dx = x - x~:
//
//     |q.x - q~.x~| <= |dq| |x~| + |q| |dx|        (vectors' norms, exact arithmetic)
//
// plus the rounding of the two sums. `norm_bound` takes computed norms up, so that the fp32 arithmetic of the margin
// itself cannot undercut it.
#pragma once

#include <cmath>
#include <cstdint>

#include "search/selection.h"

namespace tgq::cuda {

// Relative errors of the two sums with respect to the product of the norms, and what underflow can add.
struct Margin {
  float filter_error;
  float exact_error;
  float absolute;
};

// A tensor core adds b >= 4 exact products and the running sum in one step: it aligns them to the largest, cuts each off
// below 2^-23 of the largest, and cuts the result off once more. A step so loses at most (b + 2) 2^-23 of the product of
// the norms; D / b steps lose at most 3 D 2^-24, and 4 D + 64 leaves room for the second order.
inline Margin margin_for(std::int64_t dimensions) {
  const auto relative = [](double roundings) { return roundings * 0x1p-24 / (1.0 - roundings * 0x1p-24) * 1.01; };
  const auto d = static_cast<double>(dimensions);
  return {static_cast<float>(relative(4.0 * d + 64)), static_cast<float>(relative(d / 16.0 + 8)),
          static_cast<float>((8.0 * d + 512) * 0x1p-126)};
}

// Upper bound of a norm from its fp32 sum of squares. 2^-10 covers the rounding of the sum for D up to 2^17 and of the
// margin; 2^-64 covers squares that underflow, and matrix units that read denormal operands as zero. Where a product of
// two norms could overflow the bound is infinite and everything passes.
TGQ_HD inline float norm_bound(float squares) {
  if (!(squares < 0x1p120f)) return bits_float(0x7f800000u);
  return sqrtf(squares) * (1.0f + 0x1p-10f) + 0x1p-64f;
}

// Terms of the margin that depend on the query: norm of q~ and of dq, both bounds.
TGQ_HD inline float margin_slope(const Margin& m, float norm, float error) {
  return error + m.exact_error * (norm + error) + m.filter_error * norm;
}
TGQ_HD inline float margin_lift(const Margin& m, float norm, float error) { return (norm + error) * (1.0f + m.exact_error); }

// What a filter score is compared with: a pair is dropped only when score < threshold. `norm` and `error` bound |x~| and
// |dx| of every row that it is used for. NaN (an infinite margin) drops nothing. An infinite threshold without one drops
// every row: the last term must not turn it into NaN.
TGQ_HD inline float filter_threshold(float threshold, float slope, float lift, float absolute, float norm, float error) {
  const float margin = slope * norm + lift * error + absolute;
  return threshold - margin - fminf(fabsf(threshold), 0x1.fffffep127f) * 0x1p-22f;
}

}  // namespace tgq::cuda
