// The bounds of stored codes: on every instruction set no pair whose exact score reaches the threshold is lost, by either level, however
// awkward the rows; and with any part of the bound left out some are.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "kernel_sets.h"
#include "own_codes.h"
#include "search/cpu/code_queries.h"
#include "search/cpu/codes.h"
#include "search/cpu/kernels.h"

using namespace tgq;

namespace {

constexpr std::int64_t kQueries = 32, kRows = 64;
constexpr int kKinds = 12;

// 0 random, 1 energy that falls fast, 2 near-equal, 3 zero rows and zero queries, 4 huge norms next to tiny ones, 5 identical rows,
// 6 subnormal, 7 rows and queries that are not finite or too large to code.
constexpr int kRandomKinds = 8;
std::vector<float> random_kind(int kind, std::int64_t rows, std::int64_t width, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> centre(width), x(rows * width);
  for (float& c : centre) c = normal(random);
  for (std::int64_t r = 0; r < rows; ++r) {
    const float size = kind == 4 ? std::ldexp(1.0f, static_cast<int>(random() % 100) - 50) : 1.0f;
    for (std::int64_t d = 0; d < width; ++d) {
      float& value = x[r * width + d];
      value = normal(random) * size;
      if (kind == 1) value *= d < 40 ? 1.0f : 0.02f;
      if (kind == 2) value = centre[d] + 1e-6f * value;
      if (kind == 3 && r % 3 == 0) value = 0.0f;
      if (kind == 5) value = centre[d];
      if (kind == 6) value *= 1e-41f;
    }
    if (kind == 7 && r % 4 == 0)
      x[r * width + r % width] = r % 8 == 0 ? std::numeric_limits<float>::infinity() : r % 16 == 4 ? std::nanf("") : 1e30f;
  }
  return x;
}

// Rows that are, rotated, all the same but for their sign (so that their mean is zero). `half`: codes of them and of 127 are rounded by .49
// all one way; `whole`: they are exact; `beyond`: so are those, and much lies beyond 64 columns.
enum class Shape { half, whole, beyond };
std::vector<float> tight(Shape shape, std::int64_t rows, std::int64_t width, bool signs) {
  std::vector<double> turned(width);
  for (std::int64_t d = 1; d <= 36; ++d) turned[d] = shape == Shape::half ? 10.49 : 1.0;  // 300 / sqrt(36) is a whole number
  if (shape == Shape::half) turned[0] = 127.0;
  for (std::int64_t d = 64; d < width && shape == Shape::beyond; ++d) turned[d] = 0.3;
  const std::vector<double> back = reflection(width);
  std::vector<float> x(rows * width);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i < width; ++i) {
      double sum = 0;
      for (std::int64_t k = 0; k < width; ++k) sum += back[i * width + k] * turned[k];
      x[r * width + i] = static_cast<float>(signs && r % 2 == 1 ? -sum : sum);
    }
  return x;
}

// Then those for which a part of the bound is just what is needed. 8: what rows lose by rounding lies in the direction of the queries, 9: the
// other way round, 10: what lies beyond the first level is parallel, 11: nothing is lost, and only a rotation that is not quite one errs.
std::vector<float> make_rows(int kind, std::int64_t width) {
  if (kind < kRandomKinds) return random_kind(kind, kRows, width, 1);
  return tight(kind == 8 ? Shape::half : kind == 10 ? Shape::beyond : Shape::whole, kRows, width, true);
}

std::vector<float> make_queries(int kind, std::int64_t width) {
  if (kind < kRandomKinds) return random_kind(kind, kQueries, width, 2);
  return tight(kind == 9 ? Shape::half : kind == 10 ? Shape::beyond : Shape::whole, kQueries, width, false);
}

ScanPlan plan_of(const NamedSet& isa, const std::vector<float>& q, const std::vector<float>& x, std::int64_t width) {
  ScanPlan plan;
  plan.queries = {q.data(), kQueries, width, width, 1, DType::f32};
  plan.pool = {x.data(), kRows, width, width, 1, DType::f32};
  plan.kernels = isa.kernels;
  plan.width = (width + kLanes - 1) / kLanes * kLanes;
  return plan;
}

// Of some queries and all rows, the pairs that are lost when the threshold of the query (or, in a self-join, of the row) is their exact score.
int lost(const NamedSet& isa, const std::vector<float>& q, const std::vector<float>& x, std::int64_t width, const Codes& codes, bool symmetric, int count) {
  const ScanPlan plan = plan_of(isa, q, x, width);
  PreparedQueries prepared(plan, codes, isa.code_kernels->narrow);
  CHECK(prepared.prepare(1) == Status::ok);
  std::vector<float> inverse(kRows), ratio(kRows), row_threshold(kRows), threshold(kQueryPanel);
  constexpr std::int64_t kBlock = 2 * kGroup;  // so few that no group is dense
  CodeRows rows{};
  rows.plane_stride = codes.plane_stride;
  rows.group_step = 1;
  rows.groups = kBlock / kGroup;
  rows.lines = codes.first_lines;
  if (symmetric) rows.row_threshold = row_threshold.data();
  CodeQueries queries = prepared.codes().view(0, count);
  queries.threshold = threshold.data();
  std::vector<CodeHit> hits(kRows / kGroup * kDenseGroup + kGroup * kQueryPanel);
  std::vector<std::uint8_t> dense(kRows / kGroup);
  isa.code_kernels->begin();
  int missing = 0;
  for (std::int64_t at = 0; at < kRows; ++at) {
    const std::int64_t first = at / kBlock * kBlock, r = at - first;
    rows.codes = codes.bytes + first / kGroup * kLineBytes;
    rows.scale = codes.scale + first;
    rows.rest = codes.rest + first;
    if (codes.second != nullptr) rows.second = codes.second + first * codes.first_lines * kCodeLine;
    divide_scales(rows, inverse.data(), ratio.data());
    for (int one : {0, count / 2, count - 1}) {
      const float score = fixed_order_dot(q.data() + one * width, x.data() + at * width, width);
      if (std::isnan(score)) continue;
      std::fill(threshold.begin(), threshold.end(), std::numeric_limits<float>::max());
      std::fill(row_threshold.begin(), row_threshold.end(), std::numeric_limits<float>::max());
      (symmetric ? row_threshold[r] : threshold[one]) = score;
      int found = isa.code_kernels->filter(rows, queries, hits.data(), dense.data());
      if (rows.second != nullptr) found = isa.code_kernels->refine(rows, queries, hits.data(), found);
      bool kept = dense[r / kGroup] != 0;
      for (int h = 0; h < found; ++h)
        kept = kept || (hits[h].query == one && hits[h].row == r && !(hits[h].bound < score));
      missing += !kept;
    }
  }
  isa.code_kernels->end();
  return missing;
}

void test_bounds(const NamedSet& isa) {
  for (int kind = 0; kind < kKinds; ++kind)
    for (std::int64_t width : {40, 130})
      for (double skew : {0.0, 1e-6}) {
        if (isa.kernels == &scalar_kernels() && skew > 0) continue;
        const std::vector<float> x = make_rows(kind, width), q = make_queries(kind, width);
        for (int first : {1, 3})
          for (bool second : {false, true}) {
            const OwnCodes codes(x, width, first, second, skew);
            for (bool symmetric : {false, true})
              for (int count : {3, 12, 32})  // the matrix unit takes 12 and more
                CHECK_NOTE(lost(isa, q, x, width, codes.get(), symmetric, count) == 0, "%s, kind %d, %d columns, first %d, second %d, skew %g, symmetric %d, %d queries",
                           isa.name, kind, static_cast<int>(width), first, second, skew, symmetric, count);
          }
      }
}

// Each part of the bound is needed: without it some kind of rows loses pairs.
void test_parts(const NamedSet& isa) {
  const auto without = [&](int kind, int first, double skew, auto change) {
    const std::vector<float> x = make_rows(kind, 130), q = make_queries(kind, 130);
    OwnCodes own(x, 130, first, false, skew);
    Codes codes = own.get();
    change(own, codes);
    return lost(isa, q, x, 130, codes, false, 32);
  };
  CHECK(without(0, 3, 0, [](OwnCodes&, Codes& c) { c.step[0] = c.norm[0] = 0; }) > 0);
  CHECK(without(1, 1, 0, [](OwnCodes& own, Codes&) { std::fill(own.rest.begin(), own.rest.end(), 0.0f); }) > 0);
  const auto moved = [&](float by) { return without(0, 3, 0, [by](OwnCodes& own, Codes&) { own.mean[0] += by; }); };
  CHECK(moved(10.0f) + moved(-10.0f) > 0);
  CHECK(without(0, 3, 0, [](OwnCodes& own, Codes&) { std::fill_n(own.rotation.begin(), 130 * 40, 0.0f); }) > 0);
}

}  // namespace

int main(int argc, char** argv) {  // of one instruction set, if named
  for (const NamedSet& isa : kernel_sets()) {
    if (argc > 1 && std::string(isa.name) != argv[1]) continue;
    test_bounds(isa);
    test_parts(isa);
    std::printf("codes %s: all passed\n", isa.name);
  }
}
