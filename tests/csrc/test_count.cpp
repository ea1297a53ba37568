// Rows before a mark against the definition: every score by the fixed-order dot, every row compared.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "common/isa.h"
#include "search/search.h"

using namespace tgq;

namespace {

struct Problem {
  std::int64_t queries, rows, width;
  std::vector<float> q, x;
  std::vector<std::int64_t> starts{0}, mark_rows;
  std::vector<float> mark_scores;
};

// Many equal scores; a query has between none and 40 marks, some of them twice.
Problem make(std::int64_t queries, std::int64_t rows, std::int64_t width, bool whole, unsigned seed) {
  Problem p{queries, rows, width, std::vector<float>(queries * width), std::vector<float>(rows * width)};
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (auto* values : {&p.q, &p.x})
    for (float& v : *values) v = whole ? std::round(normal(random)) : normal(random);
  for (std::int64_t r = rows / 2; r + 3 < rows; r += 7)  // equal rows, on both sides of marks
    for (std::int64_t d = 0; d < width; ++d) p.x[(r + 3) * width + d] = p.x[(r - rows / 2) * width + d];
  if (rows > 5 && width > 0) p.x[5 * width] = std::nanf("");
  for (std::int64_t q = 0; q < queries; ++q) {
    const std::int64_t marks = q % 3 == 0 ? 40 : q % 3 == 1 ? static_cast<std::int64_t>(random() % 9) : 0;
    for (std::int64_t m = 0; m < marks; ++m) {
      std::int64_t row = static_cast<std::int64_t>(random() % rows);
      if (row == 5) row = 0;
      if (m > 0 && m % 10 == 0) row = p.mark_rows.back();
      p.mark_rows.push_back(row);
    }
    p.starts.push_back(static_cast<std::int64_t>(p.mark_rows.size()));
  }
  p.mark_scores.resize(p.mark_rows.size());
  for (std::int64_t q = 0; q < queries; ++q)
    for (std::int64_t m = p.starts[q]; m < p.starts[q + 1]; ++m)
      p.mark_scores[m] = fixed_order_dot(p.q.data() + q * width, p.x.data() + p.mark_rows[m] * width, width);
  return p;
}

std::vector<std::int64_t> define(const Problem& p) {
  std::vector<std::int64_t> before(p.mark_rows.size());
  for (std::int64_t q = 0; q < p.queries; ++q)
    for (std::int64_t r = 0; r < p.rows; ++r) {
      const float score = fixed_order_dot(p.q.data() + q * p.width, p.x.data() + r * p.width, p.width);
      for (std::int64_t m = p.starts[q]; m < p.starts[q + 1]; ++m)
        before[m] += score > p.mark_scores[m] || (score == p.mark_scores[m] && r < p.mark_rows[m]);
    }
  return before;
}

CountRequest request(const Problem& p, std::int64_t first, std::int64_t last, std::int64_t* before, const char* isa, int threads) {
  CountRequest r;
  r.queries = {p.q.data(), p.queries, p.width, p.width, 1, DType::f32};
  r.pool = {p.x.data() + first * p.width, last - first, p.width, p.width, 1, DType::f32};
  r.first_row = first;
  r.starts = p.starts.data();
  r.scores = p.mark_scores.data();
  r.rows = p.mark_rows.data();
  r.before = before;
  r.isa = isa;
  r.threads = threads;
  return r;
}

void check(const Problem& p, const char* isa) {
  const auto expected = define(p);
  std::vector<std::int64_t> found(expected.size());
  for (int threads : {1, 3}) {
    std::fill(found.begin(), found.end(), -1);
    CHECK(count_before(request(p, 0, p.rows, found.data(), isa, threads)) == Status::ok);
    CHECK_NOTE(found == expected, "%s, %d threads, %lld rows, width %lld", isa, threads, static_cast<long long>(p.rows),
               static_cast<long long>(p.width));
  }
  // Parts add up, one of them empty.
  std::vector<std::int64_t> sum(expected.size());
  const std::int64_t cuts[] = {0, p.rows / 3, p.rows / 3, p.rows * 9 / 10, p.rows};
  for (int c = 0; c < 4; ++c) {
    CHECK(count_before(request(p, cuts[c], cuts[c + 1], found.data(), isa, 2)) == Status::ok);
    for (std::size_t m = 0; m < sum.size(); ++m) sum[m] += found[m];
  }
  CHECK_NOTE(sum == expected, "%s, in parts", isa);
  // The scores of pairs.
  std::vector<float> left, right, scores(p.mark_rows.size());
  for (std::int64_t q = 0; q < p.queries; ++q)
    for (std::int64_t m = p.starts[q]; m < p.starts[q + 1]; ++m) {
      left.insert(left.end(), p.q.begin() + q * p.width, p.q.begin() + (q + 1) * p.width);
      right.insert(right.end(), p.x.begin() + p.mark_rows[m] * p.width, p.x.begin() + (p.mark_rows[m] + 1) * p.width);
    }
  const auto pairs = static_cast<std::int64_t>(scores.size());
  CHECK(score_rows({left.data(), pairs, p.width, p.width, 1, DType::f32}, {right.data(), pairs, p.width, p.width, 1, DType::f32},
                   isa, scores.data()) == Status::ok);
  CHECK(scores == p.mark_scores);
}

void refusals() {
  Problem p = make(3, 20, 4, true, 1);
  std::vector<std::int64_t> found(p.mark_rows.size());
  CountRequest r = request(p, 0, 20, found.data(), nullptr, 1);
  r.pool.cols = 3;
  CHECK(count_before(r) == Status::bad_argument);
  r = request(p, 0, 20, nullptr, nullptr, 1);
  CHECK(count_before(r) == Status::bad_argument);
  r = request(p, 0, 20, found.data(), "none such", 1);
  CHECK(count_before(r) == Status::unsupported);
}

void cancelled() {
  Problem p = make(64, 20000, 16, false, 2);
  std::vector<std::int64_t> found(p.mark_rows.size());
  CountRequest r = request(p, 0, p.rows, found.data(), nullptr, 1);
  r.poll = [](double) { return false; };
  const Status status = count_before(r);
  CHECK(status == Status::cancelled || status == Status::ok);  // a fast machine is done before the first look
}

}  // namespace

int main() {
  for (const char* const* isa = available_isas(); *isa != nullptr; ++isa) {
    unsigned seed = 1;
    for (bool whole : {true, false})
      for (std::int64_t width : {1, 15, 16, 64, 100})
        for (std::int64_t rows : {1, 63, 300, 9001}) check(make(7, rows, width, whole, seed++), *isa);
    check(make(40, 600, 3000, true, seed), *isa);  // few queries fit
  }
  refusals();
  cancelled();
  std::puts("count: ok");
  return 0;
}
