// Attacks the selection core: key order, thresholds, the candidate buffer, selection and merging.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "search/selection.h"

using namespace tgq;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

void test_key_order() {
  const std::vector<float> rising{-kInf, -3e38f, -1.0f, -1e-38f, -1e-45f, 0.0f, 1e-45f, 1e-38f, 1.0f, 3e38f, kInf};
  for (std::size_t i = 0; i + 1 < rising.size(); ++i) {
    CHECK(order_bits(rising[i]) < order_bits(rising[i + 1]));
    CHECK(make_key(rising[i], 0) < make_key(rising[i + 1], 0xffffffffu));
  }
  for (float score : rising) {
    CHECK(make_key(score, 0xffffffffu) > kNoKey);
    CHECK(make_key(score, 3) > make_key(score, 4));
    CHECK(key_score(make_key(score, 9)) == score);
    CHECK(key_row(make_key(score, 9)) == 9);
  }
  CHECK(make_key(-0.0f, 5) == make_key(0.0f, 5));
  CHECK(make_key(std::nanf(""), 0) == kNoKey);
  CHECK(make_key(-std::nanf(""), 0) == kNoKey);
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) {
    const float a = bits_float(static_cast<std::uint32_t>(random())), b = bits_float(static_cast<std::uint32_t>(random()));
    if (std::isnan(a) || std::isnan(b)) continue;
    CHECK((a < b) == (order_bits(a) < order_bits(b)));
    CHECK(score_of_bits(order_bits(a)) == a);
  }
}

// threshold_score is the lowest score that row `first_row` can have to exceed the threshold.
void test_threshold_score() {
  std::mt19937 random(2);
  for (int i = 0; i < 100000; ++i) {
    const float score = bits_float(static_cast<std::uint32_t>(random()));
    if (std::isnan(score)) continue;
    const std::uint32_t row = static_cast<std::uint32_t>(random()), next = static_cast<std::uint32_t>(random());
    const Key threshold = make_key(score, row);
    const float lowest = threshold_score(threshold, next);
    if (score == kInf) continue;  // nothing above it to name: +inf passes the filter and loses at the buffer
    CHECK(make_key(lowest, next) > threshold);
    CHECK(make_key(std::nextafterf(lowest, -kInf), next) <= threshold);
  }
  CHECK(threshold_score(kNoKey, 0) == -kInf);
  CHECK(threshold_score(threshold_at(2.5f), 1000) == 2.5f);
  CHECK(make_key(2.5f, 0xffffffffu) > threshold_at(2.5f));
  CHECK(make_key(std::nextafterf(2.5f, 0.0f), 0) <= threshold_at(2.5f));
  CHECK(threshold_at(std::nanf("")) == kNoKey);
}

std::vector<Key> reference(std::vector<Key> keys, std::size_t k) {
  std::sort(keys.begin(), keys.end(), std::greater<Key>());
  keys.resize(std::min(keys.size(), k));
  return keys;
}

void check_buffer(const std::vector<Key>& stream, std::uint32_t k, std::uint32_t capacity) {
  std::vector<Key> memory(capacity);
  Candidates best{memory.data(), capacity, k, 0, kNoKey};
  for (Key key : stream) best.push(key);
  best.compact();
  std::vector<Key> kept(best.keys, best.keys + best.count);
  std::sort(kept.begin(), kept.end(), std::greater<Key>());
  CHECK(kept == reference(stream, k));
  if (kept.size() == k) CHECK(best.threshold == kept.back());
}

void test_candidates() {
  std::mt19937_64 random(3);
  for (std::uint32_t k : {1u, 2u, 3u, 17u, 100u, 2048u})
    for (std::uint32_t spare : {1u, 2u, 16u, 500u})
      for (std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{k}, std::size_t{k} + 1, std::size_t{5000}}) {
        std::vector<Key> stream(size);
        for (std::size_t i = 0; i < size; ++i) stream[i] = (random() % 64 + 1) << 32 | i;  // many equal scores
        std::shuffle(stream.begin(), stream.end(), random);
        check_buffer(stream, k, k + spare);
        std::sort(stream.begin(), stream.end());
        check_buffer(stream, k, k + spare);
        std::reverse(stream.begin(), stream.end());
        check_buffer(stream, k, k + spare);
      }
}

void test_select_largest() {
  std::mt19937_64 random(4);
  for (int trial = 0; trial < 3000; ++trial) {
    const std::uint32_t size = 2 + static_cast<std::uint32_t>(random() % 300);
    const std::uint32_t k = 1 + static_cast<std::uint32_t>(random() % (size - 1));
    std::vector<Key> keys(size);
    for (std::uint32_t i = 0; i < size; ++i) keys[i] = i + 1;
    switch (trial % 4) {
      case 0: std::shuffle(keys.begin(), keys.end(), random); break;
      case 1: std::reverse(keys.begin(), keys.end()); break;
      case 2: std::rotate(keys.begin(), keys.begin() + size / 2, keys.end()); break;  // organ pipe halves
      default: break;
    }
    select_largest(keys.data(), size, k);
    for (std::uint32_t i = 0; i < k; ++i) CHECK(keys[i] > size - k);
    std::sort(keys.begin(), keys.end());
    for (std::uint32_t i = 0; i < size; ++i) CHECK(keys[i] == i + 1);
  }
}

// The sample's rank is a true bound on how often the threshold fails: far below one in a thousand on random data.
void test_sample_rank() {
  std::mt19937 random(6);
  for (std::uint32_t k : {1u, 10u, 100u, 1000u}) {
    const std::uint32_t rank = sample_rank(k, 16);
    int failures = 0;
    for (int trial = 0; trial < 20000; ++trial) {
      std::uint32_t inside = 0;  // how many of the k best rows are in a sample of one in sixteen
      for (std::uint32_t i = 0; i < k; i += 1) inside += random() % 16 == 0;
      failures += inside >= rank;
      if (trial > 2000 && k == 1000) break;
    }
    CHECK_NOTE(failures <= 4, "k %u: %d failures", k, failures);
  }
}

}  // namespace

int main() {
  test_key_order();
  test_threshold_score();
  test_candidates();
  test_select_largest();
  test_sample_rank();
  std::puts("selection: all passed");
}
