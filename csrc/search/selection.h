// Top-k selection: the order of hits, and the buffer that keeps the best of them.
//
// Everything that decides *which* rows are returned is here, in functions that compile for the host and the device, so
// that every backend returns the same rows. Scores and rows are joined into one 64-bit key:
//
//     key = order_bits(score) << 32 | ~row
//
// A larger key is a better hit: the score decides, a tie goes to the lower row. -0 equals +0. The key 0 is no hit; NaN
// has that key. Keys of one search are distinct, so the k best are one set and every way to find it gives the same
// answer, whatever the threads, splits or order of arrival.
#pragma once

#include <cstdint>

#include "common/float_bits.h"

namespace tgq {

using Key = std::uint64_t;

constexpr Key kNoKey = 0;
constexpr std::uint32_t kMaxK = 2048;

// Maps a score that is not NaN to an unsigned integer of the same order; -0 and +0 to the same one. The result is never
// zero: -inf, the lowest, gives 0x007fffff.
TGQ_HD inline std::uint32_t order_bits(float score) {
  const std::uint32_t bits = float_bits(score);
  if (bits == 0x80000000u) return 0x80000000u;  // -0 as +0
  return (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
}

TGQ_HD inline float score_of_bits(std::uint32_t ordered) {
  return bits_float((ordered & 0x80000000u) ? (ordered & 0x7fffffffu) : ~ordered);
}

TGQ_HD inline Key make_key(float score, std::uint32_t row) {
  return is_nan(score) ? kNoKey : (static_cast<Key>(order_bits(score)) << 32) | static_cast<std::uint32_t>(~row);
}

TGQ_HD inline float key_score(Key key) { return score_of_bits(static_cast<std::uint32_t>(key >> 32)); }
TGQ_HD inline std::uint32_t key_row(Key key) { return ~static_cast<std::uint32_t>(key); }

// A threshold is a key that hits must exceed. This one lets every score >= `score` pass, on any row.
TGQ_HD inline Key threshold_at(float score) {
  return is_nan(score) ? kNoKey : (static_cast<Key>(order_bits(score)) << 32) - 1;
}

// The lowest score with which row `first_row`, or a later one, can still exceed `threshold`: what a filter compares with. Rows
// that arrive in rising order lose ties with the threshold's own row, so equal scores stop passing once k of them are kept.
TGQ_HD inline float threshold_score(Key threshold, std::uint32_t first_row) {
  std::uint32_t ordered = static_cast<std::uint32_t>(threshold >> 32);
  if (static_cast<std::uint32_t>(~first_row) <= static_cast<std::uint32_t>(threshold)) ++ordered;
  if (ordered <= 0x007fffffu) return bits_float(0xff800000u);  // nothing known yet: -inf
  if (ordered >= 0xff800000u) return bits_float(0x7f800000u);
  return score_of_bits(ordered);
}

// The better hits of one query, in a buffer that the caller owns. Append until full; compact keeps the k best and raises
// the threshold. Nothing that could be among the k best is ever dropped.
struct Candidates {
  Key* keys;
  std::uint32_t capacity;  // > k
  std::uint32_t k;
  std::uint32_t count;
  Key threshold;  // only larger keys are kept

  TGQ_HD void reset(Key initial_threshold) {
    count = 0;
    threshold = initial_threshold;
  }

  // Whether `key` was kept.
  TGQ_HD bool push(Key key);

  // Keeps the k best keys (unordered) and raises the threshold to the k-th when there are k.
  TGQ_HD void compact();
};

TGQ_HD inline void swap_keys(Key& a, Key& b) {
  const Key t = a;
  a = b;
  b = t;
}

// Reorders keys[0, count) so that its k largest come first; 0 < k < count. Keys are distinct.
TGQ_HD inline void select_largest(Key* keys, std::uint32_t count, std::uint32_t k) {
  std::uint32_t low = 0, high = count - 1;  // the boundary lies in [low, high]
  while (low < high) {
    // Median of three as the pivot, moved to `high`.
    const std::uint32_t middle = low + (high - low) / 2;
    if (keys[middle] < keys[low]) swap_keys(keys[middle], keys[low]);
    if (keys[high] < keys[low]) swap_keys(keys[high], keys[low]);
    if (keys[middle] < keys[high]) swap_keys(keys[middle], keys[high]);
    const Key pivot = keys[high];
    // Every key moves, whichever side it belongs to: which is as likely as not, and a branch would be mispredicted.
    std::uint32_t larger = low;
    for (std::uint32_t i = low; i < high; ++i) {
      const Key key = keys[i];
      keys[i] = keys[larger];
      keys[larger] = key;
      larger += key > pivot ? 1 : 0;
    }
    swap_keys(keys[larger], keys[high]);
    if (larger == k || larger + 1 == k) return;
    if (larger < k) low = larger + 1;
    else high = larger - 1;
  }
}

TGQ_HD inline void Candidates::compact() {
  if (count > k) {
    select_largest(keys, count, k);
    count = k;
  }
  if (count < k) return;
  Key lowest = keys[0];
  for (std::uint32_t i = 1; i < k; ++i) lowest = keys[i] < lowest ? keys[i] : lowest;
  if (lowest > threshold) threshold = lowest;
}

TGQ_HD inline bool Candidates::push(Key key) {
  if (key <= threshold) return false;
  if (count == capacity) {
    compact();
    if (key <= threshold) return false;
  }
  keys[count++] = key;
  return true;
}

// Rank to take in a sample of one row in `stride` so that its score is, most likely, below the k-th best of the whole
// pool: mean + 4 standard deviations + 4 of the number of top-k rows that the sample holds.
TGQ_HD inline std::uint32_t sample_rank(std::uint32_t k, std::uint32_t stride) {
  const std::uint32_t mean = (k + stride - 1) / stride;
  std::uint32_t root = 0;
  while ((root + 1) * (root + 1) <= 16 * mean) ++root;  // threshold(4 sqrt(mean))
  return mean + root + 5;
}

}  // namespace tgq
