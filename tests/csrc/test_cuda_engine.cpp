// The steps of the CUDA search, run on the host: selection by teams, the margin against a model of the tensor cores, the
// plans, and whole searches, which must equal the CPU's bit for bit.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/engine.h"

namespace {

using namespace tgq;
using namespace tgq::cuda;

std::mt19937 random_bits(7);

// Takes the bodies of a step in a new order each time: steps must not depend on it.
struct HostTeam {
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
float tensor_core_dot(const float* a, const float* b, std::uint32_t size, std::uint32_t step) {
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

std::vector<float> shadow_row(const std::uint16_t* bits, std::uint32_t depth, DType shadow) {
  std::vector<float> values(depth);
  for (std::uint32_t d = 0; d < depth; ++d) values[d] = shadow_value(shadow, bits[d]);
  return values;
}

float exact_score(const Job& job, std::uint32_t q, std::int64_t row) {
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

FilterRow filter_row(const FilterJob& job, std::uint32_t index) {
  FilterRow row{std::vector<float>(job.depth), 0, 0};
  with_type(job.dtype, [&](auto type) {
    using Type = decltype(type);
    const auto* from = static_cast<const typename Type::Stored*>(job.rows) + index * job.row_stride;
    float squares = 0, errors = 0;
    for (std::uint32_t d = 0; d < job.depth; ++d) {
      row.values[d] = shadow_value(job.shadow, shadow_bits<Type>(from[d], job.shadow == job.dtype));
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
  HostTeam team;
  PrepareScratch prepare;
  SelectScratch select;
  std::int64_t hits = 0, scanned = 0, bounded = 0;  // rows whose norms were bounded

  int prepare_queries(const Job& job) {
    for (std::uint32_t q = 0; q < job.num_queries; ++q) prepare_query(team, job, q, prepare);
    return 0;
  }
  int prepare_rows(const Job& job, const Phase& phase) {
    bounded += phase.rows;
    for (std::uint32_t tile = 0; tile * kBoundRows < phase.rows; ++tile) cuda::prepare_rows(team, job, phase, tile, prepare);
    return 0;
  }
  int filter(const FilterJob& job) {
    const auto* queries = static_cast<const std::uint16_t*>(job.queries);
    for (std::uint32_t i = 0; i < job.num_rows; ++i) {
      const FilterRow row = filter_row(job, i);
      for (std::uint32_t q = 0; q < job.num_queries; ++q) {
        const std::vector<float> query = shadow_row(queries + q * job.query_stride, job.depth, job.shadow);
        const float least = job.tile_norm != nullptr
                                ? tile_threshold(job, q, i / kBoundRows)
                                : threshold(job.floor_score[q], job.slope[q], job.lift[q], job.absolute, row.norm, row.error);
        if (tensor_core_dot(query.data(), row.values.data(), job.depth, 8) < least) continue;
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
    for (std::uint32_t q = 0; q < job.num_queries; ++q) merge_hits(team, job, phase, q, select);
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
        Candidates best{job.owned + list * job.owned_capacity, job.owned_capacity, job.k, 0, job.floor[q]};
        const std::int64_t end = split_begin(job.pool.rows, split.splits, part + 1);
        for (std::int64_t row = split_begin(job.pool.rows, split.splits, part); row < end; ++row) {
          const Key key = make_key(exact_score(job, q, row), job.first_row + static_cast<std::uint32_t>(row));
          if (wanted(job, q, key, best.floor)) best.push(key);
        }
        best.compact();
        job.owned_count[list] = best.count;
        if (split.splits > 1) continue;
        std::copy(best.keys, best.keys + best.count, job.best + std::size_t{q} * job.best_capacity);
        job.kept[q] = best.count;
      }
    }
    for (std::uint32_t position = 0; position < job.num_queries; ++position) merge_scan(team, job, position, select);
    return 0;
  }
  int finish(const Job& job) {
    for (std::uint32_t q = 0; q < job.num_queries; ++q) cuda::finish(team, job, q, select);
    return 0;
  }
};

struct Values {
  std::vector<float> floats;
  std::vector<std::uint16_t> halves;
  Matrix matrix;
};

// A matrix of the type, from fp32 values that are rounded to it.
void fill(Values& v, const std::vector<float>& values, std::int64_t rows, std::int64_t cols, DType dtype) {
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

std::vector<float> numbers(std::size_t count, const std::string& kind) {
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
void on_host(CudaRequest request, DeviceFacts facts, HostDevice& device, Answer& answer) {
  const Plan plan = make_plan(request, facts);
  std::vector<char> memory(plan.workspace_bytes + 256, static_cast<char>(0x5a));  // a workspace comes as it is
  const auto address = (reinterpret_cast<std::uintptr_t>(memory.data()) + 255) / 256 * 256;
  request.workspace = reinterpret_cast<void*>(address);
  request.workspace_bytes = plan.workspace_bytes;
  request.scores = answer.scores.data();
  request.rows = answer.rows.data();
  CHECK(run(device, plan, request) == 0);
}

Answer no_answer(const CudaRequest& request) {
  const auto size = static_cast<std::size_t>(request.queries.rows) * request.k;
  return {std::vector<float>(size, 7.0f), std::vector<std::int64_t>(size, -7)};
}

// Searches the pool in parts that begin at `begins`, each going on from the answer of those before.
Answer in_parts(const CudaRequest& request, DeviceFacts facts, HostDevice& device, const std::vector<std::int64_t>& begins) {
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

Answer on_cpu(const CudaRequest& from) {
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

void same(const Answer& found, const Answer& expected, const std::string& note) {
  for (std::size_t i = 0; i < expected.rows.size(); ++i) {
    CHECK_NOTE(found.rows[i] == expected.rows[i], "%s at %zu: %lld, not %lld", note.c_str(), i,
               static_cast<long long>(found.rows[i]), static_cast<long long>(expected.rows[i]));
    CHECK_NOTE(float_bits(found.scores[i]) == float_bits(expected.scores[i]), "%s at %zu", note.c_str(), i);
  }
}

void compare(const CudaRequest& request, HostDevice& device, const std::string& note, int multiprocessors = 3) {
  Answer found = no_answer(request);
  on_host(request, {multiprocessors, false}, device, found);
  same(found, on_cpu(request), note);
}

void test_selection() {
  HostTeam team;
  SelectScratch scratch;
  for (int turn = 0; turn < 60; ++turn) {
    // Every fourth time as many keys as wanted, among holes: no hole may take a place.
    const std::uint32_t count = 1 + random_bits() % 700, limit = turn % 4 == 0 ? count : 1 + random_bits() % 300;
    const std::uint64_t mask = turn % 3 == 0 ? ~0ull : turn % 3 == 1 ? 0x3ffull : 0xff000000000003ffull;
    std::vector<Key> keys;
    while (keys.size() < count) {
      const Key key = ((static_cast<Key>(random_bits()) << 32) | random_bits()) & mask;
      if (key != kNoKey && std::find(keys.begin(), keys.end(), key) == keys.end()) keys.push_back(key);
    }
    std::vector<Key> list = keys;
    for (std::uint32_t i = 0; i < 40; ++i) list.insert(list.begin() + random_bits() % (list.size() + 1), kNoKey);
    select_best(team, static_cast<std::uint32_t>(list.size()), limit, [&](std::uint32_t i) { return list[i]; }, scratch);
    std::sort(keys.begin(), keys.end(), std::greater<Key>());
    keys.resize(std::min<std::size_t>(keys.size(), limit));
    CHECK(scratch.count == keys.size());
    if (!keys.empty()) CHECK(scratch.lowest == keys.back());
    std::uint32_t size = 1;
    while (size < scratch.count) size *= 2;
    std::fill(scratch.keys + scratch.count, scratch.keys + size, kNoKey);
    sort_descending(team, scratch.keys, size);
    CHECK(std::equal(keys.begin(), keys.end(), scratch.keys));
  }
}

void test_lanes_give_the_fixed_order_dot() {
  for (const int size : {0, 1, 15, 16, 17, 100, 257}) {
    const std::vector<float> a = numbers(static_cast<std::size_t>(size), ""), b = numbers(static_cast<std::size_t>(size), "");
    float sums[kLanes];
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) sums[lane] = lane_sum<F32>(a.data(), b.data(), 1, size, lane);
    CHECK(add_lanes(sums) == fixed_order_dot(a.data(), b.data(), size));
  }
}

void test_rounding_to_bf16() {
  CHECK(round_to_bf16(1.0f) == 0x3f80 && round_to_bf16(1.0f + 0x1.8p-8f) == 0x3f81 && round_to_bf16(-1.0f - 0x1p-9f) == 0xbf80);
  CHECK(round_to_bf16(1.0f + 0x1p-8f) == 0x3f80 && round_to_bf16(1.0f + 0x3p-8f) == 0x3f82);  // ties to even
  CHECK(round_to_bf16(3.4e38f) == 0x7f80 && is_nan(BF16::value(round_to_bf16(bits_float(0x7f800001u)))));
}

// The margin covers the worst tensor core allowed, against fp64, and against the fixed-order dot.
void test_margin() {
  for (const std::string kind : {"", "integers", "halfway", "clustered", "denormal", "exponents", "equal", "stored"}) {
    for (const std::uint32_t size : {1u, 8u, 64u, 257u, 1024u}) {
      for (const std::uint32_t step : {4u, 8u, 16u}) {
        const std::vector<float> a = numbers(size, kind), b = numbers(size, kind);
        std::vector<float> ra(size), rb(size);
        float squares[4] = {};
        double exact = 0;
        for (std::uint32_t d = 0; d < size; ++d) {
          ra[d] = BF16::value(round_to_bf16(a[d]));
          rb[d] = BF16::value(round_to_bf16(b[d]));
          squares[0] += ra[d] * ra[d];
          squares[1] += (a[d] - ra[d]) * (a[d] - ra[d]);
          squares[2] += rb[d] * rb[d];
          squares[3] += (b[d] - rb[d]) * (b[d] - rb[d]);
          exact += static_cast<double>(a[d]) * b[d];
        }
        const Margin m = margin_for(size);
        const float norm = norm_bound(squares[0]), error = norm_bound(squares[1]);
        const float score = tensor_core_dot(ra.data(), rb.data(), size, step);
        const float dot = fixed_order_dot(a.data(), b.data(), size);
        const float least = threshold(dot, margin_slope(m, norm, error), margin_lift(m, norm, error), m.absolute,
                                      norm_bound(squares[2]), norm_bound(squares[3]));
        CHECK_NOTE(!(score < least), "%s, D %u", kind.c_str(), size);
        // And it is no margin that lets everything pass.
        if (kind == "halfway") CHECK(least > dot - 0.1f * size);
        if (kind != "denormal" && kind != "exponents") CHECK(std::fabs(exact - score) <= std::fabs(exact - least) + dot - least);
      }
    }
  }
}

void test_splits() {
  for (const std::int64_t rows : {0ll, 1ll, 255ll, 256ll, 1000ll, 1000000ll, 4294967295ll})
    for (const std::uint32_t listed : {0u, 1u, 8u, 31u, 33u, 4096u})
      for (const std::uint32_t blocks : {1u, 7u, 264u}) {
        const Split split = split_work(listed, 32, blocks, rows);
        CHECK(split.splits >= 1 && (split.splits == 1 || split.items() <= blocks));
        CHECK(split.groups * 32 >= listed);
        CHECK(split_begin(rows, split.splits, 0) == 0 && split_begin(rows, split.splits, split.splits) == rows);
        for (std::uint32_t i = 0; i < split.splits; ++i)
          CHECK(split_begin(rows, split.splits, i) <= split_begin(rows, split.splits, i + 1));
      }
}

void test_plans() {
  for (const std::int64_t rows : {1ll, 127ll, 5000ll, 40000ll, 1000000ll, 100000000ll})
    for (const std::uint32_t k : {1u, 100u, 1000u, 2048u})
      for (const std::int64_t cols : {8ll, 100ll, 256ll, 1024ll})
        for (const DType dtype : {DType::f32, DType::bf16}) {
          CudaRequest request;
          request.queries = {nullptr, 4096, cols, cols, 1, dtype};
          request.pool = {nullptr, rows, cols, cols, 1, dtype};
          request.k = k;
          request.tuning.engine = Engine::portable;
          const Plan plan = make_plan(request, {132, true});
          CHECK_NOTE(plan.workspace_bytes < (256u << 20), "%zu bytes", plan.workspace_bytes);
          // Streamed: parts of 32 MB in two buffers (topk_stream.py).
          CudaRequest part = request;
          part.resume = true;
          part.pool.rows = std::min<std::int64_t>(rows, (32 << 20) / (cols * (dtype == DType::f32 ? 4 : 2)));
          CHECK(make_plan(part, {132, true}).workspace_bytes + (64u << 20) < (256u << 20));
          CHECK(plan.shadow_rows == (dtype == DType::f32 || cols % 8 != 0));
          std::int64_t next = 0, samples = 0;
          for (const Phase& phase : plan.phases) {
            CHECK(phase.rows >= 1 && phase.rows <= plan.chunk_rows && phase.limit <= plan.best_capacity);
            CHECK(phase.first + (phase.rows - 1) * phase.step < rows);
            // A floor from the sample is not expected to let more pass than half of the buffer takes.
            if (phase.step == 1 && samples > 0) {
              const std::int64_t stride = plan.phases.front().step;
              const std::int64_t above = sample_rank(k, static_cast<std::uint32_t>(stride)) * stride;
              CHECK(above * phase.rows / rows <= plan.hit_capacity / 2);
            }
            if (phase.step > 1) {
              ++samples;
              CHECK(next == 0 && phase.limit < plan.hit_capacity);
              continue;
            }
            CHECK(phase.first == next && phase.limit == k);
            next += phase.rows;
          }
          CHECK(next == rows);
          CHECK(plan.phases.front().rows <= plan.hit_capacity);  // everything passes, and it fits
          CHECK(rows < 1000000 || samples > 0);
          CHECK((samples > 0) == (rows >= 40000));
          request.tuning.engine = Engine::automatic;
          CHECK(make_plan(request, {132, true}).engine == (rows <= 4096 ? Engine::direct : Engine::hopper));
          CHECK(make_plan(request, {132, false}).engine == (rows <= 4096 ? Engine::direct : Engine::portable));
        }
}

// Which engine takes a search, from the shape and layout alone.
void test_choice_of_engine() {
  const auto engine = [](std::int64_t queries, std::int64_t rows, std::int64_t cols, std::int64_t stride, DType dtype,
                         Engine wish = Engine::automatic) {
    CudaRequest request;
    request.queries = {nullptr, queries, cols, cols, 1, dtype};
    request.pool = {nullptr, rows, cols, stride, 1, dtype};
    request.k = 100;
    request.tuning.engine = wish;
    const Plan plan = make_plan(request, {132, true});
    if (plan.engine == Engine::skinny) {
      CHECK(plan.tile_queries <= kSkinnyQueries && !plan.shadow_rows && plan.bound_tiles == 0);
      CHECK(plan.workspace_bytes < (64u << 20));
      CHECK(plan.phases.back().rows == rows);  // the pool is read once
    }
    return plan.engine;
  };
  constexpr std::int64_t kMillion = 1000000;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const std::int64_t queries : {1, 16, 32, 64}) CHECK(engine(queries, kMillion, 256, 256, dtype) == Engine::skinny);
    CHECK(engine(65, kMillion, 256, 256, dtype) == Engine::hopper);
    CHECK(engine(33, kMillion, 520, 520, dtype) == Engine::hopper);  // too long for shared memory
    CHECK(engine(16, 4096, 256, 256, dtype) == Engine::direct);
    CHECK(engine(8, kMillion, 250, 250, dtype) == Engine::direct);   // rows are no multiple of 16 bytes
    CHECK(engine(9, kMillion, 250, 250, dtype) == Engine::hopper);
    CHECK(engine(16, kMillion, 256, 257, dtype) == Engine::hopper);
    CHECK(engine(32, kMillion, 2048, 2048, dtype) == Engine::hopper);
    CHECK(engine(16, kMillion, 2048, 2048, dtype) == Engine::skinny);
    CHECK(engine(1000, kMillion, 256, 256, dtype, Engine::skinny) == Engine::skinny);
    CHECK(engine(10, kMillion, 250, 250, dtype, Engine::skinny) == Engine::portable);
  }
}

// Norms are bounded once, not once for every tile of queries, unless a tile needs the rounded rows again.
void test_norms_are_bounded_once() {
  for (const DType dtype : {DType::bf16, DType::f32}) {
    Values queries, pool;
    fill(queries, numbers(5 * 16, ""), 5, 16, dtype);
    fill(pool, numbers(700 * 16, ""), 700, 16, dtype);
    CudaRequest request;
    request.queries = queries.matrix;
    request.pool = pool.matrix;
    request.k = 10;
    request.tuning.engine = Engine::portable;
    request.tuning.tile_queries = 2;
    request.tuning.chunk_rows = 200;
    HostDevice device;
    compare(request, device, "bounds");
    CHECK(device.bounded == (dtype == DType::bf16 ? 700 : 3 * 700));
  }
}

void test_searches() {
  struct Case {
    const char* kind;
    std::int64_t q, n, d;
    std::uint32_t k;
    DType query_type, pool_type;
  };
  const Case cases[] = {
      {"", 5, 700, 24, 10, DType::f32, DType::f32},          {"", 3, 300, 8, 4, DType::bf16, DType::bf16},
      {"integers", 4, 900, 16, 50, DType::f16, DType::f16},  {"integers", 4, 500, 9, 33, DType::f32, DType::f32},
      {"integers", 3, 400, 12, 7, DType::f16, DType::bf16},  {"equal", 3, 600, 8, 40, DType::bf16, DType::bf16},
      {"clustered", 3, 500, 32, 20, DType::f32, DType::f32}, {"special", 6, 400, 8, 30, DType::f32, DType::f32},
      {"denormal", 2, 300, 8, 5, DType::f32, DType::f32},    {"exponents", 4, 400, 16, 12, DType::f32, DType::bf16},
      {"halfway", 3, 400, 40, 11, DType::f32, DType::f32},   {"", 2, 30, 8, 100, DType::f32, DType::f32},
      {"special", 5, 300, 16, 299, DType::bf16, DType::bf16}, {"integers", 33, 260, 8, 1, DType::f32, DType::f32},
      {"integers", 3, 300, 8, 9, DType::bf16, DType::f16},   {"special", 40, 300, 8, 20, DType::bf16, DType::bf16},
  };
  for (const Case& c : cases) {
    Values queries, pool;
    fill(queries, numbers(static_cast<std::size_t>(c.q * c.d), c.kind), c.q, c.d, c.query_type);
    fill(pool, numbers(static_cast<std::size_t>(c.n * c.d), c.kind), c.n, c.d, c.pool_type);
    std::vector<std::int64_t> exclude(static_cast<std::size_t>(c.q) * 2);
    for (std::size_t i = 0; i < exclude.size(); ++i) exclude[i] = i % 3 == 0 ? -1 : static_cast<std::int64_t>(i % static_cast<std::size_t>(c.n));
    CudaRequest request;
    request.queries = queries.matrix;
    request.pool = pool.matrix;
    request.k = c.k;
    const std::string note = std::string(c.kind) + " k " + std::to_string(c.k);
    for (int variant = 0; variant < 11; ++variant) {
      CudaRequest r = request;
      r.tuning.engine = variant == 0 ? Engine::direct : variant >= 8 ? Engine::skinny : Engine::portable;
      r.tuning.first_rows = 16;
      if (variant == 2 || variant == 8) r.tuning.sample_stride = 4;
      if (variant == 3 || variant == 9) r.tuning.hit_capacity = 20;  // overflows again and again
      if (variant == 4) {
        r.tuning.has_forced_floor = true;  // a sample that failed for every query
        r.tuning.forced_floor = 1e30f;
      }
      if (variant == 5) r.tuning.chunk_rows = 128;
      if (variant == 6) {
        r.tuning.tile_queries = 2;
        r.tuning.direct_blocks = 1;
        r.tuning.sample_stride = 2;
        r.tuning.hit_capacity = 64;
      }
      if (variant == 7 || variant == 0) {
        r.exclude = exclude.data();
        r.exclude_width = 2;
      }
      HostDevice device;
      compare(r, device, note + " variant " + std::to_string(variant));
      if (variant == 4) CHECK(device.scanned > 0 || std::string(c.kind) == "special" || std::string(c.kind) == "exponents");
    }
  }
}

// A pool in parts, each going on from the answer of those before, must give what the whole pool gives.
void test_parts() {
  struct Case {
    const char* kind;
    std::uint32_t k;
    DType type;
    bool rising;
  };
  const Case cases[] = {{"", 10, DType::f32, false},         {"", 20, DType::bf16, true},     {"integers", 40, DType::f16, false},
                        {"special", 300, DType::f32, false}, {"equal", 30, DType::bf16, false}, {"clustered", 15, DType::f32, false}};
  constexpr std::int64_t kQueries = 5, kRows = 1200, kCols = 16;
  for (const Case& c : cases) {
    Values queries, pool;
    std::vector<float> values = numbers(kRows * kCols, c.kind);
    if (c.rising) std::sort(values.begin(), values.end());
    fill(queries, numbers(kQueries * kCols, c.kind), kQueries, kCols, c.type);
    fill(pool, values, kRows, kCols, c.type);
    std::vector<std::int64_t> exclude(kQueries * 3);
    for (std::size_t i = 0; i < exclude.size(); ++i) exclude[i] = static_cast<std::int64_t>(random_bits() % kRows);
    for (int variant = 0; variant < 6; ++variant) {
      CudaRequest r;
      r.queries = queries.matrix;
      r.pool = pool.matrix;
      r.k = c.k;
      r.exclude = exclude.data();
      r.exclude_width = 3;
      r.tuning.engine = variant == 0 ? Engine::direct : variant == 1 ? Engine::skinny : Engine::portable;
      if (variant >= 2) r.tuning.first_rows = 16;
      if (variant == 2) r.tuning.sample_stride = 4;
      if (variant == 3) r.tuning.hit_capacity = 24;
      if (variant == 4) {
        r.tuning.has_forced_floor = true;
        r.tuning.forced_floor = 1e30f;
      }
      if (variant == 5) r.tuning.tile_queries = 2;
      HostDevice device;
      const Answer expected = on_cpu(r);
      const std::string note = std::string("parts, ") + c.kind + " variant " + std::to_string(variant);
      same(in_parts(r, {3, false}, device, {0, 400, 800}), expected, note);
      same(in_parts(r, {3, false}, device, {0, 5, 5, 700, 1199}), expected, note + ", uneven");
    }
  }
}

// A sample that misleads: its rows are the best, so fewer than k rows reach the floor taken from it.
void test_a_floor_from_the_sample_is_verified() {
  constexpr std::int64_t kRows = 1000, kCols = 8;
  std::vector<float> values(kRows * kCols);
  for (std::int64_t i = 0; i < kRows * kCols; ++i) values[i] = i / kCols % 4 == 0 ? 1.0f + i / kCols : -1.0f;
  Values queries, pool;
  fill(queries, std::vector<float>(2 * kCols, 1.0f), 2, kCols, DType::f32);
  fill(pool, values, kRows, kCols, DType::f32);
  CudaRequest request;
  request.queries = queries.matrix;
  request.pool = pool.matrix;
  request.k = 50;
  request.tuning.engine = Engine::portable;
  request.tuning.sample_stride = 4;
  HostDevice device;
  compare(request, device, "misleading sample");
  CHECK(device.scanned == 2);
  same(in_parts(request, {3, false}, device, {0, 600}), on_cpu(request), "misleading sample in parts");
}

// Parts after the first know their floors: on random data few rows of them are hits.
void test_parts_go_on_from_known_floors() {
  Values queries, pool;
  fill(queries, numbers(2 * 32, ""), 2, 32, DType::bf16);
  fill(pool, numbers(8000 * 32, ""), 8000, 32, DType::bf16);
  CudaRequest request;
  request.queries = queries.matrix;
  request.pool = pool.matrix;
  request.k = 10;
  request.tuning.engine = Engine::portable;
  HostDevice device;
  same(in_parts(request, {3, false}, device, {0, 6000}), on_cpu(request), "known floors");
  HostDevice first_part;
  request.pool.rows = 6000;
  in_parts(request, {3, false}, first_part, {0});
  const auto added = static_cast<long long>(device.hits - first_part.hits);
  CHECK_NOTE(added < 2 * 15, "%lld hits among the last 2000 rows", added);
  CHECK(device.scanned == 0);
}

// Random problems, layouts and tunings, whole and in parts. TGQ_FUZZ: how many.
void test_random_searches() {
  const char* wish = std::getenv("TGQ_FUZZ");
  const int turns = wish == nullptr ? 150 : std::atoi(wish);
  const auto below = [](std::uint32_t n) { return random_bits() % n; };
  const char* kinds[] = {"", "integers", "equal", "clustered", "denormal", "exponents", "halfway", "special"};
  const Engine engines[] = {Engine::automatic, Engine::direct, Engine::portable, Engine::skinny};
  for (int turn = 0; turn < turns; ++turn) {
    const std::string kind = kinds[below(8)];
    // fill() holds fp16 values that are exact in it.
    const DType types[] = {DType::f32, DType::bf16, kind == "integers" || kind == "equal" ? DType::f16 : DType::f32};
    const std::int64_t q = 1 + below(below(4) == 0 ? 40 : 4), n = below(400), d = below(3) == 0 ? 1 + below(20) : 8 * (1 + below(4));
    const std::int64_t pitch = d + (below(3) == 0 ? 8 : 0);
    Values queries, pool;
    fill(queries, numbers(static_cast<std::size_t>(q * d), kind), q, d, types[below(3)]);
    fill(pool, numbers(static_cast<std::size_t>(n * pitch + 1), kind), n, d, types[below(3)]);
    pool.matrix.row_stride = pitch;
    CudaRequest r;
    r.queries = queries.matrix;
    r.pool = pool.matrix;
    r.k = 1 + below(below(3) == 0 ? 500 : 20);
    std::vector<std::int64_t> exclude(static_cast<std::size_t>(q) * 3);
    for (std::int64_t& row : exclude) row = static_cast<std::int64_t>(below(static_cast<std::uint32_t>(n) + 2)) - 1;
    if (below(2) == 0) {
      r.exclude = exclude.data();
      r.exclude_width = 3;
    }
    r.tuning.engine = engines[below(4)];
    if (below(2) == 0) r.tuning.sample_stride = below(9);
    if (below(2) == 0) r.tuning.first_rows = 1 + below(64);
    if (below(3) == 0) r.tuning.hit_capacity = 1 + below(100);
    if (below(3) == 0) r.tuning.chunk_rows = 1 + below(200);
    if (below(3) == 0) r.tuning.tile_queries = 1 + below(8);
    if (below(3) == 0) r.tuning.direct_blocks = 1 + below(5);
    if (below(5) == 0) {
      r.tuning.has_forced_floor = true;
      r.tuning.forced_floor = static_cast<float>(below(9)) - 4.0f;
    }
    std::vector<std::int64_t> begins(1 + below(4));
    for (std::size_t i = 1; i < begins.size(); ++i) begins[i] = below(static_cast<std::uint32_t>(n) + 1);
    std::sort(begins.begin(), begins.end());
    HostDevice device;
    same(in_parts(r, {3, false}, device, begins), on_cpu(r), "random search " + std::to_string(turn) + ", " + kind);
  }
}

void test_strided_views_and_empty_sides() {
  Values queries, pool;
  fill(queries, numbers(4 * 30, ""), 4, 30, DType::f32);
  fill(pool, numbers(500 * 30, ""), 500, 30, DType::f32);
  CudaRequest request;
  request.k = 9;
  request.tuning.engine = Engine::portable;
  request.queries = {queries.floats.data() + 1, 2, 10, 60, 3, DType::f32};
  request.pool = {pool.floats.data() + 2, 250, 10, 60, 2, DType::f32};
  HostDevice device;
  compare(request, device, "strided");
  request.pool = {pool.floats.data() + 499 * 30, 500, 10, -30, 1, DType::f32};
  compare(request, device, "reversed");
  request.pool = {pool.floats.data(), 500, 10, 0, 1, DType::f32};
  compare(request, device, "one row, repeated");
  request.pool.rows = 0;
  compare(request, device, "no rows");
  request.pool = {nullptr, 70, 0, 0, 1, DType::f32};
  request.queries = {nullptr, 2, 0, 0, 1, DType::f32};
  compare(request, device, "no columns");
}

// The filter must thin out what it is meant to, not hand everything to the exact scan.
void test_the_filter_filters() {
  Values queries, pool;
  fill(queries, numbers(3 * 32, ""), 3, 32, DType::f32);
  fill(pool, numbers(6000 * 32, ""), 6000, 32, DType::f32);
  CudaRequest request;
  request.queries = queries.matrix;
  request.pool = pool.matrix;
  request.k = 10;
  request.tuning.engine = Engine::portable;
  request.tuning.first_rows = 128;
  request.tuning.sample_stride = 16;
  HostDevice device;
  compare(request, device, "random");
  CHECK(device.scanned == 0);
  CHECK_NOTE(device.hits < 3 * 900, "%lld hits", static_cast<long long>(device.hits));
}

}  // namespace

int main() {
  test_selection();
  test_lanes_give_the_fixed_order_dot();
  test_rounding_to_bf16();
  test_margin();
  test_splits();
  test_plans();
  test_choice_of_engine();
  test_norms_are_bounded_once();
  test_searches();
  test_parts();
  test_a_floor_from_the_sample_is_verified();
  test_parts_go_on_from_known_floors();
  test_random_searches();
  test_strided_views_and_empty_sides();
  test_the_filter_filters();
  return 0;
}
