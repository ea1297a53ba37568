// What a search costs with stored codes and without: which of the two a call takes.
#pragma once

#include <cstdint>

namespace tgq {

// Nanoseconds on one core, as measured on 2-core Xeons with all of these instruction sets; only their ratios matter.
struct Costs {
  double exact;         // exact product, per column
  double pair, column;  // of a row and a query whose codes are made on the way: alone, and per column; no pair: no such filter
  double bound, line;   // with stored codes: alone, and per 64 columns of the first level
  int panel;            // queries that share a tile in the latter: the last tile costs as much as a full one
};

// A call, and what its sample says of the codes.
struct Call {
  double queries, rows, dims, item_bytes;
  double hits;        // rows per query that must be scored whatever the filter
  double lines;       // of the first level
  bool second;
  double left;        // share of the rows whose bound from the first level reaches the sampled threshold
  double rescored;    // share that is scored exactly in the end
  bool triangle;      // a self-join
  bool few;           // too few queries for codes on the way
};

// A scan of the rows as they are, scored exactly, and the first level of one of codes.
double rows_work(double queries, double rows, double width);
double codes_work(const Costs& costs, double queries, double rows, double lines);

double cost_with_codes(const Costs& costs, const Call& call);
double cost_without(const Costs& costs, const Call& call);

}  // namespace tgq
