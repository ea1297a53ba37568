// The code filter for any vectors: Vector has sixteen lanes, one per row of a group.
//
//   Vector::Floats, Vector::Ints
//   set, load, multiply_add(a, b, c) = a b + c, add, least, largest, to_float, not_less(a, b): a mask, NaN counts
//   Vector::dot<Q>(group, plane_stride, lines, queries, stride, offset, sums): sums of products with Q queries
//   Vector::dot_halves(row, query, size): the product of a row in half precision and a query, in any order
#pragma once

#include "search/cpu/codes.h"

namespace tgq {
namespace {  // every kernel file its own copy

// One group of rows: what all queries share.
template <class Vector>
struct GroupView {
  typename Vector::Floats scale, rest, row_threshold;

  template <bool Symmetric>
  static GroupView of(const CodeRows& rows, int64_t first) {
    GroupView view{Vector::load(rows.scale + first), Vector::load(rows.rest + first), Vector::set(0.0f)};
    if constexpr (Symmetric) view.row_threshold = Vector::load(rows.row_threshold + first);
    return view;
  }
};

// Bounds of a group and one query, whose sums are `sums`.
template <class Vector>
inline typename Vector::Floats bound_of(const CodeQueries& queries, int q, const GroupView<Vector>& group, typename Vector::Ints sums) {
  using Floats = typename Vector::Floats;
  const Floats inner = Vector::multiply_add(Vector::to_float(sums), Vector::set(queries.unit[q]), Vector::set(queries.lift[q]));
  const Floats outer = Vector::multiply_add(group.rest, Vector::set(queries.reach[q]), Vector::set(queries.base[q]));
  return Vector::multiply_add(inner, group.scale, outer);
}

// Rows of a group that the first level leaves to one query.
template <class Vector, bool Symmetric>
inline uint32_t survivors(const CodeQueries& queries, int q, const GroupView<Vector>& group, typename Vector::Ints sums,
                          typename Vector::Floats& bound) {
  typename Vector::Floats needed = Vector::set(queries.threshold[q]);
  if constexpr (Symmetric) needed = Vector::least(needed, group.row_threshold);
  bound = bound_of<Vector>(queries, q, group, sums);
  return Vector::not_less(bound, needed);
}

// Collects the hits of a group.
struct GroupHits {
  CodeHit* to;
  int found = 0;

  template <class Vector>
  void add(uint32_t mask, typename Vector::Floats bound, int query, int first_row) {
    alignas(64) float bounds[kGroup];
    Vector::store(bounds, bound);
    for (; mask != 0; mask &= mask - 1, ++found) {
      const int lane = __builtin_ctz(mask);
      to[found] = {static_cast<uint16_t>(query), static_cast<uint16_t>(first_row + lane), bounds[lane]};
    }
  }
};

constexpr int kDotQueries = 4;
constexpr int kStreamed = 8;          // queries up to which the memory is slower than the products
constexpr int kGroupsAhead = 16;      // that are on their way then: the processor's own prefetch ends with every page

// Asks for the codes of the group kGroupsAhead after one; addresses beyond the end do no harm.
inline void fetch_ahead(const CodeRows& rows, const uint8_t* codes) {
  for (int l = 0; l < rows.lines; ++l)
    for (int b = 0; b < kLineBytes; b += 64)
      __builtin_prefetch(codes + l * rows.plane_stride + kGroupsAhead * rows.group_step * kLineBytes + b, 0, 2);
}

template <int Q, class Vector>
inline void first_dot(const CodeRows& rows, const CodeQueries& queries, const uint8_t* codes, int q, typename Vector::Ints* sums) {
  Vector::template dot<Q>(codes, rows.plane_stride, rows.lines, queries.codes + q * queries.columns, queries.columns, queries.offset + q, sums);
}

template <class Vector, bool Symmetric>
int filter_rows(const CodeRows& rows, const CodeQueries& queries, CodeHit* hits, uint8_t* dense) {
  int total = 0;
  for (int g = 0; g < rows.groups; ++g) {
    const int64_t place = g * rows.group_step;
    const uint8_t* codes = rows.codes + place * kLineBytes;
    if (queries.count <= kStreamed) fetch_ahead(rows, codes);
    const auto group = GroupView<Vector>::template of<Symmetric>(rows, place * kGroup);
    GroupHits found{hits + total};
    const auto look = [&](int q, typename Vector::Ints sums) {
      typename Vector::Floats bound;
      const uint32_t mask = survivors<Vector, Symmetric>(queries, q, group, sums, bound);
      if (mask != 0) found.add<Vector>(mask, bound, q, g * kGroup);
    };
    int q = 0;
    for (; q + kDotQueries <= queries.count; q += kDotQueries) {
      typename Vector::Ints sums[kDotQueries];
      first_dot<kDotQueries, Vector>(rows, queries, codes, q, sums);
      for (int i = 0; i < kDotQueries; ++i) look(q + i, sums[i]);
    }
    for (; q < queries.count; ++q) {
      typename Vector::Ints sums[1];
      first_dot<1, Vector>(rows, queries, codes, q, sums);
      look(q, sums[0]);
    }
    dense[g] = found.found > kDenseGroup;
    if (!dense[g]) total += found.found;
  }
  return total;
}

template <class Vector>
int filter(const CodeRows& rows, const CodeQueries& queries, CodeHit* hits, uint8_t* dense) {
  return rows.row_threshold == nullptr ? filter_rows<Vector, false>(rows, queries, hits, dense)
                                   : filter_rows<Vector, true>(rows, queries, hits, dense);
}

constexpr int kAhead = 8;  // hits whose codes are on their way

inline void fetch_second(const CodeRows& rows, int64_t row, int64_t size) {
  for (int64_t d = 0; d < size; d += 32) __builtin_prefetch(rows.second + row * size + d, 0, 2);
}

// The bound of a pair from the second level.
template <class Vector>
inline float second_bound(const CodeRows& rows, const CodeQueries& queries, int q, int64_t row) {
  const int64_t size = queries.columns;
  const float product = Vector::dot_halves(rows.second + row * size, queries.values + q * size, size);
  const float outer = __builtin_fmaf(rows.rest[row], queries.reach[q], queries.base[q]);
  return __builtin_fmaf(product + queries.fine_lift[q], rows.scale[row], outer);
}

template <class Vector>
int refine(const CodeRows& rows, const CodeQueries& queries, CodeHit* hits, int count) {
  for (int i = 0; i < kAhead && i < count; ++i) fetch_second(rows, hits[i].row, queries.columns);
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch_second(rows, hits[i + kAhead].row, queries.columns);
    const CodeHit hit = hits[i];
    const int q = hit.query;
    const float bound = second_bound<Vector>(rows, queries, q, hit.row);
    const bool below = bound < queries.threshold[q] && (rows.row_threshold == nullptr || bound < rows.row_threshold[hit.row]);
    hits[kept] = {hit.query, hit.row, bound};
    kept += !below;
  }
  return kept;
}

template <class Vector>
void refine_pending(const CodeRows& rows, const CodeQueries& queries, Pending* pending, uint32_t count) {
  constexpr uint32_t kFar = 4 * kAhead;  // rows of the whole pool
  const auto fetch = [&](uint32_t i) {
    fetch_second(rows, pending[i].row, queries.columns);
    __builtin_prefetch(rows.rest + pending[i].row, 0, 2);
    __builtin_prefetch(rows.scale + pending[i].row, 0, 2);
  };
  for (uint32_t i = 0; i < kFar && i < count; ++i) fetch(i);
  for (uint32_t i = 0; i < count; ++i) {
    if (i + kFar < count) fetch(i + kFar);
    pending[i].bound = second_bound<Vector>(rows, queries, 0, pending[i].row);
  }
}

// Raises the largest estimates of one query by those of a group.
template <class Vector>
inline void raise(const CodeRows& rows, const CodeQueries& queries, int q, int64_t first, typename Vector::Floats scale,
                  typename Vector::Ints sums, float* best) {
  using Floats = typename Vector::Floats;
  const Floats inner = Vector::multiply(Vector::to_float(sums), Vector::set(queries.unit[q]));
  Floats score = Vector::multiply_add(inner, scale, Vector::set(queries.base[q]));
  if (rows.bias != nullptr) score = Vector::add(score, Vector::load(rows.bias + first));
  Vector::store(best, Vector::largest(score, Vector::load(best)));  // of a NaN and a number, the second operand
}

template <class Vector>
void raise_maxima(const CodeRows& rows, const CodeQueries& queries, float* best, int sets, int next) {
  for (int g = 0; g < rows.groups; ++g) {
    const int64_t place = g * rows.group_step;
    const uint8_t* codes = rows.codes + place * kLineBytes;
    if (queries.count <= kStreamed) fetch_ahead(rows, codes);
    const typename Vector::Floats scale = Vector::load(rows.scale + place * kGroup);
    for (int q = 0; q < queries.count; ++q) {
      typename Vector::Ints sums[1];
      first_dot<1, Vector>(rows, queries, codes, q, sums);
      raise<Vector>(rows, queries, q, place * kGroup, scale, sums[0], best + (q * sets + (next + g) % sets) * kGroup);
    }
  }
}

inline void nothing() {}

}  // namespace
}  // namespace tgq
