// The steps of the CUDA search, run on the host: selection by thread blocks, the margin against a model of the tensor cores, and
// the plans.
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "cuda_host.h"

namespace {

using namespace tgq;
using namespace tgq::cuda;

void test_selection() {
  HostBlock block;
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
    select_best(block, static_cast<std::uint32_t>(list.size()), limit, [&](std::uint32_t i) { return list[i]; }, scratch);
    std::sort(keys.begin(), keys.end(), std::greater<Key>());
    keys.resize(std::min<std::size_t>(keys.size(), limit));
    CHECK(scratch.count == keys.size());
    if (!keys.empty()) CHECK(scratch.lowest == keys.back());
    std::uint32_t size = 1;
    while (size < scratch.count) size *= 2;
    std::fill(scratch.keys + scratch.count, scratch.keys + size, kNoKey);
    sort_descending(block, scratch.keys, size);
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
        const float least = filter_threshold(dot, margin_slope(m, norm, error), margin_lift(m, norm, error), m.absolute,
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
          CHECK(plan.coded_rows == (dtype == DType::f32 || cols % 8 != 0));
          std::int64_t next = 0, samples = 0;
          for (const Phase& phase : plan.phases) {
            CHECK(phase.rows >= 1 && phase.rows <= plan.chunk_rows && phase.limit <= plan.best_capacity);
            CHECK(phase.first + (phase.rows - 1) * phase.step < rows);
            // A threshold from the sample is not expected to let more pass than half of the buffer takes.
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
      CHECK(plan.tile_queries <= kSkinnyQueries && !plan.coded_rows && plan.bound_tiles == 0);
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

}  // namespace

int main() {
  test_selection();
  test_lanes_give_the_fixed_order_dot();
  test_rounding_to_bf16();
  test_margin();
  test_splits();
  test_plans();
  test_choice_of_engine();
  return 0;
}
