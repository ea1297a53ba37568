#include "search/cpu/code_queries.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "search/cpu/partitioned_scan.h"

namespace tgq {
namespace {

constexpr std::int64_t kPrepareAtOnce = 32;
constexpr double kLargestNorm = 0x1p60;
constexpr double kInteger = 0x1.8p52;  // added and taken off again: rounds to the nearest integer
constexpr double kUp = 1.0 + 0x1p-20;  // covers what is rounded to fp32, and the rounding of the bound itself

double gamma(double roundings) { return roundings * 0x1p-24 / (1.0 - roundings * 0x1p-24); }

double norm_of(const float* values, std::int64_t size) {
  double squares = 0;
  for (std::int64_t i = 0; i < size; ++i) squares += static_cast<double>(values[i]) * values[i];
  return std::sqrt(squares) * kUp;
}

float up(double value) { return static_cast<float>(value * kUp); }

}  // namespace

bool valid(const Codes& codes, std::int64_t cols) {
  return codes.bytes == nullptr ||
         (codes.lines == ceil_div(cols, kCodeLine) && codes.first_lines > 0 && codes.first_lines <= codes.lines && codes.scale != nullptr &&
          codes.rest != nullptr && codes.mean != nullptr && codes.rotation != nullptr &&
          codes.defect >= 0.0f && codes.defect < 0x1p-10f);
}

CodeRows code_rows(const Codes& codes, std::int64_t group) {
  const std::int64_t row = group * kGroup;
  CodeRows rows{};
  rows.codes = codes.bytes + group * kLineBytes;
  rows.plane_stride = codes.plane_stride;
  rows.lines = codes.first_lines;
  rows.scale = codes.scale + row;
  rows.rest = codes.rest + row;
  if (codes.second != nullptr) rows.second = codes.second + row * codes.first_lines * kCodeLine;
  return rows;
}

QueryCodes::QueryCodes(std::int64_t queries, const Codes& stored)
    : columns(static_cast<std::int64_t>(stored.first_lines) * kCodeLine), codes(static_cast<std::size_t>(round_up(queries, kQueryPanel) * columns)) {
  const auto size = static_cast<std::size_t>(round_up(queries, kQueryPanel));
  std::fill_n(codes.data(), size * static_cast<std::size_t>(columns), std::int8_t{0});
  if (stored.second != nullptr) values.resize(size * static_cast<std::size_t>(columns));
  offset.resize(size);
  for (auto* each : {&unit, &lift, &fine_lift, &reach, &base}) each->resize(size);
}

void QueryCodes::copy(std::int64_t to, const QueryCodes& other, std::int64_t from) {
  const auto t = static_cast<std::size_t>(to), f = static_cast<std::size_t>(from);
  std::copy_n(other.codes.data() + from * columns, columns, codes.data() + to * columns);
  if (!values.empty()) std::copy_n(other.values.begin() + from * columns, columns, values.begin() + to * columns);
  offset[t] = other.offset[f];
  for (auto each : {&QueryCodes::unit, &QueryCodes::lift, &QueryCodes::fine_lift, &QueryCodes::reach, &QueryCodes::base})
    (this->*each)[t] = (other.*each)[f];
}

CodeQueries QueryCodes::view(std::int64_t begin, int count) const {
  const std::int64_t at = begin * columns;
  return {codes.data() + at,    values.empty() ? nullptr : values.data() + at, columns, offset.data() + begin, unit.data() + begin, lift.data() + begin,
          fine_lift.data() + begin, reach.data() + begin, base.data() + begin, nullptr, count};
}

float QueryCodes::margin(std::int64_t q, double scale, double rest, bool second) const {
  const auto i = static_cast<std::size_t>(q);
  return static_cast<float>((second ? fine_lift[i] : lift[i]) * scale + reach[i] * rest);
}

void divide_scales(CodeRows& rows, float* inverse_scale, float* scaled_rest) {
  for (int r = 0; r < rows.groups * kGroup; ++r) {
    const float rest = rows.rest[r], given = rows.scale[r], small = rest * 0x1p-20f;
    const float scale = given > 0.0f ? given : small > 0x1p-100f ? small : 0x1p-100f;  // any will do for codes of zero
    inverse_scale[r] = 1.0f / scale;
    scaled_rest[r] = rest / scale;
  }
  rows.inverse_scale = inverse_scale;
  rows.scaled_rest = scaled_rest;
}

PreparedQueries::PreparedQueries(const ScanPlan& plan, const Codes& codes, bool narrow)
    : plan_(plan), stored_(codes), narrow_(narrow), found_(plan.queries.rows, codes) {}

Status PreparedQueries::prepare(int threads) {
  const Worker worker{[] {}, [] {}};
  return parallel_for(plan_.queries.rows, kPrepareAtOnce, threads, worker,
                      [this](std::int64_t begin, std::int64_t end) { encode(begin, end - begin); });
}

void PreparedQueries::encode(std::int64_t first, std::int64_t count) {
  const std::int64_t width = plan_.width, dims = plan_.pool.cols;
  const RowReader reader(plan_.queries, *plan_.kernels, width);
  const Matrix rotation{stored_.rotation, dims, dims, dims, 1, DType::f32}, mean{stored_.mean, 1, dims, dims, 1, DType::f32};
  const RowReader directions(rotation, *plan_.kernels, width), mean_reader(mean, *plan_.kernels, width);
  const Buffer<float> queries(static_cast<std::size_t>(count * width)), scratch(static_cast<std::size_t>(kPanel * width));
  const std::int64_t padded = static_cast<std::int64_t>(stored_.lines) * kCodeLine, cut = found_.columns;
  const Buffer<float> rotated(static_cast<std::size_t>(count * padded));
  for (std::int64_t i = 0; i < count; ++i) {
    float* query = queries.data() + i * width;
    reader.read_row(first + i, query);
    // All scores of such a query are NaN: nobody asks for its bounds.
    if (std::any_of(query, query + width, [](float v) { return is_nan(v); })) std::fill(query, query + width, 0.0f);
  }
  std::fill(rotated.data(), rotated.data() + count * padded, 0.0f);
  for (std::int64_t d = 0; d < dims; d += kPanel) {
    const auto part = static_cast<int>(std::min<std::int64_t>(kPanel, dims - d));
    std::int64_t stride = 0;
    const float* rows = directions.read(d, part, scratch.data(), &stride);
    plan_.kernels->score_tile(queries.data(), width, static_cast<int>(count), rows, stride, part, width, rotated.data() + d, padded);
  }
  mean_reader.read_row(0, scratch.data());
  const double mean_norm = norm_of(scratch.data(), width);
  const double rounding = gamma(static_cast<double>(dims) / 16.0 + 8.0);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto id = static_cast<std::size_t>(first + i);
    const float* query = queries.data() + i * width;
    const double norm = norm_of(query, width);
    if (!(norm < kLargestNorm)) {  // every pair is scored exactly
      found_.base[id] = std::numeric_limits<float>::infinity();
      continue;
    }
    float centre = 0;
    const float* mean_row = scratch.data();
    plan_.kernels->score_pairs(&query, &mean_row, 1, width, &centre);
    const double rotation_error = rounding * std::sqrt(static_cast<double>(dims)) * (1.0 + stored_.defect) * norm + 0x1p-120;
    const double turning = std::pow(static_cast<double>(dims), 1.5) * 0x1p-51 + 0x1p-45;  // of the rows, in fp64
    const double common = (norm * (stored_.defect + turning + rounding) + rotation_error) * (1.0 + 0x1p-9);
    const float* turned = rotated.data() + i * padded;
    encode_level(first + i, turned, common);
    found_.reach[id] = up(norm_of(turned + cut, padded - cut) + common);
    found_.base[id] = static_cast<float>(centre + 2.0 * rounding * norm * mean_norm * (1.0 + 0x1p-9) + std::fabs(centre) * 0x1p-19 + norm * 0x1p-90 +
                                   (8.0 * static_cast<double>(dims) + 512.0) * 0x1p-126);
  }
}

void PreparedQueries::encode_level(std::int64_t id, const float* values, double common) {
  const std::int64_t columns = found_.columns;
  std::int8_t* codes = found_.codes.data() + id * columns;
  float largest = 0;
  if (narrow_)
    for (std::int64_t d = 0; d < columns; d += 2) largest = std::max(largest, std::fabs(values[d]) + std::fabs(values[d + 1]));
  else
    for (std::int64_t d = 0; d < columns; ++d) largest = std::max(largest, std::fabs(values[d]));
  const float unit = code_scale(largest, kByteLimit), inverse = unit > 0 ? 1.0f / unit : 0.0f;
  double squares = 0;
  std::int32_t sum = 0;
  for (std::int64_t d = 0; d < columns; ++d) {
    const double code = std::min<double>(std::max<double>(values[d] * inverse, -kByteLimit), kByteLimit) + kInteger - kInteger;
    const double lost = values[d] - code * unit;
    codes[d] = static_cast<std::int8_t>(static_cast<int>(code));
    squares += lost * lost;
    sum += codes[d];
  }
  const auto at = static_cast<std::size_t>(id);
  found_.offset[at] = -kByteZero * sum;
  found_.unit[at] = unit;
  // What rounding loses, what the rotation, its defect and the exact score err by, and what evaluating the bound does.
  const double error = std::sqrt(squares) * kUp, norm = norm_of(values, columns);
  const auto lift = [&](int level, double rounding) {
    const double step = stored_.step[level], length = stored_.norm[level];
    return up(norm * step + rounding * length + common * (length + step) + (norm + rounding) * length * 0x1p-20);
  };
  found_.lift[at] = lift(0, error);
  if (found_.values.empty()) return;
  std::copy_n(values, columns, found_.values.data() + id * columns);
  found_.fine_lift[at] = lift(1, norm * gamma(static_cast<double>(columns) + 16.0)) + 0x1p-100f;
}

}  // namespace tgq
