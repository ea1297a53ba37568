// Every instruction set against the definition: identical bits from the exact kernels, and a filter whose margin holds.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "kernel_sets.h"
#include "search/cpu/filter.h"
#include "search/cpu/kernels.h"
#include "search/cpu/scanner.h"
#include "search/search.h"
#include "search/selection.h"

using namespace tgq;

namespace {

constexpr int kKinds = 8;  // the last kind of random_values
constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> random_values(std::size_t size, unsigned seed, int kind) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& v : values) {
    v = normal(random);
    if (kind == 1) v = 1.0f + 1e-6f * v;                            // tightly clustered
    if (kind == 2) v *= std::exp2(static_cast<float>(static_cast<int>(random() % 60) - 30));  // wide range of exponents
    if (kind == 3) v *= 1e-40f;                                     // denormals
    if (kind == 4) v = v > 0 ? 1.00390625f : -1.00390625f;          // halfway between two bf16 values
    if (kind == 5) v *= 3e17f;                                      // squares near the limit
    if (kind == 6 && random() % 50 == 0) v = random() % 2 ? kInf : std::nanf("");
    if (kind == 7) v *= 1e-22f;                                     // squares are denormal
    if (kind == 8 && random() % 30 == 0) v *= 1000.0f;              // coordinates that take the range of a byte
  }
  return values;
}

bool same_bits(float a, float b) { return (std::isnan(a) && std::isnan(b)) || a + 0.0f == b + 0.0f; }

void test_exact_kernels(const NamedSet& isa) {
  for (int kind = 0; kind <= kKinds; ++kind)
    for (int size : {1, 7, 16, 33, 130, 256}) {
      const int width = (size + kLanes - 1) / kLanes * kLanes, queries = 19, rows = 37;
      std::vector<float> q(queries * width), x(rows * width);
      const std::vector<float> values = random_values((queries + rows) * size, static_cast<unsigned>(size), kind);
      for (int i = 0; i < queries + rows; ++i)
        for (int d = 0; d < size; ++d) (i < queries ? q[i * width + d] : x[(i - queries) * width + d]) = values[i * size + d];
      std::vector<float> out(queries * 64, 123.0f);
      for (int nq : {1, 3, 4, 5, queries})
        for (int nr : {1, 4, 15, 16, rows}) {
          isa.kernels->score_tile(q.data(), width, nq, x.data(), width, nr, width, out.data(), 64);
          for (int i = 0; i < nq; ++i)
            for (int r = 0; r < nr; ++r) {
              const float expected = fixed_order_dot(q.data() + i * width, x.data() + r * width, size);
              CHECK_NOTE(same_bits(out[i * 64 + r], expected), "%s kind %d size %d: %a, expected %a", isa.name, kind, size,
                         out[i * 64 + r], expected);
            }
        }
      std::vector<const float*> a, b;
      for (int i = 0; i < queries; ++i) {
        a.push_back(q.data() + i * width);
        b.push_back(x.data() + (i * 5 % rows) * width);
      }
      isa.kernels->score_pairs(a.data(), b.data(), queries, width, out.data());
      for (int i = 0; i < queries; ++i) CHECK(same_bits(out[i], fixed_order_dot(a[i], b[i], size)));
    }
}

void test_collect(const NamedSet& isa) {
  std::vector<float> scores = random_values(61, 3, 0);
  scores[5] = std::nanf("");
  scores[6] = kInf;
  scores[40] = -kInf;
  for (float threshold : {-kInf, -1.0f, 0.0f, scores[9], kInf})
    for (int count : {0, 1, 8, 15, 16, 17, 61}) {
      std::vector<uint32_t> at(64, 99);
      const int found = isa.kernels->collect(scores.data(), count, threshold, nullptr, at.data());
      int expected = 0;
      for (int i = 0; i < count; ++i)
        if (scores[i] >= threshold) CHECK(at[expected++] == static_cast<uint32_t>(i));
      CHECK(found == expected);
      const std::vector<float> thresholds = random_values(61, 4, 0);
      const int either = isa.kernels->collect(scores.data(), count, threshold, thresholds.data(), at.data());
      expected = 0;
      for (int i = 0; i < count; ++i)
        if (scores[i] >= threshold || scores[i] >= thresholds[i]) CHECK(at[expected++] == static_cast<uint32_t>(i));
      CHECK(either == expected);
    }
}

void test_conversions(const NamedSet& isa) {
  std::vector<uint16_t> all(65536);
  for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
  std::vector<float> got(65536), expected(65536);
  isa.kernels->half_to_float(all.data(), 65533, got.data());
  scalar_kernels().half_to_float(all.data(), 65533, expected.data());
  for (int i = 0; i < 65533; ++i) CHECK(same_bits(got[i], expected[i]));
  isa.kernels->bfloat_to_float(all.data(), 65533, got.data());
  for (int i = 0; i < 65533; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(i) << 16;
    CHECK(same_bits(got[i], bits_float(bits)));
  }
  CHECK(scalar_kernels().half_to_float != nullptr && expected[0x3c00] == 1.0f && expected[0x0001] == 0x1p-24f);
  CHECK(expected[0xfbff] == -65504.0f && expected[0x7c00] == kInf && expected[0x0400] == 0x1p-14f);
}

// One vector's codes as real numbers.
double coded(const Filter& filter, const uint8_t* codes, int d, float scale, int zero) {
  if (filter.code_bytes == 1) return static_cast<double>(scale) * (zero == 0 ? static_cast<int8_t>(codes[d]) : codes[d] - zero);
  uint16_t bits;
  std::memcpy(&bits, codes + 2 * d, sizeof bits);
  return (bits & 0x7f80) == 0 ? 0.0 : bits_float(static_cast<std::uint32_t>(bits) << 16);  // denormals are read as zero
}

// The theorem of docs/topk.md: |fixed-order fp32 dot - filter score| <= margin, and the filter's own bounds on the norms.
void test_margin(const Filter& filter, int kind, int size) {
  const int width = (size + kLanes - 1) / kLanes * kLanes, count = 2 * kPanel;
  const int bytes = (size * filter.code_bytes + kCodeLine - 1) / kCodeLine * kCodeLine;
  std::vector<float> q(kPanel * width), x(count * width);
  const std::vector<float> values = random_values((kPanel + count) * size, static_cast<unsigned>(size * 10 + kind), kind);
  for (int i = 0; i < kPanel + count; ++i)
    for (int d = 0; d < size; ++d) (i < kPanel ? q[i * width + d] : x[(i - kPanel) * width + d]) = values[i * size + d];
  Buffer<uint8_t> query_codes(kPanel * bytes), codes(count * bytes);
  Buffer<uint32_t> panel(kPanel * bytes / 4);
  std::vector<float> qs(kPanel), qn(kPanel), qe(kPanel), xs(count), xn(count), xe(count);
  filter.begin();
  filter.encode_queries(q.data(), width, kPanel, width, bytes, query_codes.data(), qs.data(), qn.data(), qe.data());
  pack_panel(query_codes.data(), bytes, panel.data());
  filter.encode_rows(x.data(), width, count - 3, width, bytes, codes.data(), xs.data(), xn.data(), xe.data());
  std::fill(x.end() - 3 * width, x.end(), 0.0f);  // the last rows are padding
  // Bounds of the coded values, taken back out of the codes.
  for (int r = 0; r < count + kPanel && kind != 6; ++r) {
    const bool row = r < count;
    const uint8_t* from = row ? codes.data() + r * bytes : query_codes.data() + (r - count) * bytes;
    const float* real = row ? x.data() + r * width : q.data() + (r - count) * width;
    double kept = 0, lost = 0;
    for (int d = 0; d < size; ++d) {
      const double value = coded(filter, from, d, row ? xs[r] : qs[r - count], row ? kByteZero : 0);
      kept += value * value;
      lost += (real[d] - value) * (real[d] - value);
    }
    CHECK(std::sqrt(kept) <= (row ? xn[r] : qn[r - count]) && std::sqrt(lost) <= (row ? xe[r] : qe[r - count]));
  }
  const MarginConstants c = margin_constants(filter, size);
  std::vector<float> slope(kPanel), lift(kPanel), threshold(kPanel), norm(2), error(2);
  std::vector<int32_t> offset(kPanel);
  for (int i = 0; i < kPanel; ++i) {
    slope[i] = qe[i] + c.exact_error * (qn[i] + qe[i]) + c.filter_error * qn[i];
    lift[i] = (qn[i] + qe[i]) * (1.0f + c.exact_error);
    for (int d = 0; d < bytes; ++d) offset[i] -= kByteZero * static_cast<int8_t>(query_codes[i * bytes + d]);
  }
  for (int g = 0; g < 2; ++g)
    for (int r = g * kPanel; r < (g + 1) * kPanel; ++r) {
      norm[g] = std::fmax(norm[g], xn[r]);
      error[g] = std::fmax(error[g], xe[r]);
    }
  const Ahead ahead{reinterpret_cast<const char*>(x.data()), width * 4, width * 4, 3};
  const FilterBlock block{codes.data(), bytes, bytes, 2, xs.data(), norm.data(), error.data(), nullptr, c.absolute, ahead};
  std::vector<FilterHit> hits(2 * kDense + kPanel * kPanel);
  uint8_t dense[2];
  double worst = 0;
  int checked = 0;
  for (int r0 = 0; r0 < count; ++r0) {
    // Thresholds at the exact scores of one row, for four queries (more would make the tile dense): the row must survive.
    std::fill(threshold.begin(), threshold.end(), std::numeric_limits<float>::max());
    for (int turn = 0; turn < 4; ++turn) {
      const int i = (4 * r0 + turn) % kPanel;
      threshold[i] = fixed_order_dot(q.data() + i * width, x.data() + r0 * width, size);
      if (std::isnan(threshold[i])) threshold[i] = kInf;
    }
    const FilterPanel queries{panel.data(), offset.data(), qs.data(), threshold.data(), slope.data(), lift.data()};
    const int n = filter.filter_block(block, queries, hits.data(), dense);
    const int g = r0 / kPanel;
    if (dense[g]) continue;  // such a tile is scored exactly as a whole
    ++checked;
    for (int turn = 0; turn < 4; ++turn) {
      const int i = (4 * r0 + turn) % kPanel;
      bool survived = false;
      for (int h = 0; h < n; ++h)
        if (hits[h].row == r0 && hits[h].query == i) {
          survived = true;
          const double exact = fixed_order_dot(q.data() + i * width, x.data() + r0 * width, size);
          const double margin = static_cast<double>(slope[i]) * norm[g] + static_cast<double>(lift[i]) * error[g] + c.absolute;
          if (std::isfinite(exact) && std::isfinite(margin)) {
            const double gap = std::fabs(exact - hits[h].score);
            CHECK_NOTE(gap <= margin, "%s kind %d size %d: gap %g, margin %g", filter.name, kind, size, gap, margin);
            worst = std::fmax(worst, gap / margin);
          }
        }
      CHECK_NOTE(survived, "%s kind %d size %d: query %d lost row %d", filter.name, kind, size, i, r0);
    }
  }
  // A sample: one row a set gives the scores themselves, within the margin; longer sets give the largest of them.
  const FilterPanel queries{panel.data(), offset.data(), qs.data(), threshold.data(), slope.data(), lift.data()};
  std::vector<float> single(count * kPanel, -kInf), sets(3 * kPanel, -kInf), expected(3 * kPanel, -kInf);
  filter.raise_maxima(block, queries, {single.data(), count, 1, 0});
  for (int r = 0; r < count && kind != 6; ++r)
    for (int i = 0; i < kPanel; ++i) {
      const double exact = fixed_order_dot(q.data() + i * width, x.data() + r * width, size);
      const double margin =
          static_cast<double>(slope[i]) * norm[r / kPanel] + static_cast<double>(lift[i]) * error[r / kPanel] + c.absolute;
      if (std::isfinite(exact) && std::isfinite(margin)) CHECK(std::fabs(exact - single[r * kPanel + i]) <= margin);
    }
  // Sums of byte codes are exact, whatever the codes: nothing saturates on the way.
  for (int r = 0; r < count && filter.code_bytes == 1 && kind != 6; ++r)
    for (int i = 0; i < kPanel; ++i) {
      int whole = 0;
      for (int d = 0; d < bytes; ++d) whole += (codes[r * bytes + d] - kByteZero) * static_cast<int8_t>(query_codes[i * bytes + d]);
      const float expected_score = static_cast<float>(whole) * xs[r] * qs[i];
      CHECK_NOTE(single[r * kPanel + i] == expected_score, "%s kind %d size %d", filter.name, kind, size);
    }
  for (int run : {1, 2, 8, 32}) {
    std::fill(sets.begin(), sets.end(), -kInf);
    std::fill(expected.begin(), expected.end(), -kInf);
    filter.raise_maxima(block, queries, {sets.data(), 3, run, 2});
    for (int r = 0; r < count; ++r)
      for (int i = 0; i < kPanel; ++i) {
        float& most = expected[(r / run + 2) % 3 * kPanel + i];
        most = std::fmax(most, single[r * kPanel + i]);  // never NaN
      }
    for (int i = 0; i < 3 * kPanel; ++i) CHECK_NOTE(sets[i] == expected[i], "%s kind %d run %d", filter.name, kind, run);
  }
  filter.end();
  // The bound is no formality: a filter without a margin would lose rows on such data.
  if (kind == 0 && size >= 130) CHECK_NOTE(worst > 0.01, "%g", worst);
  if (kind != 6 && kind != 5) CHECK_NOTE(checked >= kPanel, "kind %d: %d", kind, checked);
}

}  // namespace

int main() {
  for (const NamedSet& isa : kernel_sets()) {
    test_exact_kernels(isa);
    test_collect(isa);
    test_conversions(isa);
    const bool plain = isa.kernels == &scalar_kernels();
    const Filter* filter = plain ? &scalar_filter() : isa.filter;
    for (int kind = 0; kind <= kKinds; ++kind)
      for (int size : {1, 31, 64, 130, 300})
        if (!plain || size <= 130) test_margin(*filter, kind, size);
    std::printf("kernels %s: all passed\n", isa.name);
  }
  Isa isa;
  CHECK(!find_isa("no such thing", &isa));
}
