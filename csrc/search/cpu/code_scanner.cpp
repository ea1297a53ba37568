#include "search/cpu/code_scanner.h"

#include <algorithm>
#include <cmath>

#include "search/cpu/partitioned_scan.h"
#include "search/cpu/row_candidates.h"

namespace tgq {
CodeScanner::CodeScanner(const ScanPlan& plan)
    : Scanner(plan), queries_of_tile_(padded_tile_, *plan.codes), reranker_(plan),
      code_hits_(static_cast<std::size_t>(plan.block_rows / kGroup * kDenseGroup + kGroup * kQueryPanel)),
      dense_groups_(static_cast<std::size_t>(plan.block_rows / kGroup)), inverse_scale_(static_cast<std::size_t>(plan.block_rows)),
      scaled_rest_(static_cast<std::size_t>(plan.block_rows)) {}

void CodeScanner::load_queries(std::int64_t begin, std::int64_t count) {
  Scanner::load_queries(begin, count);
  scale_sum_ = rest_sum_ = 0;
  sampled_ = 0;
  for (std::int64_t q = 0; q < count; ++q) queries_of_tile_.copy(q, plan_.prepared->codes(), plan_.query_id(begin + q));
}

CodeRows CodeScanner::block(std::int64_t first, int count) const {
  const std::int64_t group = first / kGroup * plan_.group_step;
  CodeRows rows = code_rows(*plan_.codes, group);
  rows.group_step = plan_.group_step;
  rows.groups = static_cast<int>(ceil_div(count, kGroup));
  rows.bias = plan_.bias == nullptr ? nullptr : plan_.bias + group * kGroup;
  return rows;
}

CodeQueries CodeScanner::panel(std::int64_t begin) const {
  CodeQueries queries = queries_of_tile_.view(begin, static_cast<int>(std::min<std::int64_t>(kQueryPanel, num_queries_ - begin)));
  queries.threshold = threshold_.data() + begin;
  return queries;
}

void CodeScanner::scan_block(std::int64_t first, int count, std::int64_t ahead, RowCandidates* row_candidates) {
  if (plan_.slots > 0) return sample(first, count, ahead);
  if (cold() || direct_blocks_ > 0) return Scanner::scan_block(first, count, ahead, row_candidates);
  if (row_candidates != nullptr) load_row_thresholds(*row_candidates, first, count);
  filter(first, count, ahead, row_candidates);
  scanned_ += count;
}

// Asks for a panel's share of the sampled rows to come, which are too far apart for the processor to foresee.
void CodeScanner::fetch(std::int64_t first, std::int64_t count, std::int64_t panel) const {
  const std::int64_t groups = ceil_div(count, kGroup), panels = ceil_div(num_queries_, kQueryPanel), at = panel / kQueryPanel;
  for (int line = 0; line < plan_.codes->first_lines; ++line) {
    const std::uint8_t* from = plan_.codes->bytes + line * plan_.codes->plane_stride;
    for (std::int64_t g = groups * at / panels; g < groups * (at + 1) / panels; ++g)
      for (int b = 0; b < kLineBytes; b += 64) __builtin_prefetch(from + (first / kGroup + g) * plan_.group_step * kLineBytes + b, 0, 2);
  }
}

void CodeScanner::sample(std::int64_t first, int count, std::int64_t ahead) {
  const CodeRows rows = block(first, count);
  const int sets = plan_.slots / kGroup, next = static_cast<int>(first / kGroup % sets);
  for (std::int64_t p = 0; p < num_queries_; p += kQueryPanel) {
    fetch(first + count, ahead, p);
    plan_.code_kernels->raise_maxima(rows, panel(p), maxima_.data() + p * plan_.slots, sets, next);
  }
  for (int g = 0; g < rows.groups; ++g) {
    const std::int64_t at = g * rows.group_step * kGroup;
    if (!std::isfinite(rows.rest[at])) continue;
    scale_sum_ += rows.scale[at];
    rest_sum_ += rows.rest[at];
    ++sampled_;
  }
  counters_.filtered += num_queries_ * count;
}

float CodeScanner::mean_margin(std::int64_t q) const {
  if (sampled_ == 0) return 0.0f;
  const auto rows = static_cast<double>(sampled_);
  return queries_of_tile_.margin(q, scale_sum_ / rows, rest_sum_ / rows, false);
}

float CodeScanner::fine_margin(std::int64_t q) const {
  if (sampled_ == 0) return 0.0f;
  const auto rows = static_cast<double>(sampled_);
  return queries_of_tile_.margin(q, scale_sum_ / rows, rest_sum_ / rows, plan_.codes->second != nullptr);
}

void CodeScanner::filter(std::int64_t first, int count, std::int64_t ahead, RowCandidates* row_candidates) {
  rows_ = pool_.in_place() ? pool_.read(first, count, nullptr, &row_stride_) : nullptr;
  CodeRows rows = block(first, count);
  const int divided = plan_.code_kernels->divided_from;
  if (divided > 0 && num_queries_ >= divided) divide_scales(rows, inverse_scale_.data(), scaled_rest_.data());
  rows.row_threshold = row_candidates == nullptr ? nullptr : row_threshold_.data();
  int dense = 0, all = 0;
  for (std::int64_t p = 0; p < num_queries_; p += kQueryPanel) {
    if (num_queries_ > kQueryPanel) fetch(first + count, ahead, p);  // for few queries the kernel asks
    const CodeQueries queries = panel(p);
    int hits = plan_.code_kernels->filter(rows, queries, code_hits_.data(), dense_groups_.data());
    if (rows.second != nullptr && plan_.pending == 0) hits = plan_.code_kernels->refine(rows, queries, code_hits_.data(), hits);
    for (int h = 0; h < hits; ++h) {
      const CodeHit& hit = code_hits_[static_cast<std::size_t>(h)];
      if (plan_.pending == 0) rescore(p + hit.query, hit.row, first, count, row_candidates);
      else if (hit.row < count) put_off(p + hit.query, first + hit.row, hit.bound);
    }
    for (int g = 0; g < rows.groups; ++g) {
      if (!dense_groups_[static_cast<std::size_t>(g)]) continue;
      score_dense(p, g * kGroup, std::min(kGroup, count - g * kGroup), first, row_candidates);
      ++dense;
    }
    all += rows.groups;
  }
  end_filtered(first, count, dense, all, row_candidates);
}

void CodeScanner::put_off(std::int64_t q, std::int64_t row, float bound) {
  if (bound < threshold_[static_cast<std::size_t>(q)] || !plan_.may_hit(plan_.query_id(begin_ + q), row)) return;
  std::uint32_t& at = pending_count_[static_cast<std::size_t>(q)];
  if (at == plan_.pending) rerank(q);
  pending_[static_cast<std::size_t>(q * plan_.pending + at++)] = {bound, static_cast<std::uint32_t>(row)};
}

void CodeScanner::rerank(std::int64_t q) {
  std::uint32_t& count = pending_count_[static_cast<std::size_t>(q)];
  counters_.rescored += reranker_.rerank(queries_.data() + q * plan_.width, plan_.query_id(begin_ + q), pending_.data() + q * plan_.pending,
                                        count, candidates_[static_cast<std::size_t>(q)]);
  count = 0;
  risen_.push_back(q);
}

}  // namespace tgq
