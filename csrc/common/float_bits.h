// The bits of a float, on the host and on a CUDA device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TGQ_HD __host__ __device__
#else
#define TGQ_HD
#endif

namespace tgq {

TGQ_HD inline std::uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

TGQ_HD inline float bits_float(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

TGQ_HD inline bool is_nan(float score) { return (float_bits(score) & 0x7fffffffu) > 0x7f800000u; }

}  // namespace tgq
