// The scan: exact tiles, or the certified filter with exact scores for what passes it.
#include "search/cpu/scanner.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "common/integers.h"
#include "search/cpu/rerank.h"
#include "search/cpu/row_candidates.h"

namespace tgq {
namespace {

constexpr int kDirectRows = 64;     // rows of one exact tile
constexpr int kDirectQueries = 16;  // at most
constexpr int kBatch = 64;          // hits scored exactly at a time
constexpr int kColdRows = 16;       // times k: rows scored exactly where no threshold is known
constexpr int kRetryAfter = 15;     // blocks scored exactly after a block that the filter did not thin out

}  // namespace

Scanner::Scanner(const ScanPlan& plan)
    : plan_(plan),
      pool_(plan.pool, *plan.kernels, plan.width),
      query_reader_(plan.queries, *plan.kernels, plan.width),
      padded_tile_(round_up(plan.max_tile, kPanel)),
      queries_(static_cast<std::size_t>(padded_tile_ * plan.width)),
      row_scratch_(static_cast<std::size_t>(std::max(plan.block_rows, kBatch) * plan.width)),
      scores_(static_cast<std::size_t>(kPanel * kDirectRows)),
      positions_(kDirectRows),
      keys_(static_cast<std::size_t>(plan.max_tile) * plan.capacity),
      candidates_(static_cast<std::size_t>(plan.max_tile)),
      threshold_(static_cast<std::size_t>(padded_tile_)),
      row_threshold_(static_cast<std::size_t>(plan.block_rows)),
      nan_(static_cast<std::size_t>(padded_tile_)),
      margin_(plan.filter == nullptr ? MarginConstants{} : margin_constants(*plan.filter, plan.pool.cols)),
      panels_(plan.filter == nullptr ? 0 : static_cast<std::size_t>(padded_tile_ * plan.row_bytes / 4)),
      codes_(plan.filter == nullptr ? 0 : static_cast<std::size_t>(std::max(plan.block_rows, kPanel) * plan.row_bytes)),
      hits_(plan.filter == nullptr
                ? 0
                : static_cast<std::size_t>(plan.block_rows / kPanel * kDense + kPanel * kPanel)),
      pending_(static_cast<std::size_t>(plan.max_tile) * plan.pending),
      pending_count_(static_cast<std::size_t>(plan.max_tile)) {
  maxima_.resize(static_cast<std::size_t>(padded_tile_ * plan.slots));
  stored_codes_ = plan.filter != nullptr && plan.filter->measure_rows != nullptr && plan.row_ids == nullptr && plan.pool.dtype == DType::bf16 &&
                  plan.pool.col_stride == 1 && plan.pool.cols * 2 == plan.row_bytes;
  for (std::size_t q = 0; q < candidates_.size(); ++q)
    candidates_[q] = {keys_.data() + q * plan.capacity, plan.capacity, plan.k, 0, kNoKey};
  if (plan.filter == nullptr) return;
  offset_.resize(static_cast<std::size_t>(padded_tile_));
  for (auto* values : {&unit_, &slope_, &lift_}) values->resize(static_cast<std::size_t>(padded_tile_));
  for (auto* values : {&scale_, &norm_, &error_}) values->resize(static_cast<std::size_t>(std::max(plan.block_rows, kPanel)));
  for (auto* values : {&group_norm_, &group_error_}) values->resize(static_cast<std::size_t>(plan.block_rows / kPanel));
  dense_.resize(static_cast<std::size_t>(plan.block_rows / kPanel));
}

Scanner::~Scanner() = default;

void Scanner::load_queries(std::int64_t begin, std::int64_t count) {
  begin_ = begin;
  num_queries_ = count;
  scanned_ = 0;
  raise_at_ = plan_.k;
  direct_blocks_ = 0;
  std::fill(pending_count_.begin(), pending_count_.end(), 0);
  std::fill(maxima_.begin(), maxima_.end(), -std::numeric_limits<float>::infinity());
  norm_sum_ = error_sum_ = 0;
  groups_ = 0;
  const std::int64_t padded = round_up(count, kPanel);
  std::fill(queries_.data() + count * plan_.width, queries_.data() + padded * plan_.width, 0.0f);
  for (std::int64_t q = 0; q < padded; ++q) {
    const auto i = static_cast<std::size_t>(q);
    threshold_[i] = FLT_MAX;  // padding finds nothing
    nan_[i] = 0;
    if (q >= count) continue;
    float* query = queries_.data() + q * plan_.width;
    query_reader_.read_row(plan_.query_id(begin + q), query);
    nan_[i] = std::any_of(query, query + plan_.width, [](float v) { return is_nan(v); });
    candidates_[i].reset(plan_.thresholds == nullptr ? kNoKey : plan_.thresholds[begin + q]);
    if (nan_[i]) {  // all its scores are NaN
      std::fill(query, query + plan_.width, 0.0f);
      candidates_[i].reset(~kNoKey);
    }
  }
  update_thresholds(0, count, 0);
  if (plan_.filter == nullptr) return;
  for (std::int64_t p = 0; p < padded; p += kPanel) {
    plan_.filter->encode_queries(queries_.data() + p * plan_.width, plan_.width, kPanel, plan_.width, plan_.row_bytes,
                                 codes_.data(), scale_.data(), norm_.data(), error_.data());
    pack_panel(codes_.data(), plan_.row_bytes, panels_.data() + p * plan_.row_bytes / 4);
    for (int i = 0; i < kPanel; ++i) {
      const auto u = static_cast<std::size_t>(i), q = static_cast<std::size_t>(p + i);
      const float whole = norm_[u] + error_[u];  // >= norm of the query
      slope_[q] = error_[u] + margin_.exact_error * whole + margin_.filter_error * norm_[u];
      lift_[q] = whole * (1.0f + margin_.exact_error);
      unit_[q] = scale_[u];
      const auto* codes = reinterpret_cast<const std::int8_t*>(codes_.data() + i * plan_.row_bytes);
      offset_[q] = plan_.filter->code_bytes == 1 ? -kByteZero * std::accumulate(codes, codes + plan_.row_bytes, 0) : 0;
    }
  }
}

void Scanner::update_thresholds(std::int64_t begin, std::int64_t end, std::int64_t next_row) {
  for (std::int64_t q = begin; q < std::min(end, num_queries_); ++q) {
    const auto i = static_cast<std::size_t>(q);
    threshold_[i] = nan_[i] ? FLT_MAX : threshold_score(candidates_[i].threshold, static_cast<std::uint32_t>(next_row));
  }
}

inline void Scanner::offer(std::int64_t q, std::int64_t row, float score, RowCandidates* row_candidates) {
  if (row_candidates != nullptr && !nan_[static_cast<std::size_t>(q)]) row_candidates->offer(row, plan_.query_id(begin_ + q), score);
  Candidates& best = candidates_[static_cast<std::size_t>(q)];
  const Key key = make_key(score, static_cast<std::uint32_t>(row));
  if (key <= best.threshold) return;
  if (is_excluded(plan_, plan_.query_id(begin_ + q), row)) return;
  const Key before = best.threshold;
  best.push(key);
  if (best.threshold != before) risen_.push_back(q);
}

void Scanner::raise_all_thresholds() {
  for (std::int64_t q = 0; q < num_queries_; ++q) {
    Candidates& best = candidates_[static_cast<std::size_t>(q)];
    if (best.count >= best.k) best.compact();
  }
}

void Scanner::raise_thresholds(const RowCandidates& row_candidates) {
  for (std::int64_t q = 0; q < num_queries_; ++q) {
    Key& threshold = candidates_[static_cast<std::size_t>(q)].threshold;
    threshold = std::max(threshold, row_candidates.threshold(begin_ + q));
  }
  update_thresholds(0, num_queries_, 0);
}

void Scanner::share_thresholds(SharedThresholds& shared, int thread) {
  const auto rank = static_cast<std::uint32_t>(ceil_div(plan_.k, shared.threads()));
  for (std::int64_t q = 0; q < num_queries_; ++q) {
    Candidates& best = candidates_[static_cast<std::size_t>(q)];
    if (thread < shared.threads() && best.count >= rank) {
      if (best.count > rank) select_largest(best.keys, best.count, rank);
      shared.publish(thread, q, *std::min_element(best.keys, best.keys + rank));
    }
    best.threshold = std::max(best.threshold, shared.threshold(q));
  }
  update_thresholds(0, num_queries_, 0);
}

void Scanner::load_row_thresholds(const RowCandidates& row_candidates, std::int64_t first, int count) {
  // What this tile offers to a row comes from queries at begin_ or later.
  for (int r = 0; r < count; ++r)
    row_threshold_[static_cast<std::size_t>(r)] = threshold_score(row_candidates.threshold(first + r), static_cast<std::uint32_t>(begin_));
  std::fill(row_threshold_.begin() + count, row_threshold_.end(), FLT_MAX);
}

// Without a sampled threshold so much passes at first that the filter would only be in the way.
bool Scanner::cold() const { return plan_.slots == 0 && plan_.thresholds == nullptr && scanned_ < kColdRows * static_cast<std::int64_t>(plan_.k); }

int Scanner::next_rows() const {
  if (plan_.filter == nullptr || !cold()) return plan_.block_rows;
  const std::int64_t rest = round_up(kColdRows * static_cast<std::int64_t>(plan_.k) - scanned_, kPanel);
  return static_cast<int>(std::min<std::int64_t>(plan_.block_rows, rest));
}

void Scanner::scan_block(std::int64_t first, int count, std::int64_t ahead, RowCandidates* row_candidates) {
  rows_ = pool_.in_place() && plan_.row_ids == nullptr ? pool_.read(first, count, nullptr, &row_stride_) : nullptr;
  if (plan_.slots > 0) return scan_sample(first, count, ahead);
  if (row_candidates != nullptr) load_row_thresholds(*row_candidates, first, count);
  const bool was_cold = cold();
  if (plan_.filter == nullptr || was_cold || direct_blocks_ > 0) {
    if (direct_blocks_ > 0) --direct_blocks_;
    scan_direct(first, count, row_candidates);
  } else {
    scan_filtered(first, count, ahead, row_candidates);
  }
  scanned_ += count;
  if (was_cold && (scanned_ >= raise_at_ || !cold())) {  // to raise them costs as much as all the hits since the last time
    raise_at_ = 2 * scanned_;
    raise_all_thresholds();
    update_thresholds(0, num_queries_, first + count);
  }
}

void Scanner::scan_direct(std::int64_t first, int count, RowCandidates* row_candidates) {
  if (rows_ == nullptr) read_rows(first, count);
  // As many queries as half of the first-level cache holds.
  const auto fit = static_cast<int>(24 * 1024 / (plan_.width * static_cast<std::int64_t>(sizeof(float)) + 1));
  const int group = std::clamp(fit / 4 * 4, 4, kDirectQueries);
  for (std::int64_t q = 0; q < num_queries_; q += group) {
    const int queries = static_cast<int>(std::min<std::int64_t>(group, num_queries_ - q));
    for (int r = 0; r < count; r += kDirectRows) {
      const int part = std::min(kDirectRows, count - r);
      plan_.kernels->score_tile(queries_.data() + q * plan_.width, plan_.width, queries, rows_ + r * row_stride_,
                                row_stride_, part, plan_.width, scores_.data(), kDirectRows);
      for (int i = 0; i < queries; ++i) {
        const float* scores = scores_.data() + i * kDirectRows;
        const int hits = plan_.kernels->collect(scores, part, threshold_[static_cast<std::size_t>(q + i)],
                                                row_candidates == nullptr ? nullptr : row_threshold_.data() + r, positions_.data());
        if (hits == 0) continue;
        for (int h = 0; h < hits; ++h) {
          const std::uint32_t at = positions_[static_cast<std::size_t>(h)];
          offer(q + i, first + r + at, scores[at], row_candidates);
        }
        update_thresholds(q + i, q + i + 1, first + r + part);
      }
    }
  }
  risen_.clear();
  counters_.direct += num_queries_ * count;
}

void Scanner::read_rows(std::int64_t first, int count) {
  if (plan_.row_ids == nullptr) {
    rows_ = pool_.read(first, count, row_scratch_.data(), &row_stride_);
    return;
  }
  for (int r = 0; r < count; ++r) pool_.read_row(plan_.row_ids[first + r], row_scratch_.data() + r * plan_.width);
  rows_ = row_scratch_.data();
  row_stride_ = plan_.width;
}

void Scanner::encode(std::int64_t first, int count) {
  const int padded = static_cast<int>(round_up(count, kPanel));
  block_.codes = codes_.data();
  block_.stride = plan_.row_bytes;
  if (!stored_codes_) {
    if (rows_ == nullptr) read_rows(first, count);
    plan_.filter->encode_rows(rows_, row_stride_, count, plan_.width, plan_.row_bytes, codes_.data(), scale_.data(),
                              norm_.data(), error_.data());
  } else {
    const std::uint16_t* stored = pool_.halves(first);
    plan_.filter->measure_rows(stored, plan_.pool.row_stride, count, plan_.pool.cols, norm_.data(), error_.data());
    const auto* codes = reinterpret_cast<const std::uint8_t*>(stored);
    const std::int64_t stride = plan_.pool.row_stride * 2;
    for (auto* values : {&scale_, &norm_, &error_}) std::fill(values->begin() + count, values->begin() + padded, 0.0f);
    if (count == padded) {
      block_.codes = codes;
      block_.stride = stride;
    } else {  // the filter reads whole groups: not beyond the end of the memory
      for (int r = 0; r < padded; ++r)
        std::memcpy(codes_.data() + r * plan_.row_bytes, codes + std::min(r, count - 1) * stride,
                    static_cast<std::size_t>(plan_.row_bytes));
    }
  }
  block_.row_bytes = plan_.row_bytes;
  block_.groups = padded / kPanel;
  for (int g = 0; g < block_.groups; ++g) {
    const auto at = static_cast<std::size_t>(g);
    group_norm_[at] = *std::max_element(norm_.begin() + g * kPanel, norm_.begin() + (g + 1) * kPanel);
    group_error_[at] = *std::max_element(error_.begin() + g * kPanel, error_.begin() + (g + 1) * kPanel);
  }
  block_.scale = scale_.data();
  block_.group_norm = group_norm_.data();
  block_.group_error = group_error_.data();
  block_.constant = margin_.absolute;
}

Ahead Scanner::memory_ahead(std::int64_t first, std::int64_t count) const {
  return plan_.row_ids == nullptr ? pool_.memory(first, count) : Ahead{};
}

// Each panel fetches its share of the rows to come.
Ahead Scanner::share_ahead(std::int64_t first, std::int64_t count, std::int64_t panel) const {
  const std::int64_t begin = count * panel / padded_tile_, end = count * (panel + kPanel) / padded_tile_;
  return memory_ahead(first + begin, end - begin);
}

FilterPanel Scanner::panel(std::int64_t begin) const {
  const auto at = static_cast<std::size_t>(begin);
  return {panels_.data() + begin * plan_.row_bytes / 4, offset_.data() + at, unit_.data() + at,
          threshold_.data() + at,                           slope_.data() + at,  lift_.data() + at};
}

void Scanner::scan_filtered(std::int64_t first, int count, std::int64_t ahead, RowCandidates* row_candidates) {
  encode(first, count);
  block_.row_threshold = row_candidates == nullptr ? nullptr : row_threshold_.data();
  int dense_tiles = 0, tiles = 0;
  for (std::int64_t p = 0; p < num_queries_; p += kPanel) {
    block_.ahead = share_ahead(first + count, ahead, p);
    const int hits = plan_.filter->filter_block(block_, panel(p), hits_.data(), dense_.data());
    for (int h = 0; h < hits; ++h) {
      const FilterHit& hit = hits_[static_cast<std::size_t>(h)];
      rescore(p + hit.query, hit.row, first, count, row_candidates);
    }
    for (int g = 0; g < block_.groups; ++g) {
      if (!dense_[static_cast<std::size_t>(g)]) continue;
      score_dense(p, g * kPanel, std::min(kPanel, count - g * kPanel), first, row_candidates);
      ++dense_tiles;
    }
    tiles += block_.groups;
  }
  end_filtered(first, count, dense_tiles, tiles, row_candidates);
}

void Scanner::end_filtered(std::int64_t first, int count, std::int64_t dense, std::int64_t groups, RowCandidates* row_candidates) {
  score_batch(first, row_candidates);
  for (const std::int64_t q : risen_) update_thresholds(q, q + 1, first + count);
  risen_.clear();
  counters_.filtered += num_queries_ * count;
  if (2 * dense > groups) direct_blocks_ = kRetryAfter;
}

void Scanner::scan_sample(std::int64_t first, int count, std::int64_t ahead) {
  const Maxima maxima{maxima_.data(), plan_.slots, plan_.run, static_cast<int>(first / plan_.run % plan_.slots)};
  if (plan_.filter != nullptr) {
    encode(first, count);
    for (std::int64_t p = 0; p < num_queries_; p += kPanel) {
      block_.ahead = share_ahead(first + count, ahead, p);
      Maxima here = maxima;
      here.best += p * plan_.slots;
      plan_.filter->raise_maxima(block_, panel(p), here);
    }
    for (int g = 0; g < block_.groups; ++g) {
      if (!std::isfinite(block_.group_norm[g]) || !std::isfinite(block_.group_error[g])) continue;
      norm_sum_ += block_.group_norm[g];
      error_sum_ += block_.group_error[g];
      ++groups_;
    }
    counters_.filtered += num_queries_ * count;
    return;
  }
  if (rows_ == nullptr) read_rows(first, count);
  for (std::int64_t q = 0; q < num_queries_; ++q)
    for (int r = 0; r < count; r += kDirectRows) {
      const int part = std::min(kDirectRows, count - r);
      plan_.kernels->score_tile(queries_.data() + q * plan_.width, plan_.width, 1, rows_ + r * row_stride_, row_stride_, part,
                                plan_.width, scores_.data(), kDirectRows);
      for (int i = 0; i < part; ++i) {
        const std::int64_t slot = (first + r + i) / plan_.run % plan_.slots;
        float& best = maxima_[static_cast<std::size_t>((q / kPanel * plan_.slots + slot) * kPanel + q % kPanel)];
        best = scores_[static_cast<std::size_t>(i)] > best ? scores_[static_cast<std::size_t>(i)] : best;
      }
    }
  counters_.direct += num_queries_ * count;
}

float Scanner::mean_margin(std::int64_t q) const {
  if (groups_ == 0) return 0.0f;
  const auto i = static_cast<std::size_t>(q);
  return static_cast<float>((slope_[i] * norm_sum_ + lift_[i] * error_sum_) / static_cast<double>(groups_));
}

void Scanner::rescore(std::int64_t q, int row, std::int64_t first, int count, RowCandidates* row_candidates) {
  if (row >= count || q >= num_queries_) return;  // padding
  batch_.push_back({q, row});
  if (batch_.size() == kBatch) score_batch(first, row_candidates);
}

void Scanner::score_batch(std::int64_t first, RowCandidates* row_candidates) {
  const float *queries[kBatch], *rows[kBatch];
  float scores[kBatch];
  for (std::size_t i = 0; i < batch_.size(); ++i) {
    queries[i] = queries_.data() + batch_[i].query * plan_.width;
    rows[i] = row(first, batch_[i].row, static_cast<int>(i));
  }
  plan_.kernels->score_pairs(queries, rows, static_cast<int>(batch_.size()), plan_.width, scores);
  for (std::size_t i = 0; i < batch_.size(); ++i) offer(batch_[i].query, first + batch_[i].row, scores[i], row_candidates);
  counters_.rescored += static_cast<std::int64_t>(batch_.size());
  batch_.clear();
}

// Row `at` of the block as fp32; `slot` is a place for it if it has to be converted.
const float* Scanner::row(std::int64_t first, int at, int slot) {
  if (rows_ != nullptr) {
    const float* found = rows_ + at * row_stride_;
    if (plan_.codes != nullptr)  // nobody has read it yet
      for (std::int64_t d = 0; d < plan_.width; d += 16) __builtin_prefetch(found + d, 0, 2);
    return found;
  }
  float* to = row_scratch_.data() + slot * plan_.width;
  pool_.read_row(first + at, to);
  return to;
}

void Scanner::score_dense(std::int64_t panel, int begin, int part, std::int64_t first, RowCandidates* row_candidates) {
  const int queries = static_cast<int>(std::min<std::int64_t>(kPanel, num_queries_ - panel));
  std::int64_t stride = row_stride_;
  const float* rows = rows_ != nullptr ? rows_ + begin * stride : pool_.read(first + begin, part, row_scratch_.data(), &stride);
  plan_.kernels->score_tile(queries_.data() + panel * plan_.width, plan_.width, queries, rows, stride, part, plan_.width,
                            scores_.data(), kDirectRows);
  for (int q = 0; q < queries; ++q) {
    const float* scores = scores_.data() + q * kDirectRows;
    const int hits = plan_.kernels->collect(scores, part, threshold_[static_cast<std::size_t>(panel + q)],
                                            row_candidates == nullptr ? nullptr : row_threshold_.data() + begin, positions_.data());
    for (int h = 0; h < hits; ++h) {
      const std::uint32_t at = positions_[static_cast<std::size_t>(h)];
      offer(panel + q, first + begin + at, scores[at], row_candidates);
    }
  }
  counters_.direct += static_cast<std::int64_t>(queries) * part;
}

}  // namespace tgq
