// The steps of the CUDA search that decide what is returned, for a thread block each. The device gives every query (or tile of
// rows) a block; the C++ tests run the same steps on the host.
#pragma once

#include <cstdint>

#include "search/cuda/dot.h"
#include "search/cuda/filter.h"
#include "search/cuda/job.h"
#include "search/cuda/select.h"

namespace tgq::cuda {

constexpr std::uint32_t kQueryParts = 128;  // threads that share the sums of a query
constexpr std::uint32_t kRowParts = 16;     // threads that share the sums of a pool row

struct PrepareScratch {
  float squares[kBoundRows * kRowParts];
  float errors[kBoundRows * kRowParts];
  std::uint32_t nans;
};

template <class Type>
TGQ_HD std::uint16_t code_bits(typename Type::Stored stored, bool keep) {
  if constexpr (sizeof(stored) == 2) {
    if (keep) return stored;
  }
  return round_to_bf16(Type::value(stored));
}

TGQ_HD inline float code_value(DType code_dtype, std::uint16_t bits) {
  return code_dtype == DType::f16 ? F16::value(bits) : BF16::value(bits);
}

// threshold_score of any row, for a comparison; +inf where nothing is wanted any more.
TGQ_HD inline float comparable_threshold(Key threshold) {
  return threshold == ~kNoKey ? bits_float(0x7f800000u) : threshold_score(threshold, 0);
}

// Hit `i` of the answer so far.
TGQ_HD inline Key resumed_key(const Job& job, std::uint32_t q, std::uint32_t i) {
  const std::size_t at = static_cast<std::size_t>(q) * job.k + i;
  return job.indices[at] < 0 ? kNoKey : make_key(job.scores[at], static_cast<std::uint32_t>(job.indices[at]));
}

// What query q is known to exceed before the first row: its k-th best hit of other parts of the pool.
TGQ_HD inline Key initial_threshold(const Job& job, std::uint32_t q) {
  return job.resume ? resumed_key(job, q, job.k - 1) : kNoKey;
}

// The turn of query q in a self-join: what waits for it becomes its hits, to be rescored and merged like any.
template <class Block>
TGQ_HD void take_pending(Block& block, const Job& job, std::uint32_t q) {
  const std::uint32_t count = job.pending_count[q];
  const bool overflow = count > job.pending_capacity;
  const std::uint32_t* from = job.pending + static_cast<std::size_t>(q) * job.pending_capacity;
  Key* hits = job.hits + static_cast<std::size_t>(q) * job.hit_capacity;
  block.each(overflow ? 0 : count, [&](std::uint32_t i) { hits[i] = from[i]; });
  block.each(1, [&](std::uint32_t) {
    if (q == 0) *job.num_listed = 0;
    job.kept[q] = 0;
    job.hit_count[q] = overflow ? job.hit_capacity + 1 : count;
  });
}

// Converts query q, bounds its norms and resets its state.
template <class Block>
TGQ_HD void prepare_query(Block& block, const Job& job, std::uint32_t q, PrepareScratch& s) {
  const std::int64_t size = job.queries.cols, stride = job.queries.col_stride;
  float* values = job.query_values + static_cast<std::int64_t>(q) * size;
  block.each(1, [&](std::uint32_t) { s.nans = 0; });
  with_type(job.queries.dtype, [&](auto type) {
    using Type = decltype(type);
    const auto* from = static_cast<const typename Type::Stored*>(job.queries.data) + q * job.queries.row_stride;
    block.each(kQueryParts, [&](std::uint32_t part) {
      bool nan = false;
      for (std::int64_t d = part; d < size; d += kQueryParts) {
        values[d] = Type::value(from[d * stride]);
        nan = nan || is_nan(values[d]);
      }
      if (nan) block.add(&s.nans, 1u);
    });
    if (job.direct) return;
    const bool dead = s.nans != 0, keep = job.code_dtype == job.queries.dtype;
    std::uint16_t* codes = job.query_codes + static_cast<std::int64_t>(q) * job.depth;
    block.each(kQueryParts, [&](std::uint32_t part) {
      float squares = 0.0f, errors = 0.0f;
      for (std::int64_t d = part; d < job.depth; d += kQueryParts) {
        // A query without valid scores becomes zeros, which pass no threshold.
        const std::uint16_t bits = dead || d >= size ? std::uint16_t{0} : code_bits<Type>(from[d * stride], keep);
        codes[d] = bits;
        if (dead || d >= size) continue;
        const float kept = code_value(job.code_dtype, bits), lost = values[d] - kept;
        squares = fmaf(kept, kept, squares);
        errors = fmaf(lost, lost, errors);
      }
      s.squares[part] = squares;
      s.errors[part] = errors;
    });
  });
  if (job.known_thresholds) {
    take_pending(block, job, q);
    return;
  }
  block.each(1, [&](std::uint32_t) {
    const bool dead = s.nans != 0;
    const Key known = initial_threshold(job, q), forced = job.has_forced_threshold ? threshold_at(job.forced_threshold) : kNoKey;
    const Key threshold = dead ? ~kNoKey : forced > known ? forced : known;
    job.threshold[q] = threshold;
    job.kept[q] = 0;
    job.state[q] = (dead ? kDead : 0u) | (job.has_forced_threshold ? kSampled : 0u);
    if (q == 0) *job.num_listed = 0;
    if (job.direct) return;
    float squares = 0.0f, errors = 0.0f;
    for (std::uint32_t part = 0; part < kQueryParts; ++part) {
      squares += s.squares[part];
      errors += s.errors[part];
    }
    const float norm = norm_bound(squares), error = norm_bound(errors);
    job.slope[q] = margin_slope(job.margin, norm, error);
    job.lift[q] = margin_lift(job.margin, norm, error);
    job.threshold_score[q] = comparable_threshold(threshold);
    job.hit_count[q] = 0;
    if (job.pending != nullptr) job.pending_count[q] = 0;
  });
}

// Bounds the norms of the rows of one tile of a phase and, where the pool itself will not do, writes their codes.
template <class Block>
TGQ_HD void prepare_rows(Block& block, const Job& job, const Phase& phase, std::uint32_t tile, PrepareScratch& s) {
  const std::int64_t size = job.pool.cols, stride = job.pool.col_stride;
  const std::int64_t begin = static_cast<std::int64_t>(tile) * kBoundRows;
  const std::int64_t left = phase.rows - begin;
  const std::uint32_t count = left < kBoundRows ? static_cast<std::uint32_t>(left) : kBoundRows;
  const bool keep = job.code_dtype == job.pool.dtype;
  with_type(job.pool.dtype, [&](auto type) {
    using Type = decltype(type);
    const auto* pool = static_cast<const typename Type::Stored*>(job.pool.data);
    block.each(kBoundRows * kRowParts, [&](std::uint32_t item) {
      const std::uint32_t row = item / kRowParts, part = item % kRowParts;
      float squares = 0.0f, errors = 0.0f;
      if (row < count) {
        const auto* from = pool + (phase.first + (begin + row) * phase.step) * job.pool.row_stride;
        std::uint16_t* codes = job.row_codes == nullptr ? nullptr : job.row_codes + (begin + row) * job.depth;
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
        for (std::int64_t d = part; d < size; d += kRowParts) {
          const typename Type::Stored stored = from[d * stride];
          const std::uint16_t bits = code_bits<Type>(stored, keep);
          const float kept = code_value(job.code_dtype, bits), lost = Type::value(stored) - kept;
          squares = fmaf(kept, kept, squares);
          errors = fmaf(lost, lost, errors);
          if (codes != nullptr) codes[d] = bits;
        }
        if (codes != nullptr && size + part < job.depth && part < 8) codes[size + part] = 0;
      }
      s.squares[item] = squares;
      s.errors[item] = errors;
    });
  });
  block.each(kBoundRows, [&](std::uint32_t row) {
    float squares = 0.0f, errors = 0.0f;
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
    for (std::uint32_t part = 0; part < kRowParts; ++part) {
      squares += s.squares[row * kRowParts + part];
      errors += s.errors[row * kRowParts + part];
    }
    // A row that holds NaN is nobody's hit: its neighbours keep their bound.
    s.squares[row * kRowParts] = is_nan(squares) ? 0.0f : norm_bound(squares);
    s.errors[row * kRowParts] = is_nan(squares) ? 0.0f : norm_bound(errors);
  });
  block.each(2, [&](std::uint32_t which) {
    const float* bounds = which == 0 ? s.squares : s.errors;
    float most = 0.0f;
#if defined(__CUDA_ARCH__)
#pragma unroll 8
#endif
    for (std::uint32_t row = 0; row < kBoundRows; ++row) most = fmaxf(most, bounds[row * kRowParts]);
    (which == 0 ? job.tile_norm : job.tile_error)[phase.first_tile + tile] = most;
  });
}

TGQ_HD inline bool excluded(const Job& job, std::uint32_t q, std::uint32_t row) {
  const std::int64_t* rows = job.exclude + static_cast<std::int64_t>(q) * job.exclude_width;
  for (std::int64_t i = 0; i < job.exclude_width; ++i)
    if (rows[i] == static_cast<std::int64_t>(row)) return true;
  return false;
}

TGQ_HD inline bool wanted(const Job& job, std::uint32_t q, Key key, Key threshold) {
  return key > threshold && !(job.exclude_width > 0 && excluded(job, q, key_row(key)));
}

// Joins the rescored hits of query q with its best keys and raises its threshold.
template <class Block>
TGQ_HD void merge_hits(Block& block, const Job& job, const Phase& phase, std::uint32_t q, SelectScratch& s) {
  const std::uint32_t found = job.hit_count[q], kept = job.kept[q];
  if (found == 0 && !phase.ends_sample) return;
  const Key threshold = job.threshold[q];
  const bool overflow = found > job.hit_capacity;
  Key* hits = job.hits + static_cast<std::size_t>(q) * job.hit_capacity;
  Key* best = job.best + static_cast<std::size_t>(q) * job.best_capacity;
  const std::uint32_t fresh = overflow ? 0 : found;  // an overflowing query is rescanned whole: its hits do not matter
  block.each(fresh, [&](std::uint32_t i) {
    if (!wanted(job, q, hits[i], threshold)) hits[i] = kNoKey;
  });
  select_best(block, kept + fresh, phase.limit, [&](std::uint32_t i) { return i < kept ? best[i] : hits[i - kept]; }, s);
  const std::uint32_t count = s.count;
  block.each(count, [&](std::uint32_t i) { best[i] = s.keys[i]; });
  block.each(1, [&](std::uint32_t) {
    Key raised = count == phase.limit && s.lowest > threshold ? s.lowest : threshold;
    std::uint32_t state = job.state[q];
    job.kept[q] = count;
    if (phase.ends_sample && !overflow) {
      if (count == phase.limit) {
        const Key sampled = threshold_at(key_score(s.lowest)), known = initial_threshold(job, q);
        raised = sampled > known ? sampled : known;
        if (sampled > known) state |= kSampled;
      } else {
        raised = state & kDead ? ~kNoKey : initial_threshold(job, q);
      }
      job.kept[q] = 0;
    }
    if (overflow) {
      state |= kOverflow;
      raised = ~kNoKey;  // nothing more is wanted from the filter
    }
    job.state[q] = state;
    job.threshold[q] = raised;
    job.threshold_score[q] = comparable_threshold(raised);
    job.hit_count[q] = 0;
  });
}

// Whether query q has to be scanned exactly: because it overflowed, because its sampled threshold was too high, or because
// every query is.
TGQ_HD inline bool needs_scan(const Job& job, std::uint32_t q) {
  const std::uint32_t state = job.state[q];
  if (state & kDead) return false;
  return job.direct || (state & kOverflow) || ((state & kSampled) && job.kept[q] < job.k);
}

TGQ_HD inline void start_scan(const Job& job, std::uint32_t q) {
  job.kept[q] = 0;
  job.threshold[q] = initial_threshold(job, q);
}

// Joins the lists that the blocks of the exact scan made for the listed query at `position`.
template <class Block>
TGQ_HD void merge_scan(Block& block, const Job& job, std::uint32_t position, SelectScratch& s) {
  const Split split = split_work(*job.num_listed, job.direct_queries, job.direct_blocks, job.pool.rows);
  if (position >= *job.num_listed || split.splits == 1) return;  // one block has written the result already
  const std::uint32_t q = job.listed[position];
  const std::uint32_t slot = position % job.direct_queries;
  const std::uint32_t first_item = position / job.direct_queries * split.splits;
  // Finished lists hold k keys at most.
  const auto get = [&](std::uint32_t i) {
    const std::size_t list = static_cast<std::size_t>(first_item + i / job.k) * job.direct_queries + slot;
    return i % job.k < job.owned_count[list] ? job.owned[list * job.owned_capacity + i % job.k] : kNoKey;
  };
  select_best(block, split.splits * job.k, job.k, get, s);
  Key* best = job.best + static_cast<std::size_t>(q) * job.best_capacity;
  block.each(s.count, [&](std::uint32_t i) { best[i] = s.keys[i]; });
  block.each(1, [&](std::uint32_t) { job.kept[q] = s.count; });
}

// Sorts the best keys of query q, and those of the answer so far, and writes the answer.
template <class Block>
TGQ_HD void finish(Block& block, const Job& job, std::uint32_t q, SelectScratch& s) {
  const std::uint32_t kept = job.kept[q];
  if (job.resume && kept == 0) return;  // nothing to add
  std::uint32_t size = 1;
  while (size < job.k) size *= 2;
  const Key* best = job.best + static_cast<std::size_t>(q) * job.best_capacity;
  std::uint32_t count = kept < job.k ? kept : job.k;
  if (job.resume) {
    select_best(block, kept + job.k, job.k, [&](std::uint32_t i) { return i < kept ? best[i] : resumed_key(job, q, i - kept); }, s);
    count = s.count;
    block.each(size, [&](std::uint32_t i) {
      if (i >= count) s.keys[i] = kNoKey;
    });
  } else {
    block.each(size, [&](std::uint32_t i) { s.keys[i] = i < count ? best[i] : kNoKey; });
  }
  sort_descending(block, s.keys, size);
  float* scores = job.scores + static_cast<std::size_t>(q) * job.k;
  std::int64_t* indices = job.indices + static_cast<std::size_t>(q) * job.k;
  block.each(job.k, [&](std::uint32_t i) {
    const Key key = s.keys[i];
    scores[i] = key == kNoKey ? bits_float(0xff800000u) : key_score(key);
    indices[i] = key == kNoKey ? -1 : static_cast<std::int64_t>(key_row(key));
  });
}

}  // namespace tgq::cuda
