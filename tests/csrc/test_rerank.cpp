// Hits that were put off: the k best come out however far the bounds lie above the scores, and few rows are read.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "check.h"
#include "search/cpu/rerank.h"

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

// Bounds above the scores by: 0 nothing, 1 random amounts, 2 most where it misleads most, 3 infinite or NaN; `missing` is taken off,
// which no bound allows.
std::vector<Key> rerank(const Setting& s, int slack, float most, std::int64_t* read, float missing = 0.0f) {
  const std::vector<Key> best = define(s);
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  std::vector<Pending> pending;
  for (std::int64_t r = 0; r < kRows; ++r) {
    const float exact = fixed_order_dot(s.query.data(), s.pool.data() + r * kWidth, kWidth);
    const bool good = std::isnan(exact) || make_key(exact, static_cast<std::uint32_t>(r)) >= best.back();
    float bound = exact + (slack == 1 ? uniform(random) : slack == 2 && !good ? 1.0f : 0.0f) * most - (good ? missing : 0.0f);
    if (slack == 3) bound = r % 2 == 0 ? std::nanf("") : INFINITY;
    pending.push_back({bound, static_cast<std::uint32_t>(r)});
  }
  std::shuffle(pending.begin(), pending.end(), random);
  std::vector<Key> keys(kBest + 5);
  Candidates found{keys.data(), kBest + 5, kBest, 0, kNoKey};
  Reranker reranker(s.plan);
  *read = reranker.rerank(s.query.data(), 0, pending.data(), static_cast<std::uint32_t>(pending.size()), found);
  found.compact();
  keys.resize(found.count);
  std::sort(keys.begin(), keys.end(), std::greater<Key>());
  return keys;
}

void test_answers() {
  for (bool exclusions : {false, true}) {
    const Setting s = make(exclusions);
    const std::vector<Key> expected = define(s);
    for (int slack = 0; slack < 4; ++slack)
      for (float most : {0.0f, 0.5f, 4.0f, INFINITY}) {
        if (std::isinf(most) && slack == 1) continue;
        std::int64_t read = 0;
        CHECK_NOTE(rerank(s, slack, most, &read) == expected, "slack %d, %g", slack, most);
        CHECK(read <= kRows && read >= kBest);
        if (slack == 3) CHECK(read == kRows);
        if (most == 0.5f && slack < 2) CHECK_NOTE(read < 3 * kBest, "%d", static_cast<int>(read));
      }
  }
}

// Bounds that are too low lose rows: the check above can fail.
void test_low_bounds() {
  const Setting s = make(false);
  std::int64_t read = 0;
  CHECK(rerank(s, 2, 8.0f, &read, 8.0f) != define(s));
}

}  // namespace

int main() {
  test_answers();
  test_low_bounds();
  std::puts("rerank: all passed");
}
