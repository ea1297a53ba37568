// Selection by a thread block: the best keys of any list, exactly, and their order. No key is lost and none is chosen twice,
// because keys differ; kNoKey entries are holes.
#pragma once

#include <cstdint>

#include "search/selection.h"

namespace tgq::cuda {

// Memory that its threads share.
struct SelectScratch {
  struct Digit {
    Key prefix;          // the digits found so far, above the shift
    std::uint32_t need;  // keys still to take among those with this prefix
    std::uint32_t state;
  };
  static constexpr std::uint32_t kNone = 0, kMore = 1, kExact = 2;
  static constexpr std::uint32_t kGroup = 16;  // digits whose counts are also kept as one sum
  std::uint32_t histogram[256];
  std::uint32_t groups[256 / kGroup];
  Digit digits[8];
  std::uint32_t count;
  Key lowest;
  Key keys[kMaxK];
};

// Smallest value such that exactly min(limit, number of keys) of get(0) … get(total - 1) are not below it; radix search, a
// byte at a time from the top. Ends early where a digit's keys are all taken.
template <class Block, class Get>
TGQ_HD Key find_threshold(Block& block, std::uint32_t total, std::uint32_t limit, Get get, SelectScratch& s) {
  block.each(8, [&](std::uint32_t i) { s.digits[i].state = SelectScratch::kNone; });
  Key prefix = 0;
  std::uint32_t need = limit;
  for (std::uint32_t step = 0; step < 8; ++step) {
    const std::uint32_t shift = 56 - 8 * step;
    block.each(256, [&](std::uint32_t d) { s.histogram[d] = 0; });
    block.each(total, [&](std::uint32_t i) {
      const Key key = get(i);
      if (key == kNoKey || (step > 0 && (key >> (shift + 8)) != prefix)) return;
      block.add(&s.histogram[(key >> shift) & 255u], 1u);
    });
    constexpr std::uint32_t kGroup = SelectScratch::kGroup;
    block.each(256 / kGroup, [&](std::uint32_t g) {
      std::uint32_t sum = 0;
      for (std::uint32_t d = g * kGroup; d < (g + 1) * kGroup; ++d) sum += s.histogram[d];
      s.groups[g] = sum;
    });
    // Each digit counts what lies above it; one digit holds the boundary, none when there are too few keys.
    block.each(256, [&](std::uint32_t d) {
      std::uint32_t above = 0;
      for (std::uint32_t e = d + 1; e % kGroup != 0; ++e) above += s.histogram[e];
      for (std::uint32_t g = d / kGroup + 1; g < 256 / kGroup; ++g) above += s.groups[g];
      const std::uint32_t here = s.histogram[d];
      if (above >= need || above + here < need) return;
      s.digits[step].prefix = (prefix << 8) | d;
      s.digits[step].need = need - above;
      s.digits[step].state = here == need - above ? SelectScratch::kExact : SelectScratch::kMore;
    });
    const typename SelectScratch::Digit& found = s.digits[step];
    if (found.state == SelectScratch::kNone) return 1;  // fewer keys than wanted: all of them
    prefix = found.prefix;
    need = found.need;
    if (found.state == SelectScratch::kExact) return prefix << shift;
  }
  return prefix;
}

// Puts the `limit` best keys of get(0) … get(total - 1) into s.keys, unordered, their number into s.count and the lowest of
// them into s.lowest. limit <= kMaxK.
template <class Block, class Get>
TGQ_HD void select_best(Block& block, std::uint32_t total, std::uint32_t limit, Get get, SelectScratch& s) {
  const Key least = total <= limit ? 1 : find_threshold(block, total, limit, get, s);
  block.each(1, [&](std::uint32_t) {
    s.count = 0;
    s.lowest = ~kNoKey;
  });
  block.each(total, [&](std::uint32_t i) {
    const Key key = get(i);
    if (key == kNoKey || key < least) return;  // least is 0 where the lowest digits are all taken
    const std::uint32_t slot = block.add(&s.count, 1u);
    if (slot < limit) s.keys[slot] = key;
    block.lower(&s.lowest, key);
  });
}

// Sorts keys[0, size) descending; size is a power of two. Bitonic network.
template <class Block>
TGQ_HD void sort_descending(Block& block, Key* keys, std::uint32_t size) {
  for (std::uint32_t span = 2; span <= size; span *= 2) {
    for (std::uint32_t distance = span / 2; distance > 0; distance /= 2) {
      block.each(size / 2, [&](std::uint32_t i) {
        const std::uint32_t low = 2 * i - (i & (distance - 1)), high = low + distance;
        const bool descending = (low & span) == 0;
        if ((keys[low] < keys[high]) == descending) swap_keys(keys[low], keys[high]);
      });
    }
  }
}

}  // namespace tgq::cuda
