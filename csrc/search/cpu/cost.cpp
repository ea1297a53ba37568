#include "search/cpu/cost.h"

#include <algorithm>
#include <cmath>

namespace tgq {
namespace {

constexpr double kStream = 0.1;   // a byte that is read in order
constexpr double kApart = 0.12;   // one that is not
constexpr double kEncode = 0.6;   // a column of a row, read and encoded
constexpr double kHit = 16;       // a pair that the first level leaves
constexpr double kRefine = 8;     // its bound from the second
constexpr double kRandom = 40;    // a row that is read out of order, beside its bytes
constexpr double kNear = 4;       // a row of the block at hand

}  // namespace

double rows_work(double queries, double rows, double width) {
  constexpr double kColumn = 0.4, kHandling = 32;  // a few instructions and a read beside the columns
  return queries * rows * (width + kHandling) * kColumn;
}

double codes_work(const Costs& costs, double queries, double rows, double lines) {
  const double tiles = std::ceil(queries / costs.panel) * costs.panel;
  return std::max(rows * (64 * lines + 8) * kStream, tiles * rows * (costs.bound + costs.line * lines));
}

double cost_with_codes(const Costs& costs, const Call& call) {
  const double columns = 64 * call.lines;
  const double hit = kHit + (call.second ? kRefine + columns / 8 : 0.0);
  // In a triangle rows are scored block by block, so that many queries find them in the cache.
  const double fetch = call.triangle ? kNear : kRandom + call.dims * call.item_bytes * kApart;
  const double exact = fetch + call.dims * costs.exact;
  const double first = codes_work(costs, call.triangle ? call.queries / 2 : call.queries, call.rows, call.lines);
  return first + call.queries * call.rows * (call.left * hit + call.rescored * exact);
}

double cost_without(const Costs& costs, const Call& call) {
  const double read = call.rows * call.dims * call.item_bytes * kStream;
  if (call.few || costs.pair == 0) return std::max(read, call.queries * call.rows * call.dims * costs.exact);
  constexpr double kPanel = 32;
  const double tiles = std::ceil(call.queries / kPanel) * kPanel;
  const double filter = tiles * call.rows * (costs.pair + costs.column * call.dims);
  // Three times as many as hits reach a sampled threshold; where rows are as good as each other, no filter tells them apart.
  const double scored = std::max(3 * call.hits, call.rows * call.rescored);
  return call.rows * call.dims * kEncode + (call.triangle ? filter / 2 : filter) + call.queries * scored * (kHit + call.dims * costs.exact);
}

}  // namespace tgq
