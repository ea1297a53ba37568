// A half-precision value in plain C++.
#pragma once

#include <stdint.h>

#include "common/float_bits.h"

namespace tgq {
namespace {  // every kernel file its own copy

inline float half_value(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

}  // namespace
}  // namespace tgq
