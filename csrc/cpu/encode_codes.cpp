// Codes of rows that are centred and rotated already.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/codes.h"
#include "cpu/kernels.h"
#include "tgq/search.h"

namespace tgq {
namespace {

constexpr double kUp = 1.0 + 0x1p-20;  // covers the roundings of sums in fp64 and the one to fp32
constexpr double kSmallest = 0x1p-100;

double norm_of(const double* values, std::int64_t size) {
  double squares = 0;
  for (std::int64_t d = 0; d < size; ++d) squares += values[d] * values[d];
  return std::sqrt(squares);
}

}  // namespace

void encode_codes(const EncodeRequest& request, EncodedFacts& facts) {
  const std::int64_t first_size = static_cast<std::int64_t>(request.first_lines) * kCodeLine;
  const std::int64_t rest_size = static_cast<std::int64_t>(request.lines) * kCodeLine - first_size;
  const int levels = request.second == nullptr ? 1 : 2;
  for (std::int64_t i = 0; i < request.count; ++i) {
    const double* row = request.turned + i * (first_size + rest_size);
    const std::int64_t at = request.first_row + i;
    const double beyond = norm_of(row + first_size, rest_size);
    request.rest[at] = request.coded[i] ? static_cast<float>(beyond * kUp) : std::numeric_limits<float>::infinity();
    for (int level = 0; level < levels; ++level) {
      const double* values = level == 0 ? row : row + first_size;
      const std::int64_t size = level == 0 ? first_size : rest_size;
      double largest = 0;
      for (std::int64_t d = 0; d < size; ++d) largest = std::max(largest, std::fabs(values[d]));
      const double length = level == 0 ? norm_of(values, size) : beyond;
      // Rows of many large codes take a larger step: the bound knows of codes no more than the largest norm.
      const double wanted = std::max(largest / kByteLimit, length / request.spread[level]);
      const float unit = largest > kSmallest ? static_cast<float>(wanted) : 0.0f;
      const double inverse = unit > 0 ? 1.0 / unit : 0.0;
      double lost_squares = 0, code_squares = 0;
      std::uint8_t* plain = level == 0 ? nullptr : request.second + at * rest_size;
      std::uint8_t* packed = request.bytes + at / kGroup * kLineBytes + at % kGroup * 4;
      for (std::int64_t d = 0; d < size; ++d) {
        const double code = std::min<double>(std::max<double>(std::nearbyint(values[d] * inverse), -kByteLimit), kByteLimit);
        const double lost = values[d] - code * unit;
        lost_squares += lost * lost;
        code_squares += code * code;
        const auto byte = static_cast<std::uint8_t>(static_cast<int>(code) + kByteZero);
        if (plain != nullptr) plain[d] = byte;
        else packed[d / 64 * request.plane_stride + d % 64 / 4 * 64 + d % 4] = byte;
      }
      request.scale[level][at] = level == 1 && !request.coded[i] ? std::numeric_limits<float>::infinity() : unit;
      if (unit == 0) continue;
      facts.step[level] = std::max(facts.step[level], std::sqrt(lost_squares) / unit * kUp);
      facts.norm[level] = std::max(facts.norm[level], std::sqrt(code_squares) * kUp);
    }
    const double inside = norm_of(row, first_size);
    facts.inside += inside * inside;
    facts.energy += inside * inside + beyond * beyond;
  }
}

}  // namespace tgq
