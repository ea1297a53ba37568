#include "search/cpu/rerank.h"

#include <algorithm>
#include <limits>

#include "search/cpu/code_queries.h"

namespace tgq {
namespace {

constexpr std::uint32_t kBatch = 64;  // rows scored while the next ones are on their way
constexpr std::uint32_t kAgain = 16;  // rows at least that are tried where some of the best do not count

// NaN, the bound of a pair that only an exact score can judge, comes first.
void raise_nan(Pending* pending, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i)
    if (is_nan(pending[i].bound)) pending[i].bound = std::numeric_limits<float>::infinity();
}

}  // namespace

bool is_excluded(const ScanPlan& plan, std::int64_t id, std::int64_t row) {
  if (!plan.may_hit(id, row)) return true;
  if (plan.exclude == nullptr) return false;
  const std::int64_t* rows = plan.exclude + id * plan.exclude_width;
  return std::find(rows, rows + plan.exclude_width, row) != rows + plan.exclude_width;
}

Reranker::Reranker(const ScanPlan& plan)
    : plan_(plan), pool_(plan.pool, *plan.kernels, plan.width), scratch_(static_cast<std::size_t>(kBatch * plan.width)) {
  if (plan.codes != nullptr) rows_ = code_rows(*plan.codes, 0);
}

std::int64_t Reranker::rerank(const float* query, std::int64_t id, Pending* pending, std::uint32_t count, Candidates& best) {
  raise_nan(pending, count);
  const auto higher = [](const Pending& a, const Pending& b) { return a.bound > b.bound; };
  std::uint32_t first = 0;
  do {  // again where rows among them are excluded or have no score
    const std::uint32_t missing = first == 0 ? best.k : std::max(best.k - best.count, kAgain);
    const std::uint32_t end = std::min(count, first + missing);
    if (end < count) std::nth_element(pending + first, pending + end, pending + count, higher);
    score(query, id, pending + first, end - first, best);
    first = end;
  } while (best.count < best.k && first < count);
  if (best.count >= best.k) best.compact();
  const float threshold = threshold_score(best.threshold, 0);
  const auto remaining = [&](std::uint32_t of) {
    const auto below = [threshold](const Pending& p) { return p.bound < threshold; };
    return static_cast<std::uint32_t>(std::remove_if(pending + first, pending + first + of, below) - (pending + first));
  };
  std::uint32_t rest = remaining(count - first);
  if (rows_.second != nullptr && rest > 0) {  // now that few are left to ask the second level for
    plan_.code_kernels->refine_pending(rows_, plan_.prepared->codes().view(id, 1), pending + first, rest);
    raise_nan(pending + first, rest);
    rest = remaining(rest);
  }
  score(query, id, pending + first, rest, best);
  return first + rest;
}

void Reranker::score(const float* query, std::int64_t id, const Pending* pending, std::uint32_t count, Candidates& best) {
  const float *queries[kBatch], *rows[kBatch];
  float scores[kBatch];
  std::fill(queries, queries + kBatch, query);
  const auto fetch = [&](std::uint32_t begin) {
    for (std::uint32_t i = begin; i < std::min(begin + kBatch, count); ++i) {
      const Ahead row = pool_.memory(pending[i].row, 1);
      for (std::int64_t b = 0; b < row.bytes; b += 64) __builtin_prefetch(row.at + b, 0, 2);
    }
  };
  fetch(0);
  for (std::uint32_t begin = 0; begin < count; begin += kBatch) {
    const auto size = static_cast<int>(std::min(kBatch, count - begin));
    fetch(begin + kBatch);
    for (int i = 0; i < size; ++i) {
      std::int64_t stride = 0;
      rows[i] = pool_.read(pending[begin + i].row, 1, scratch_.data() + i * plan_.width, &stride);
    }
    plan_.kernels->score_pairs(queries, rows, size, plan_.width, scores);
    for (int i = 0; i < size; ++i) {
      const std::uint32_t row = pending[begin + i].row;
      const Key key = make_key(scores[i], row);
      if (key > best.threshold && !is_excluded(plan_, id, row)) best.push(key);
    }
  }
}

}  // namespace tgq
