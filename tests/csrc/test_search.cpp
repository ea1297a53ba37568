// The whole search against the definition: every score by the fixed-order dot, all keys sorted.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "common/isa.h"
#include "own_codes.h"
#include "search/search.h"
#include "search/selection.h"

using namespace tgq;

namespace {

#if defined(TGQ_SANITIZED)
constexpr int kShrink = 4;  // sanitizers look at memory and threads, not at numbers: smaller problems do
#else
constexpr int kShrink = 1;
#endif

struct Problem {
  std::int64_t queries, rows, width;
  std::vector<float> q, x;
  std::vector<std::int64_t> exclude;
  std::int64_t exclude_width = 0;
  std::vector<std::uint8_t> allowed;  // empty: all rows
};

// kind: 0 random, 1 clustered, 2 few distinct values, 3 ascending, 4 NaN and infinities, 5 all equal
Problem make(std::int64_t queries, std::int64_t rows, std::int64_t width, int kind, unsigned seed) {
  Problem p{queries, rows, width, std::vector<float>(queries * width), std::vector<float>(rows * width), {}};
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (auto* values : {&p.q, &p.x})
    for (float& v : *values) {
      v = normal(random);
      if (kind == 1) v = 1.0f + 1e-6f * v;
      if (kind == 2) v = std::round(v);
      if (kind == 4 && random() % 97 == 0) v = random() % 3 == 0 ? std::nanf("") : std::numeric_limits<float>::infinity();
      if (kind == 5) v = 0.5f;
    }
  if (kind == 3) {
    for (float& v : p.q) v = 1.0f;
    for (std::int64_t i = 0; i < rows * width; ++i) p.x[i] = static_cast<float>(i / width);
  }
  if (seed % 2 == 1) {
    p.exclude_width = 2;
    for (std::int64_t i = 0; i < 2 * queries; ++i) p.exclude.push_back(static_cast<std::int64_t>(random() % (rows + 1)) - 1);
  }
  if (seed % 3 == 1) {  // one row in three, and long stretches without any
    for (std::int64_t i = 0; i < rows; ++i) p.allowed.push_back(i / 300 % 3 != 1 && random() % 3 == 0);
  }
  return p;
}

struct Answer {
  std::vector<float> scores;
  std::vector<std::int64_t> rows;
  Counters counters;
  Status status;
  bool operator==(const Answer& other) const { return rows == other.rows && scores == other.scores; }
};

Answer define(const Problem& p, std::uint32_t k) {
  Answer a{std::vector<float>(p.queries * k), std::vector<std::int64_t>(p.queries * k), {}, Status::ok};
  for (std::int64_t q = 0; q < p.queries; ++q) {
    std::vector<Key> keys;
    for (std::int64_t r = 0; r < p.rows; ++r) {
      if (!p.allowed.empty() && p.allowed[r] == 0) continue;
      const auto* banned = p.exclude.data() + q * p.exclude_width;
      if (std::find(banned, banned + p.exclude_width, r) != banned + p.exclude_width) continue;
      const Key key = make_key(fixed_order_dot(p.q.data() + q * p.width, p.x.data() + r * p.width, p.width), static_cast<std::uint32_t>(r));
      if (key != kNoKey) keys.push_back(key);
    }
    std::sort(keys.begin(), keys.end(), std::greater<Key>());
    for (std::uint32_t i = 0; i < k; ++i) {
      a.scores[q * k + i] = i < keys.size() ? key_score(keys[i]) : -std::numeric_limits<float>::infinity();
      a.rows[q * k + i] = i < keys.size() ? static_cast<std::int64_t>(key_row(keys[i])) : -1;
    }
  }
  return a;
}

Answer run(const Problem& p, std::uint32_t k, int threads, const char* isa, const Tuning& tuning,
           const OwnCodes* codes = nullptr) {
  Answer a{std::vector<float>(p.queries * k, 7.0f), std::vector<std::int64_t>(p.queries * k, -7), {}, Status::ok};
  Request r;
  r.queries = {p.q.data(), p.queries, p.width, p.width, 1, DType::f32};
  r.pool = {p.x.data(), p.rows, p.width, p.width, 1, DType::f32};
  r.k = k;
  r.exclude = p.exclude.data();
  r.exclude_width = p.exclude_width;
  r.allowed = p.allowed.empty() ? nullptr : p.allowed.data();
  r.scores = a.scores.data();
  r.rows = a.rows.data();
  r.threads = threads;
  r.isa = isa;
  r.tuning = tuning;
  r.counters = &a.counters;
  if (codes != nullptr) r.codes = codes->get(), r.tuning.use_codes = 1;
  a.status = search_cpu(r);
  CHECK(a.status == Status::ok);
  return a;
}

std::vector<Tuning> tunings() {
  std::vector<Tuning> all(8);
  all[1].use_filter = 0;
  all[2].use_filter = 1;
  all[3].use_filter = 1, all[3].sample_stride = 4, all[3].spare_candidates = 1;
  all[4].has_forced_threshold = true, all[4].forced_threshold = 1e30f;  // a sample that fails for every query
  all[5].has_forced_threshold = true, all[5].forced_threshold = -1e30f, all[5].use_filter = 1, all[5].spare_candidates = 3;
  all[6].query_tile = 32, all[6].row_chunk = 64, all[6].use_filter = 1;
  all[7].sample_stride = 0, all[7].use_filter = 1, all[7].row_chunk = 100;
  return all;
}

void test_everything() {
  unsigned seed = 0;
  for (int kind = 0; kind <= 5; ++kind)
    for (auto [queries, rows, width] : {std::tuple<int, int, int>{1, 40, 5}, {37, 700 / kShrink, 20}, {70, 1500 / kShrink, 70}}) {
      const Problem p = make(queries, rows, width, kind, ++seed);
      const OwnCodes coded[] = {OwnCodes(p.x, p.width), OwnCodes(p.x, p.width, 1, false), OwnCodes(p.x, p.width, 99)};
      for (std::uint32_t k : {1u, 12u, 200u}) {
        const Answer expected = define(p, k);
        for (const char* const* isa = available_isas(); *isa != nullptr; ++isa) {
          int which = 0;
          for (const Tuning& tuning : tunings()) {
            for (int threads : {1, 3}) {
              if (threads == 1 && which % 3 != 0) continue;
              const Answer found = run(p, k, threads, *isa, tuning);
              CHECK_NOTE(found == expected, "kind %d, %d x %d x %d, k %u, %s, tuning %d, threads %d", kind, queries, rows,
                         width, k, *isa, which, threads);
              if (which % kShrink == 0)
                CHECK_NOTE(run(p, k, threads, *isa, tuning, &coded[which % 3]) == expected,
                           "with codes: kind %d, %d x %d x %d, k %u, %s, tuning %d", kind, queries, rows, width, k, *isa,
                           which);
              if (which == 4) CHECK(kind == 4 || found.counters.rescanned == queries);
            }
            ++which;
          }
        }
      }
    }
}

// The counters show that the paths under test were taken.
void test_paths() {
  const Problem p = make(64, 30000, 64, 0, 2);
  Tuning filter;
  filter.use_filter = 1;
  const Answer thinned = run(p, 50, 2, nullptr, filter);
  CHECK(thinned.counters.filtered > 64 * 25000 && thinned.counters.rescored < 64 * 3000);
  CHECK(thinned.counters.rescored >= 64 * 50 && thinned.counters.rescanned == 0);
  const Problem clustered = make(64, 30000, 64, 1, 4);
  const Answer dense = run(clustered, 50, 2, nullptr, filter);
  CHECK(dense.counters.direct > 64 * 25000);
  Tuning direct;
  direct.use_filter = 0;
  CHECK(run(p, 50, 2, nullptr, direct) == thinned);
  CHECK(run(clustered, 50, 2, nullptr, direct) == dense);
}

// Where few rows are allowed the others are not scored, and the threshold is a sample's of the allowed ones.
void test_allowed() {
  Problem p = make(64, 30000, 64, 0, 2);
  p.allowed.assign(30000, 0);
  for (int r = 9000; r < 21000; ++r) p.allowed[r] = r % 2;
  for (int r = 0; r < 9000; ++r)
    for (int d = 0; d < 64; ++d) p.x[r * 64 + d] = 5.0f * p.q[r % 64 * 64 + d];  // far better, and not allowed
  const OwnCodes own(p.x, p.width);
  const Answer expected = define(p, 10);
  for (const char* const* isa = available_isas(); *isa != nullptr; ++isa)
    for (int filter : {0, 1})
      for (const OwnCodes* codes : {static_cast<const OwnCodes*>(nullptr), &own}) {
        Tuning tuning;
        tuning.use_filter = filter;
        const Answer found = run(p, 10, 2, *isa, tuning, filter == 1 ? codes : nullptr);
        CHECK_NOTE(found == expected, "%s, filter %d", *isa, filter);
        const Counters& c = found.counters;
        CHECK_NOTE(c.rescanned == 0 && c.filtered + c.direct < 64 * 16000, "%s, filter %d: %lld %lld %lld", *isa,
                   filter, static_cast<long long>(c.rescanned), static_cast<long long>(c.filtered), static_cast<long long>(c.direct));
      }
}

// With codes even one query is filtered, and few rows are read.
void test_codes() {
  Problem p = make(3, 30000, 130, 0, 2);
  for (std::int64_t r = 0; r < p.rows; ++r)  // energy falls fast
    for (int d = 0; d < 130; ++d) p.x[r * 130 + d] *= d < 40 ? 1.0f : 0.05f;
  for (const OwnCodes& codes : {OwnCodes(p.x, p.width), OwnCodes(p.x, p.width, 1, false), OwnCodes(p.x, p.width, 2), OwnCodes(p.x, p.width, 3)})
    for (const char* const* isa = available_isas(); *isa != nullptr; ++isa) {
      const Answer found = run(p, 10, 2, *isa, Tuning(), &codes);
      CHECK(found == run(p, 10, 1, *isa, Tuning()));
      if (codes.first_lines == 3)
        CHECK_NOTE(found.counters.direct < 3 * 4000 && found.counters.rescored < 3 * 3000, "%s: %lld %lld", *isa,
                   static_cast<long long>(found.counters.direct), static_cast<long long>(found.counters.rescored));
    }
}

// Coding errors that all point one way, of the rows and then of the queries: without its part of the margin a filter would
// drop every row that comes late, and those are the best.
void test_aligned_errors() {
  for (bool of_rows : {true, false}) {
    Problem p = make(16, 3000, 64, 5, 2);
    for (std::int64_t r = 0; r < p.rows; ++r) {
      const float rise = static_cast<float>(r) / static_cast<float>(p.rows);
      for (int d = 0; d < 64; ++d) p.x[r * 64 + d] = !of_rows ? 1.0f + 0.01f * rise : d == 0 ? 127.0f : 10.0f + 0.4f * rise;
    }
    for (std::int64_t i = 0; i < 16 * 64; ++i) p.q[i] = of_rows ? 1.0f : i % 64 == 0 ? 127.0f : 10.4f;
    const OwnCodes codes(p.x, p.width);
    Tuning exact, filter;
    exact.use_filter = 0;
    filter.use_filter = 1, filter.sample_stride = 0;
    const Answer expected = run(p, 5, 1, nullptr, exact);
    for (const char* const* isa = available_isas(); *isa != nullptr; ++isa) {
      CHECK_NOTE(run(p, 5, 1, *isa, filter) == expected, "%s, errors of rows: %d", *isa, of_rows);
      CHECK_NOTE(run(p, 5, 1, *isa, filter, &codes) == expected, "%s with codes, errors of rows: %d", *isa, of_rows);
    }
  }
  // The sample goes through the codes in strides: from the first rows alone would come a threshold that everything passes.
  const Problem rising = make(40, 30000, 64, 3, 2);
  const OwnCodes codes(rising.x, rising.width);
  const Answer found = run(rising, 10, 1, nullptr, Tuning(), &codes);
  CHECK_NOTE(found.counters.rescored + found.counters.direct < 40 * 3000, "%lld %lld",
             static_cast<long long>(found.counters.rescored), static_cast<long long>(found.counters.direct));
}

// A self-join by the upper triangle gives what the square gives.
void test_self_join() {
  unsigned seed = 20;
  for (int kind = 0; kind <= 5; ++kind)
    for (auto [rows, width] : {std::pair<int, int>{5, 3}, {150 / kShrink, 20}, {500 / kShrink, 33}}) {
      Problem p = make(rows, rows, width, kind, ++seed);
      p.q = p.x;
      const OwnCodes codes(p.x, p.width);
      for (std::uint32_t k : {12u, 200u}) {
        Tuning square;
        square.use_self_join = 0;
        const Answer expected = run(p, k, 1, nullptr, square);
        for (const char* const* isa = available_isas(); *isa != nullptr; ++isa) {
          int which = 0;
          for (Tuning tuning : tunings()) {
            tuning.use_self_join = 1;
            Answer found{std::vector<float>(rows * k, 7.0f), std::vector<std::int64_t>(rows * k, -7), {}, Status::ok};
            Request r;
            r.queries = r.pool = {p.x.data(), rows, width, width, 1, DType::f32};
            r.k = k;
            r.exclude = p.exclude.data();
            r.exclude_width = p.exclude_width;
            r.allowed = p.allowed.empty() ? nullptr : p.allowed.data();
            r.scores = found.scores.data();
            r.rows = found.rows.data();
            r.threads = 1 + which % 3;
            r.isa = *isa;
            r.self_join = true;
            r.tuning = tuning;
            if (which % 2 == 1) r.codes = codes.get(), r.tuning.use_codes = 1;
            r.counters = &found.counters;
            CHECK(search_cpu(r) == Status::ok);
            CHECK_NOTE(found == expected, "kind %d, %d x %d, k %u, %s, tuning %d", kind, rows, width, k, *isa, which);
            ++which;
          }
        }
      }
    }
}

void test_cancel() {
  const Problem p = make(600, 20000, 64, 0, 2);
  std::vector<float> scores(600 * 5);
  std::vector<std::int64_t> rows(600 * 5);
  Request r;
  r.queries = {p.q.data(), p.queries, p.width, p.width, 1, DType::f32};
  r.pool = {p.x.data(), p.rows, p.width, p.width, 1, DType::f32};
  r.k = 5;
  r.scores = scores.data();
  r.rows = rows.data();
  r.threads = 2;
  r.isa = "scalar";  // slow enough to be caught at it
  int polls = 0;
  double last = 0;
  r.poll = [&](double share) {
    CHECK(share >= last && share <= 1.0);
    last = share;
    return ++polls < 2;
  };
  CHECK(search_cpu(r) == Status::cancelled);
  CHECK(polls == 2);
}

void test_bad_arguments() {
  const Problem p = make(2, 10, 4, 0, 2);
  std::vector<float> scores(8);
  std::vector<std::int64_t> rows(8);
  Request good;
  good.queries = {p.q.data(), 2, 4, 4, 1, DType::f32};
  good.pool = {p.x.data(), 10, 4, 4, 1, DType::f32};
  good.k = 4;
  good.scores = scores.data();
  good.rows = rows.data();
  CHECK(search_cpu(good) == Status::ok);
  const auto refused = [&](auto change) {
    Request bad = good;
    change(bad);
    return search_cpu(bad);
  };
  CHECK(refused([](Request& r) { r.k = 0; }) == Status::bad_argument);
  CHECK(refused([](Request& r) { r.k = 2049; }) == Status::bad_argument);
  CHECK(refused([](Request& r) { r.pool.cols = 3; }) == Status::bad_argument);
  CHECK(refused([](Request& r) { r.pool.data = nullptr; }) == Status::bad_argument);
  CHECK(refused([](Request& r) { r.pool.rows = -1; }) == Status::bad_argument);
  CHECK(refused([](Request& r) { r.pool.rows = 1LL << 33; }) == Status::bad_argument);
  CHECK(refused([](Request& r) { r.threads = 0; }) == Status::bad_argument);
  CHECK(refused([](Request& r) { r.scores = nullptr; }) == Status::bad_argument);
  CHECK(refused([](Request& r) { r.exclude_width = 1; }) == Status::bad_argument);
  CHECK(refused([](Request& r) { r.pool.dtype = static_cast<DType>(9); }) == Status::bad_argument);
  const OwnCodes own(p.x, p.width);
  const Codes whole = own.get();
  CHECK(refused([&](Request& r) { r.codes = whole; }) == Status::ok);
  CHECK(refused([&](Request& r) { r.codes = whole, r.codes.lines = 2; }) == Status::bad_argument);
  CHECK(refused([&](Request& r) { r.codes = whole, r.codes.rest = nullptr; }) == Status::bad_argument);
  CHECK(refused([&](Request& r) { r.codes = whole, r.codes.defect = 0.1f; }) == Status::bad_argument);
  CHECK(refused([](Request& r) { r.self_join = true; }) == Status::bad_argument);
  CHECK(refused([](Request& r) { r.isa = "sse9"; }) == Status::unsupported);
}

void test_concurrent_callers() {
  const Problem p = make(48, 3000 / kShrink, 40, 2, 3);
  const Answer expected = define(p, 20);
  std::vector<std::thread> callers;
  std::atomic<int> right{0};
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&, i] {
      Tuning tuning;
      tuning.use_filter = i % 2;
      tuning.row_chunk = 128;
      for (int turn = 0; turn < 3; ++turn) right += run(p, 20, 2, nullptr, tuning) == expected;
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(right == 12);
}

}  // namespace

int main() {
  test_everything();
  test_paths();
  test_allowed();
  test_codes();
  test_aligned_errors();
  test_self_join();
  test_cancel();
  test_bad_arguments();
  test_concurrent_callers();
  std::puts("search: all passed");
}
