// Self-joins over the upper triangle, through the steps that the kernels run: what the CPU finds, bit for bit.
#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda_host.h"

namespace {

using namespace tgq;
using namespace tgq::cuda;

CudaRequest self_join(const Values& pool, std::uint32_t k) {
  CudaRequest request;
  request.queries = request.pool = pool.matrix;
  request.k = k;
  request.self_join = true;
  request.tuning.engine = Engine::portable;
  request.tuning.self_join = 1;
  request.tuning.tile_queries = 128;
  return request;
}

// Everything that a search may meet, whole and off every tile.
void test_equals_the_cpu() {
  struct Case {
    const char* kind;
    std::int64_t n, d;
    std::uint32_t k;
    DType type;
  };
  const Case cases[] = {
      {"", 300, 16, 10, DType::f32},         {"", 257, 8, 4, DType::bf16},          {"integers", 200, 9, 50, DType::f16},
      {"equal", 200, 8, 30, DType::bf16},    {"clustered", 160, 16, 20, DType::f32}, {"special", 200, 8, 30, DType::f32},
      {"special", 140, 8, 139, DType::bf16}, {"denormal", 150, 8, 5, DType::f32},   {"exponents", 256, 16, 12, DType::bf16},
      {"halfway", 200, 24, 11, DType::f32},  {"", 100, 8, 7, DType::f32},           {"", 129, 8, 200, DType::f32},
  };
  for (const Case& c : cases) {
    Values pool;
    fill(pool, numbers(static_cast<std::size_t>(c.n * c.d), c.kind), c.n, c.d, c.type);
    std::vector<std::int64_t> own(static_cast<std::size_t>(c.n) * 2);
    for (std::int64_t i = 0; i < c.n; ++i) {
      own[static_cast<std::size_t>(2 * i)] = i;
      own[static_cast<std::size_t>(2 * i + 1)] = i % 3 == 0 ? -1 : (i * 7) % c.n;
    }
    for (int variant = 0; variant < 8; ++variant) {
      CudaRequest r = self_join(pool, c.k);
      r.tuning.first_rows = 16;
      if (variant % 2 == 1) {
        r.exclude = own.data();
        r.exclude_width = 2;
      }
      if (variant <= 2) r.tuning.sample_stride = 4;
      if (variant == 2) r.tuning.hit_capacity = 20;  // hits and what waits overflow again and again
      if (variant == 3) r.tuning.sample_stride = 0;
      if (variant == 4 || variant == 5) {
        r.tuning.has_forced_threshold = true;
        r.tuning.forced_threshold = variant == 4 ? 1e30f : 0.5f;  // a sample that failed for every query; one that did not
      }
      if (variant == 6) {
        r.tuning.chunk_rows = 200;  // not whole bounds: rounded
        r.tuning.sample_stride = 3;
      }
      if (variant == 7) {
        r.tuning.tile_queries = 300;
        r.tuning.sample_stride = 2;
        r.tuning.direct_blocks = 1;
      }
      HostDevice device;
      const std::string note = std::string("self-join, ") + c.kind + " k " + std::to_string(c.k);
      compare(r, device, note + " variant " + std::to_string(variant));
    }
  }
}

// Half of the scores, and on random data none of them twice over by an exact scan.
void test_computes_one_triangle() {
  constexpr std::int64_t kRows = 640;
  Values pool;
  fill(pool, numbers(kRows * 16, ""), kRows, 16, DType::bf16);
  CudaRequest request = self_join(pool, 10);
  request.tuning.sample_stride = 16;
  HostDevice device;
  compare(request, device, "triangle");
  CHECK(device.scanned == 0);
  // The sample, the upper triangle and what of their tiles lies below the diagonal.
  CHECK(device.scored == kRows * (kRows / 16) + (kRows * kRows + kRows * 128) / 2);
  request.self_join = false;
  HostDevice whole;
  compare(request, whole, "square");
  CHECK(whole.scored == kRows * (kRows / 16) + kRows * kRows);
}

// The margin is that of the very tile of queries: scores that rounding takes below the threshold still count, and the rows of
// earlier tiles win their ties.
void test_margin_of_each_tile() {
  constexpr std::int64_t kRows = 4 * 128, kCols = 8;
  std::vector<float> values(kRows * kCols, 1.0f + 0x1p-8f);
  std::fill_n(values.begin(), 128 * kCols, 1e-4f);
  Values pool;
  fill(pool, values, kRows, kCols, DType::f32);
  CudaRequest request = self_join(pool, 10);
  request.tuning.has_forced_threshold = true;
  request.tuning.forced_threshold = 8.06f;  // between the scores of the rounded values, 8, and the exact ones, 8.0626
  request.tuning.hit_capacity = 500;
  for (const std::int64_t tile : {128, 256}) {
    request.tuning.tile_queries = tile;
    HostDevice device;
    compare(request, device, "margins of tiles");
    CHECK(device.scanned == 128);  // the small ones, none of whose scores reaches the threshold
  }
}

// Strides, a dtype that is rounded in chunks, and a pool that is no multiple of anything.
void test_strided_pool() {
  Values pool;
  fill(pool, numbers(600 * 30, ""), 600, 30, DType::f32);
  CudaRequest request = self_join(pool, 9);
  request.queries = request.pool = {pool.floats.data() + 1, 300, 10, 60, 3, DType::f32};
  request.tuning.sample_stride = 4;
  request.tuning.chunk_rows = 128;
  HostDevice device;
  compare(request, device, "strided");
}

void test_choice() {
  const auto takes = [](std::int64_t rows, std::uint32_t k, bool self, int wish = -1, Engine engine = Engine::automatic,
                        std::int64_t first_row = 0) {
    CudaRequest request;
    request.queries = request.pool = {nullptr, rows, 256, 256, 1, DType::bf16};
    request.k = k;
    request.self_join = self;
    request.first_row = first_row;
    request.tuning.self_join = wish;
    request.tuning.engine = engine;
    const Plan plan = make_plan(request, {132, true});
    CHECK(plan.self_join || plan.pending_capacity == 0);
    if (plan.self_join) {
      CHECK(plan.tile_queries % kBoundRows == 0 && plan.chunk_rows % kBoundRows == 0);
      CHECK(plan.hit_capacity >= plan.pending_capacity);
      // Whatever tile begins: every row from it on, once, in whole bounds.
      for (std::int64_t begin = 0; begin < rows; begin += plan.tile_queries * (1 + rows / plan.tile_queries / 5)) {
        std::int64_t next = begin;
        for (const Phase& phase : triangle_phases(plan, request, begin)) {
          CHECK(phase.first == next && phase.rows <= plan.chunk_rows && phase.first_tile * kBoundRows == phase.first);
          next += phase.rows;
        }
        CHECK(next == rows);
      }
    }
    return plan.self_join;
  };
  CHECK(takes(1000000, 100, true) && !takes(1000000, 100, false) && !takes(1000000, 100, true, 0));
  CHECK(!takes(100000, 100, true) && takes(100000, 100, true, 1));
  CHECK(!takes(1000000, 2048, true) && !takes(10000000, 100, true));  // too much would wait
  CHECK(!takes(1000000, 100, true, 1, Engine::direct) && takes(1000000, 100, true, -1, Engine::portable));
  CHECK(!takes(1000000, 100, true, 1, Engine::automatic, 5));
}

// Random pools and tunings. TGQ_FUZZ: how many.
void test_random_self_joins() {
  const char* wish = std::getenv("TGQ_FUZZ");
  const int turns = wish == nullptr ? 15 : std::atoi(wish);
  const auto below = [](std::uint32_t n) { return random_bits() % n; };
  const char* kinds[] = {"", "integers", "equal", "clustered", "denormal", "exponents", "halfway", "special"};
  for (int turn = 0; turn < turns; ++turn) {
    const std::string kind = kinds[below(8)];
    const DType types[] = {DType::f32, DType::bf16, kind == "integers" || kind == "equal" ? DType::f16 : DType::f32};
    const std::int64_t n = 1 + below(450), d = below(3) == 0 ? 1 + below(20) : 8 * (1 + below(3));
    const std::int64_t pitch = d + (below(3) == 0 ? 8 : 0);
    Values pool;
    fill(pool, numbers(static_cast<std::size_t>(n * pitch + 1), kind), n, d, types[below(3)]);
    pool.matrix.row_stride = pitch;
    CudaRequest r = self_join(pool, 1 + below(below(3) == 0 ? 500 : 20));
    std::vector<std::int64_t> exclude(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < exclude.size(); ++i)
      exclude[i] = static_cast<std::int64_t>(below(9) == 0 ? below(static_cast<std::uint32_t>(n)) : i);
    if (below(2) == 0) {
      r.exclude = exclude.data();
      r.exclude_width = 1;
    }
    if (below(2) == 0) r.tuning.sample_stride = below(9);
    if (below(2) == 0) r.tuning.first_rows = 1 + below(64);
    if (below(3) == 0) r.tuning.hit_capacity = 1 + below(100);
    if (below(3) == 0) r.tuning.chunk_rows = 1 + below(400);
    if (below(3) == 0) r.tuning.tile_queries = 1 + below(400);
    if (below(5) == 0) {
      r.tuning.has_forced_threshold = true;
      r.tuning.forced_threshold = static_cast<float>(below(9)) - 4.0f;
    }
    HostDevice device;
    compare(r, device, "random self-join " + std::to_string(turn) + ", " + kind);
  }
}

}  // namespace

int main() {
  test_equals_the_cpu();
  test_computes_one_triangle();
  test_margin_of_each_tile();
  test_strided_pool();
  test_choice();
  test_random_self_joins();
  return 0;
}
