// Codes of rows, made by the core as tgq_fast/search/codes.py has them made.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "search/search.h"
#include "search/selection.h"

namespace tgq {

// A value of magnitude 2^-14 … 2^8 in half precision, cut off; smaller ones become zero.
inline float shorten(double value, std::uint16_t* half) {
  const float near = static_cast<float>(value);
  if (!(std::fabs(near) >= 0x1p-14f)) return *half = 0, 0.0f;
  const std::uint32_t bits = float_bits(near) & 0xffffe000u;
  *half = static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | ((bits >> 13 & 0x3ffffu) - (112u << 10)));
  return bits_float(bits);
}

// I - 2 v vᵀ / vᵀv: orthogonal, and its own inverse.
inline std::vector<double> reflection(std::int64_t d) {
  std::vector<double> v(d), found(d * d);
  double vv = 0;
  for (std::int64_t i = 0; i < d; ++i) v[i] = std::sin(1.0 + static_cast<double>(i)), vv += v[i] * v[i];
  for (std::int64_t i = 0; i < d; ++i)
    for (std::int64_t k = 0; k < d; ++k) found[i * d + k] = (i == k) - 2 * v[i] * v[k] / vv;
  return found;
}

// A pool's codes and the memory they lie in: centred by the mean, reflected (which rotates energy into the first columns for
// rows that share a direction) and skewed, in one level or two.
struct OwnCodes {
  std::vector<float> mean, rotation, scale, rest;
  std::vector<std::uint8_t> bytes;
  std::vector<std::uint16_t> second;
  double fine_step = 0, fine_norm = 0;
  EncodedFacts facts;
  double defect = 0;
  int first_lines, lines;

  explicit OwnCodes(const std::vector<float>& x, std::int64_t d, int first = 1, bool two = true, double skew = 0) {
    const std::int64_t rows = static_cast<std::int64_t>(x.size()) / d, groups = (rows + 15) / 16;
    lines = static_cast<int>((d + 63) / 64);
    first_lines = std::min(first, lines);
    mean.resize(d);
    for (std::int64_t i = 0; i < rows * d; ++i)
      if (std::isfinite(x[i])) mean[i % d] += x[i] / static_cast<float>(rows);
    // Rounded to fp32 nearly orthogonal; skewed it shortens what it turns, so that products in it come out too low.
    const std::vector<double> exact = reflection(d);
    rotation.resize(d * d);
    for (std::int64_t i = 0; i < d; ++i)
      for (std::int64_t k = 0; k < d; ++k)
        rotation[i * d + k] = static_cast<float>((exact[i * d + k] + 0.1 * skew * std::cos(static_cast<double>(3 * i + k))) * (1.0 - 30.0 * skew));
    for (std::int64_t i = 0; i < d; ++i)
      for (std::int64_t k = 0; k < d; ++k) {
        double sum = i == k ? -1.0 : 0.0;
        for (std::int64_t n = 0; n < d; ++n) sum += static_cast<double>(rotation[n * d + i]) * rotation[n * d + k];
        defect += sum * sum;
      }
    defect = std::sqrt(defect) * 1.001 + 1e-12;
    bytes.assign(first_lines * groups * 1024, 128);
    const std::int64_t width = lines * 64, columns = first_lines * 64;
    if (two) second.assign(groups * 16 * columns, 0);
    scale.assign(groups * 16, 0.0f);
    rest.assign(groups * 16, 0.0f);
    std::vector<double> turned(rows * width);
    std::vector<std::uint8_t> coded(rows, 1);
    for (std::int64_t r = 0; r < rows; ++r) {
      double norm = 0;
      for (std::int64_t k = 0; k < d; ++k) norm += std::pow(static_cast<double>(x[r * d + k]) - mean[k], 2);
      coded[r] = std::sqrt(norm) < 0x1p60;
      for (std::int64_t i = 0; i < d && coded[r] != 0; ++i)
        for (std::int64_t k = 0; k < d; ++k) turned[r * width + i] += rotation[i * d + k] * (static_cast<double>(x[r * d + k]) - mean[k]);
    }
    EncodeRequest request{turned.data(), coded.data(), rows, 0, first_lines, lines, 300, bytes.data(), groups * 1024, scale.data(),
                          rest.data()};
    encode_codes(request, facts);
    for (std::int64_t r = 0; r < rows && two; ++r) {
      double lost = 0, squares = 0;
      for (std::int64_t i = 0; i < columns && scale[r] > 0; ++i) {
        const double exact = turned[r * width + i] / scale[r];
        const float kept = shorten(exact, &second[r * columns + i]);
        lost += (exact - kept) * (exact - kept), squares += static_cast<double>(kept) * kept;
      }
      fine_step = std::max(fine_step, std::sqrt(lost) * 1.000001), fine_norm = std::max(fine_norm, std::sqrt(squares) * 1.000001);
    }
  }

  Codes get() const {
    Codes codes;
    codes.bytes = bytes.data();
    codes.plane_stride = static_cast<std::int64_t>(rest.size()) * 64;
    codes.first_lines = first_lines, codes.lines = lines;
    codes.second = second.empty() ? nullptr : second.data();
    codes.scale = scale.data();
    codes.step[0] = static_cast<float>(facts.step), codes.norm[0] = static_cast<float>(facts.norm);
    codes.step[1] = static_cast<float>(fine_step), codes.norm[1] = static_cast<float>(fine_norm);
    codes.rest = rest.data(), codes.mean = mean.data(), codes.rotation = rotation.data();
    codes.defect = static_cast<float>(defect);
    return codes;
  }
};

}  // namespace tgq
