// Whole CUDA searches through the steps that the kernels run, on the host: equal to the CPU search bit for bit.
#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda_host.h"

namespace {

using namespace tgq;
using namespace tgq::cuda;

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
        r.tuning.has_forced_threshold = true;  // a sample that failed for every query
        r.tuning.forced_threshold = 1e30f;
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
        r.tuning.has_forced_threshold = true;
        r.tuning.forced_threshold = 1e30f;
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

// A sample that misleads: its rows are the best, so fewer than k rows reach the threshold taken from it.
void test_a_threshold_from_the_sample_is_verified() {
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

// Parts after the first know their thresholds: on random data few rows of them are hits.
void test_parts_go_on_from_known_thresholds() {
  Values queries, pool;
  fill(queries, numbers(2 * 32, ""), 2, 32, DType::bf16);
  fill(pool, numbers(8000 * 32, ""), 8000, 32, DType::bf16);
  CudaRequest request;
  request.queries = queries.matrix;
  request.pool = pool.matrix;
  request.k = 10;
  request.tuning.engine = Engine::portable;
  HostDevice device;
  same(in_parts(request, {3, false}, device, {0, 6000}), on_cpu(request), "known thresholds");
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
      r.tuning.has_forced_threshold = true;
      r.tuning.forced_threshold = static_cast<float>(below(9)) - 4.0f;
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

// What is finished, or to be scanned anyway, must cost no more atomics: on a device they would be millions.
void test_finished_queries_take_no_hits() {
  for (const Engine engine : {Engine::portable, Engine::skinny}) {
    Values queries, pool;
    std::vector<float> values = numbers(2 * 16, "");
    values[3] = std::nanf("");
    values[20] = std::nanf("");
    fill(queries, values, 2, 16, DType::f32);
    fill(pool, numbers(4000 * 16, ""), 4000, 16, DType::bf16);
    CudaRequest request;
    request.queries = queries.matrix;
    request.pool = pool.matrix;
    request.k = 10;
    request.tuning.engine = engine;
    HostDevice dead;
    compare(request, dead, "dead queries");
    CHECK_NOTE(dead.hits == 0, "%lld hits of dead queries", static_cast<long long>(dead.hits));
    fill(queries, numbers(2 * 16, "clustered"), 2, 16, DType::f32);
    fill(pool, numbers(4000 * 16, "clustered"), 4000, 16, DType::bf16);
    request.tuning.hit_capacity = 20;
    request.tuning.chunk_rows = 100;
    HostDevice overflowed;
    compare(request, overflowed, "overflowed queries");
    CHECK(overflowed.scanned == 2);
    CHECK_NOTE(overflowed.hits <= 2 * (20 + 100), "%lld hits of overflowed queries", static_cast<long long>(overflowed.hits));
  }
}

// A row that holds NaN passes by itself, not with all the rows that share its bound.
void test_nan_rows_pass_alone() {
  HostDevice with, without;
  for (HostDevice* device : {&without, &with}) {
    Values queries, pool;
    random_bits.seed(11);
    std::vector<float> values = numbers(4000 * 16, "");
    fill(queries, numbers(2 * 16, ""), 2, 16, DType::f32);
    for (std::size_t row = 100; device == &with && row < 4000; row += 1000) values[row * 16 + 5] = std::nanf("");
    fill(pool, values, 4000, 16, DType::f32);
    CudaRequest request;
    request.queries = queries.matrix;
    request.pool = pool.matrix;
    request.k = 10;
    request.tuning.engine = Engine::portable;
    compare(request, *device, "rows with NaN");
  }
  CHECK_NOTE(with.hits <= without.hits + 2 * 30, "%lld hits, %lld without NaN", static_cast<long long>(with.hits),
             static_cast<long long>(without.hits));
}

}  // namespace

int main() {
  test_norms_are_bounded_once();
  test_searches();
  test_parts();
  test_a_threshold_from_the_sample_is_verified();
  test_parts_go_on_from_known_thresholds();
  test_random_searches();
  test_strided_views_and_empty_sides();
  test_the_filter_filters();
  test_finished_queries_take_no_hits();
  test_nan_rows_pass_alone();
  return 0;
}
