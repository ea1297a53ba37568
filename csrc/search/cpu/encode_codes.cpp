// Codes of rows that are centred and rotated already.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "search/cpu/codes.h"
#include "search/cpu/kernels.h"
#include "search/search.h"

namespace tgq {
namespace {

constexpr double kUp = 1.0 + 0x1p-20;  // covers the roundings of sums in fp64 and the one to fp32
constexpr double kInteger = 0x1.8p52;   // added and taken off again: rounds to the nearest integer
constexpr double kSmallest = 0x1p-100;

double norm_of(const double* values, std::int64_t size) {
  double squares = 0;
  for (std::int64_t d = 0; d < size; ++d) squares += values[d] * values[d];
  return std::sqrt(squares);
}

}  // namespace

void encode_codes(const EncodeRequest& request, EncodedFacts& facts) {
  const std::int64_t size = static_cast<std::int64_t>(request.first_lines) * kCodeLine;
  const std::int64_t width = static_cast<std::int64_t>(request.lines) * kCodeLine;
  for (std::int64_t i = 0; i < request.count; ++i) {
    const double* row = request.turned + i * width;
    const std::int64_t at = request.first_row + i;
    const double inside = norm_of(row, size), beyond = norm_of(row + size, width - size);
    facts.inside += inside * inside;
    facts.energy += inside * inside + beyond * beyond;
    request.rest[at] = request.coded[i] ? static_cast<float>(beyond * kUp) : std::numeric_limits<float>::infinity();
    double largest = 0;
    for (std::int64_t d = 0; d < size; ++d) largest = std::max(largest, std::fabs(row[d]));
    // Rows of many large codes take a larger step: the bound knows of codes no more than the largest norm.
    const double wanted = std::max(largest / kByteLimit, inside / request.spread);
    const float unit = largest > kSmallest ? static_cast<float>(wanted) : 0.0f;
    const double inverse = unit > 0 ? 1.0 / unit : 0.0;
    double lost_squares = 0, code_squares = 0;
    std::uint8_t* packed = request.bytes + at / kGroup * kLineBytes + at % kGroup * 4;
    for (std::int64_t d = 0; d < size; ++d) {
      const double code = std::min<double>(std::max<double>(row[d] * inverse, -kByteLimit), kByteLimit) + kInteger - kInteger;
      const double lost = row[d] - code * unit;
      lost_squares += lost * lost;
      code_squares += code * code;
      packed[d / 64 * request.plane_stride + d % 64 / 4 * 64 + d % 4] = static_cast<std::uint8_t>(static_cast<int>(code) + kByteZero);
    }
    request.scale[at] = unit;
    if (unit == 0) continue;
    facts.step = std::max(facts.step, std::sqrt(lost_squares) / unit * kUp);
    facts.norm = std::max(facts.norm, std::sqrt(code_squares) * kUp);
  }
}

}  // namespace tgq
