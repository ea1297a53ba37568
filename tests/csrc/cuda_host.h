// A host in the place of the CUDA device: the steps of csrc/cuda/run.h, with stand-ins for the kernels' own loops, and
// the problems that they are tried on.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "search/cuda/run.h"

namespace tgq::cuda {

inline std::mt19937 random_bits(7);

// Takes the bodies of a step in a new order each time: steps must not depend on it.
struct HostBlock {
  std::vector<std::uint32_t> order;
  std::mt19937 shuffler{3};

  template <class Body>
  void each(std::uint32_t n, Body body) {
    order.resize(n);
    for (std::uint32_t i = 0; i < n; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), shuffler);
    for (std::size_t i = 0; i < n; ++i) body(order[i]);
  }
  std::uint32_t add(std::uint32_t* to, std::uint32_t value) { return (*to += value) - value; }
  void lower(Key* to, Key key) { *to = std::min(*to, key); }
};

// One step of a tensor core as docs/topk_cuda.md assumes it at its worst: addends cut off below 2^-23 of the largest one's
// exponent, the result cut off to 24 bits.
inline float tensor_core_dot(const float* a, const float* b, std::uint32_t size, std::uint32_t step) {
  float sum = 0.0f;
  for (std::uint32_t begin = 0; begin < size; begin += step) {
    std::vector<double> addends{sum};
    for (std::uint32_t d = begin; d < std::min(size, begin + step); ++d) addends.push_back(static_cast<double>(a[d]) * b[d]);
    double largest = 0, total = 0;
    for (const double v : addends) largest = std::max(largest, std::fabs(v));
    if (!std::isfinite(largest)) {
      for (const double v : addends) total += v;
      sum = static_cast<float>(total);
      continue;
    }
    if (largest == 0) continue;
    const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
    for (const double v : addends) total += std::trunc(v / unit) * unit;
    const float nearest = static_cast<float>(total);
    sum = std::fabs(static_cast<double>(nearest)) > std::fabs(total) ? std::nextafter(nearest, 0.0f) : nearest;
  }
  return sum;
}

inline std::vector<float> code_row(const std::uint16_t* bits, std::uint32_t depth, DType code_dtype) {
  std::vector<float> values(depth);
  for (std::uint32_t d = 0; d < depth; ++d) values[d] = code_value(code_dtype, bits[d]);
  return values;
}

inline float exact_score(const Job& job, std::uint32_t q, std::int64_t row) {
  float sums[kLanes];
  with_type(job.pool.dtype, [&](auto type) {
    using Type = decltype(type);
    const auto* from = static_cast<const typename Type::Stored*>(job.pool.data) + row * job.pool.row_stride;
    for (std::uint32_t lane = 0; lane < kLanes; ++lane)
      sums[lane] = lane_sum<Type>(job.query_values + q * job.queries.cols, from, job.pool.col_stride, job.queries.cols, lane);
  });
  return add_lanes(sums);
}

// A row as the filter multiplies it, and its bounds where the filter has to find them (the skinny one).
struct FilterRow {
  std::vector<float> values;
  float norm, error;
};

inline FilterRow filter_row(const FilterJob& job, std::uint32_t index) {
  FilterRow row{std::vector<float>(job.depth), 0, 0};
  with_type(job.dtype, [&](auto type) {
    using Type = decltype(type);
    const auto* from = static_cast<const typename Type::Stored*>(job.rows) + index * job.row_stride;
    float squares = 0, errors = 0;
    for (std::uint32_t d = 0; d < job.depth; ++d) {
      row.values[d] = code_value(job.code_dtype, code_bits<Type>(from[d], job.code_dtype == job.dtype));
      const float lost = Type::value(from[d]) - row.values[d];
      squares = std::fmaf(row.values[d], row.values[d], squares);
      errors = std::fmaf(lost, lost, errors);
    }
    row.norm = norm_bound(squares);
    row.error = norm_bound(errors);
  });
  return row;
}

struct HostDevice {
  HostBlock block;
  PrepareScratch prepare;
  SelectScratch select;
  std::int64_t hits = 0, scanned = 0, bounded = 0, scored = 0;  // rows whose norms were bounded, scores of the filter

  int prepare_queries(const Job& job) {
    for (std::uint32_t q = 0; q < job.num_queries; ++q) prepare_query(block, job, q, prepare);
    return 0;
  }
  int prepare_rows(const Job& job, const Phase& phase) {
    bounded += phase.rows;
    for (std::uint32_t tile = 0; tile * kBoundRows < phase.rows; ++tile) cuda::prepare_rows(block, job, phase, tile, prepare);
    return 0;
  }
  int filter(const FilterJob& job) {
    const auto* queries = static_cast<const std::uint16_t*>(job.queries);
    for (std::uint32_t i = 0; i < job.num_rows; ++i) {
      const FilterRow row = filter_row(job, i);
      for (std::uint32_t q = 0; q < job.num_queries; ++q) {
        const std::vector<float> query = code_row(queries + q * job.query_stride, job.depth, job.code_dtype);
        const float least = job.tile_norm != nullptr
                                ? tile_threshold(job, q, i / kBoundRows)
                                : filter_threshold(job.threshold_score[q], job.slope[q], job.lift[q], job.absolute, row.norm, row.error);
        const float score = tensor_core_dot(query.data(), row.values.data(), job.depth, 8);
        ++scored;
        if (job.row_threshold != nullptr && !(score < row_threshold(job, i, q))) {
          const std::uint32_t slot = job.pending_count[i]++;
          if (slot < job.pending_capacity) job.pending[std::size_t{i} * job.pending_capacity + slot] = job.first_query + q;
        }
        if (score < least) continue;
        const std::uint32_t slot = job.hit_count[q]++;
        if (slot < job.hit_capacity) job.hits[std::size_t{q} * job.hit_capacity + slot] = job.first_row + i * job.row_step;
      }
    }
    return 0;
  }
  int rescore(const Job& job) {
    for (std::uint32_t q = 0; q < job.num_queries; ++q) {
      hits += job.hit_count[q];
      if (job.hit_count[q] > job.hit_capacity) continue;
      for (std::uint32_t i = 0; i < job.hit_count[q]; ++i) {
        Key& hit = job.hits[std::size_t{q} * job.hit_capacity + i];
        const auto row = static_cast<std::uint32_t>(hit);
        hit = make_key(exact_score(job, q, row), job.first_row + row);
      }
    }
    return 0;
  }
  int merge(const Job& job, const Phase& phase) {
    for (std::uint32_t q = 0; q < job.num_queries; ++q) merge_hits(block, job, phase, q, select);
    return 0;
  }
  int scan(const Job& job) {
    for (std::uint32_t q = job.num_queries; q-- > 0;) {
      if (!needs_scan(job, q)) continue;
      start_scan(job, q);
      job.listed[(*job.num_listed)++] = q;
    }
    scanned += *job.num_listed;
    const Split split = split_work(*job.num_listed, job.direct_queries, job.direct_blocks, job.pool.rows);
    CHECK(split.splits == 1 || split.items() <= job.direct_blocks);
    for (std::uint32_t item = 0; item < split.items(); ++item) {
      const std::uint32_t part = item % split.splits;
      for (std::uint32_t slot = 0; slot < job.direct_queries; ++slot) {
        const std::uint32_t position = item / split.splits * job.direct_queries + slot;
        if (position >= *job.num_listed) continue;
        const std::uint32_t q = job.listed[position];
        const std::size_t list = std::size_t{item % job.direct_blocks} * job.direct_queries + slot;
        Candidates best{job.owned + list * job.owned_capacity, job.owned_capacity, job.k, 0, job.threshold[q]};
        const std::int64_t end = split_begin(job.pool.rows, split.splits, part + 1);
        for (std::int64_t row = split_begin(job.pool.rows, split.splits, part); row < end; ++row) {
          const Key key = make_key(exact_score(job, q, row), job.first_row + static_cast<std::uint32_t>(row));
          if (wanted(job, q, key, best.threshold)) best.push(key);
        }
        best.compact();
        job.owned_count[list] = best.count;
        if (split.splits > 1) continue;
        std::copy(best.keys, best.keys + best.count, job.best + std::size_t{q} * job.best_capacity);
        job.kept[q] = best.count;
      }
    }
    for (std::uint32_t position = 0; position < job.num_queries; ++position) merge_scan(block, job, position, select);
    return 0;
  }
  int finish(const Job& job) {
    for (std::uint32_t q = 0; q < job.num_queries; ++q) cuda::finish(block, job, q, select);
    return 0;
  }
};

struct Values {
  std::vector<float> floats;
  std::vector<std::uint16_t> halves;
  Matrix matrix;
};

// A matrix of the type, from fp32 values that are rounded to it.
inline void fill(Values& v, const std::vector<float>& values, std::int64_t rows, std::int64_t cols, DType dtype) {
  v.floats = values;
  v.halves.resize(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::bf16) v.halves[i] = round_to_bf16(values[i]);
    // Small integers and halves are exact in fp16; conversion by search over a table would be slower than this.
    if (dtype == DType::f16) {
      std::uint16_t best = 0;
      const float magnitude = std::fabs(values[i]);
      const int exponent = magnitude == 0 ? -15 : std::clamp(std::ilogb(magnitude), -15, 15);
      if (exponent > -15)
        best = static_cast<std::uint16_t>(((exponent + 15) << 10) |
                                          static_cast<int>(std::ldexp(magnitude, 10 - exponent) - 1024.0f));
      v.halves[i] = static_cast<std::uint16_t>(best | (std::signbit(values[i]) ? 0x8000u : 0u));
    }
  }
  const void* data = dtype == DType::f32 ? static_cast<const void*>(v.floats.data()) : v.halves.data();
  v.matrix = {data, rows, cols, cols, 1, dtype};
}

inline std::vector<float> numbers(std::size_t count, const std::string& kind) {
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> digit(-3, 3), exponent(-60, 50);
  std::vector<float> values(count);
  for (float& v : values) {
    if (kind == "integers") v = static_cast<float>(digit(random_bits));
    else if (kind == "equal") v = 1.0f;
    else if (kind == "clustered") v = 0.25f + 1e-5f * normal(random_bits);
    else if (kind == "denormal") v = 1e-40f * normal(random_bits);
    else if (kind == "exponents") v = std::ldexp(normal(random_bits), exponent(random_bits));
    // Exact in bf16 and positive: nothing but the cut-off sums separates filter and score.
    else if (kind == "stored") v = BF16::value(round_to_bf16(1.0f + std::fabs(normal(random_bits))));
    else if (kind == "halfway") v = (digit(random_bits) > 0 ? 1.0f : -1.0f) * (1.0f + 0x1p-8f);
    else v = normal(random_bits);
    if (kind == "special" && digit(random_bits) == 3 && digit(random_bits) == 3) {
      const float special[] = {std::nanf(""), HUGE_VALF, -HUGE_VALF, 3e38f, -0.0f};
      v = special[random_bits() % 5];
    }
  }
  return values;
}

struct Answer {
  std::vector<float> scores;
  std::vector<std::int64_t> rows;
};

// Searches the pool as it is given, adding to `answer` where the request resumes.
inline void on_host(CudaRequest request, DeviceFacts facts, HostDevice& device, Answer& answer) {
  const Plan plan = make_plan(request, facts);
  std::vector<char> memory(plan.workspace_bytes + 256, static_cast<char>(0x5a));  // a workspace comes as it is
  const auto address = (reinterpret_cast<std::uintptr_t>(memory.data()) + 255) / 256 * 256;
  request.workspace = reinterpret_cast<void*>(address);
  request.workspace_bytes = plan.workspace_bytes;
  request.scores = answer.scores.data();
  request.rows = answer.rows.data();
  CHECK(run(device, plan, request) == 0);
}

inline Answer no_answer(const CudaRequest& request) {
  const auto size = static_cast<std::size_t>(request.queries.rows) * request.k;
  return {std::vector<float>(size, 7.0f), std::vector<std::int64_t>(size, -7)};
}

// Searches the pool in parts that begin at `begins`, each going on from the answer of those before.
inline Answer in_parts(const CudaRequest& request, DeviceFacts facts, HostDevice& device,
                       const std::vector<std::int64_t>& begins) {
  Answer answer = no_answer(request);
  const std::int64_t element = request.pool.dtype == DType::f32 ? 4 : 2;
  for (std::size_t part = 0; part < begins.size(); ++part) {
    CudaRequest r = request;
    r.first_row = begins[part];
    r.resume = part > 0;
    r.pool.rows = (part + 1 < begins.size() ? begins[part + 1] : request.pool.rows) - r.first_row;
    r.pool.data = static_cast<const char*>(request.pool.data) + r.first_row * request.pool.row_stride * element;
    on_host(r, facts, device, answer);
  }
  return answer;
}

inline Answer on_cpu(const CudaRequest& from) {
  const auto size = static_cast<std::size_t>(from.queries.rows) * from.k;
  Answer answer{std::vector<float>(size), std::vector<std::int64_t>(size)};
  Request request;
  request.queries = from.queries;
  request.pool = from.pool;
  request.k = from.k;
  request.exclude = from.exclude;
  request.exclude_width = from.exclude_width;
  request.scores = answer.scores.data();
  request.rows = answer.rows.data();
  request.isa = "scalar";
  request.tuning.use_filter = 0;
  CHECK(search_cpu(request) == Status::ok);
  return answer;
}

inline void same(const Answer& found, const Answer& expected, const std::string& note) {
  for (std::size_t i = 0; i < expected.rows.size(); ++i) {
    CHECK_NOTE(found.rows[i] == expected.rows[i], "%s at %zu: %lld, not %lld", note.c_str(), i,
               static_cast<long long>(found.rows[i]), static_cast<long long>(expected.rows[i]));
    CHECK_NOTE(float_bits(found.scores[i]) == float_bits(expected.scores[i]), "%s at %zu", note.c_str(), i);
  }
}

inline void compare(const CudaRequest& request, HostDevice& device, const std::string& note, int multiprocessors = 3) {
  Answer found = no_answer(request);
  on_host(request, {multiprocessors, false}, device, found);
  same(found, on_cpu(request), note);
}

}  // namespace tgq::cuda
