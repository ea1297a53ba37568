// Hits that were put off: the k best come out whatever errors within the margin the filter made, and few rows are read.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/settle.h"

using namespace tgq;

namespace {

constexpr std::int64_t kRows = 600, kWidth = 48;
constexpr std::uint32_t kBest = 20;

struct Setting {
  std::vector<float> query, pool;
  std::vector<std::int64_t> exclude;
  ScanPlan plan;
};

Setting make(bool exclusions) {
  Setting s;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  s.query.resize(kWidth);
  s.pool.resize(kRows * kWidth);
  for (auto* values : {&s.query, &s.pool})
    for (float& v : *values) v = normal(random);
  for (std::int64_t d = 0; d < kWidth; ++d) s.pool[9 * kWidth + d] = s.pool[400 * kWidth + d] = s.query[d];  // the best two tie
  s.pool[11 * kWidth] = std::nanf("");
  if (exclusions) s.exclude = {400, -1};
  s.plan.queries = {s.query.data(), 1, kWidth, kWidth, 1, DType::f32};
  s.plan.pool = {s.pool.data(), kRows, kWidth, kWidth, 1, DType::f32};
  s.plan.exclude = exclusions ? s.exclude.data() : nullptr;
  s.plan.exclude_width = exclusions ? 2 : 0;
  s.plan.k = kBest;
  s.plan.kernels = &scalar_kernels();
  s.plan.width = kWidth;
  return s;
}

std::vector<Key> define(const Setting& s) {
  std::vector<Key> keys;
  for (std::int64_t r = 0; r < kRows; ++r) {
    if (is_excluded(s.plan, 0, r)) continue;
    const Key key = make_key(fixed_order_dot(s.query.data(), s.pool.data() + r * kWidth, kWidth), static_cast<std::uint32_t>(r));
    if (key != kNoKey) keys.push_back(key);
  }
  std::sort(keys.begin(), keys.end(), std::greater<Key>());
  keys.resize(kBest);
  return keys;
}

// Errors as large as the margin allows: 0 none, 1 random, 2 the best rows look worst, 3 no score at all.
std::vector<Key> settle(const Setting& s, int errors, float margin, std::int64_t* read, float believed) {
  const std::vector<Key> best = define(s);
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(-0.999f, 0.999f);
  std::vector<Pending> pending;
  for (std::int64_t r = 0; r < kRows; ++r) {
    const float exact = fixed_order_dot(s.query.data(), s.pool.data() + r * kWidth, kWidth);
    const bool good = std::isnan(exact) || make_key(exact, static_cast<std::uint32_t>(r)) >= best.back();
    float seen = exact + (errors == 1 ? uniform(random) : errors == 2 ? (good ? -0.999f : 0.999f) : 0.0f) * margin;
    if (errors == 3) seen = std::nanf("");
    pending.push_back({seen, static_cast<std::uint32_t>(r)});
  }
  std::shuffle(pending.begin(), pending.end(), random);
  std::vector<Key> keys(kBest + 5);
  Candidates found{keys.data(), kBest + 5, kBest, 0, kNoKey};
  Settler settler(s.plan);
  *read = settler.settle(s.query.data(), 0, believed, pending.data(), static_cast<std::uint32_t>(pending.size()), found);
  found.compact();
  keys.resize(found.count);
  std::sort(keys.begin(), keys.end(), std::greater<Key>());
  return keys;
}

void test_answers() {
  for (bool exclusions : {false, true}) {
    const Setting s = make(exclusions);
    const std::vector<Key> expected = define(s);
    for (int errors = 0; errors < 4; ++errors)
      for (float margin : {0.0f, 0.5f, 4.0f, INFINITY, std::nanf("")}) {
        std::int64_t read = 0;
        const float size = std::isfinite(margin) ? margin : 4.0f;
        CHECK_NOTE(settle(s, errors, size, &read, margin) == expected, "errors %d margin %g", errors, margin);
        CHECK(read <= kRows && read >= kBest);
        if (!std::isfinite(margin) || errors == 3) CHECK(read == kRows);
        if (margin == 0.5f && errors < 2) CHECK_NOTE(read < 3 * kBest, "%d", static_cast<int>(read));
      }
  }
}

// A margin that is too small loses rows: the check above can fail.
void test_small_margin() {
  const Setting s = make(false);
  std::int64_t read = 0;
  CHECK(settle(s, 2, 8.0f, &read, 1.0f) != define(s));
}

}  // namespace

int main() {
  test_answers();
  test_small_margin();
  std::puts("settle: all passed");
}
