// Queries as the code filter reads them, all of a search prepared once.
#pragma once

#include <cstdint>
#include <vector>

#include "search/cpu/buffer.h"
#include "search/cpu/codes.h"
#include "search/cpu/scanner.h"
#include "search/search.h"

namespace tgq {

// Codes of some queries, one after another, with room for whole panels.
class QueryCodes {
 public:
  QueryCodes(std::int64_t queries, const Codes& stored);
  void copy(std::int64_t to, const QueryCodes& other, std::int64_t from);
  // Queries [begin, begin + count) for a kernel, without thresholds; `begin` is a multiple of kQueryPanel.
  CodeQueries view(std::int64_t begin, int count) const;
  // By how much the first (or second) level's bound lies above its estimate, for a row of this scale and rest.
  float margin(std::int64_t q, double scale, double rest, bool second) const;

  std::int64_t columns;  // of the first level
  Buffer<std::int8_t> codes;  // a query begins with a cache line, or a tile's loads would touch two for each
  std::vector<float> values;  // of the rotated queries; nothing without a second level
  std::vector<std::int32_t> offset;
  std::vector<float> unit, lift, fine_lift, reach, base;
};

// Whether codes can be those of rows of so many columns. None are fine; a rotation further from orthogonal than that would make bounds useless,
// not wrong.
bool valid(const Codes& codes, std::int64_t cols);

// Stored codes from a group on, for a kernel.
CodeRows code_rows(const Codes& codes, std::int64_t group);

// What the kernels need of a block's scales, for rows.groups whole groups.
void divide_scales(CodeRows& rows, float* inverse_scale, float* scaled_rest);

class PreparedQueries {
 public:
  // Rotates and encodes all queries of `plan`, on some threads.
  PreparedQueries(const ScanPlan& plan, const Codes& codes, bool narrow);
  Status prepare(int threads);

  const QueryCodes& codes() const { return found_; }

 private:
  void encode(std::int64_t first, std::int64_t count);
  // The first level's columns of a rotated query; `common` is what its bounds have to add per norm of a row.
  void encode_level(std::int64_t id, const float* values, double common);

  const ScanPlan& plan_;
  const Codes& stored_;
  bool narrow_;
  QueryCodes found_;
};

}  // namespace tgq
