// Stored codes of a pool and of the queries that meet them: the bound of a score in one level or two. docs/topk.md proves it.
//
// Included by the kernel files too: no library headers.
#pragma once

#include <stdint.h>

namespace tgq {

constexpr int kGroup = 16;                  // rows whose codes lie together
constexpr int kLineBytes = kGroup * 64;     // codes of 64 columns of a group: [16 words][16 rows][4 columns]
constexpr int kDenseGroup = 64;             // survivors of a group and up to 32 queries from which it is scored whole instead
constexpr int kQueryPanel = 32;             // queries that one call of a kernel takes at most

// Groups of pool rows as a kernel reads them.
struct CodeRows {
  const uint8_t* codes;   // first level of the first group, of the first 64 columns
  int64_t plane_stride;   // bytes to the next 64 columns
  int64_t group_step;     // from one group to the next, in groups
  int groups;
  int lines;              // of 64 columns in the first level
  const float* scale;     // per row, what a code of 1 stands for
  const float* rest;      // per row, at least the norm beyond the first level
  const float *inverse_scale, *scaled_rest;  // per row of the block: 1 / scale, rest / scale; where the scale is zero, of a small one
  const uint16_t* second; // the first level's columns in half precision, in units of `scale`, row after row; null: no second level
  const float* row_threshold; // per row, in a self-join; else null
  const float* bias;      // of a sample, per row: added to its scores; null: nothing
};

// Prepared queries, `count` of them, with memory for kQueryPanel. For row r, with the sum I of products of codes and P of the
// query's values with the row's second level,
//   bound 1 = (I unit + lift) scale[r] + rest[r] reach + base
//   bound 2 = (P + fine_lift) scale[r] + rest[r] reach + base
// and neither is below the fixed-order score.
struct CodeQueries {
  const int8_t* codes;    // [queries, columns]
  const float* values;    // [queries, columns] the rotated query; only with a second level
  int64_t columns;        // of the first level
  const int32_t* offset;  // what a sum starts from: -128 times the sum of the codes
  const float *unit, *lift, *fine_lift, *reach, *base, *threshold;
  int count;
};

// A pair whose bound is not below the query's threshold or, in a self-join, the row's.
struct CodeHit {
  uint16_t query;  // within the panel
  uint16_t row;    // within the block
  float bound;
};

// A hit whose exact score is not known yet.
struct Pending {
  float bound;   // not below the exact score
  uint32_t row;  // of the pool
};

struct CodeKernels {
  const char* name;
  bool narrow;  // products of two neighbouring columns meet in 16 bits: the magnitudes of two query codes add up to 128 at most
  int divided_from;  // queries of a panel from which `filter` takes CodeRows::inverse_scale and scaled_rest; 0: never
  // Appends what the first level leaves of all groups; a group with more than kDenseGroup appends none and sets dense[g]. `hits` has room for
  // kDenseGroup per group and kGroup * kQueryPanel more. Returns how many.
  int (*filter)(const CodeRows& rows, const CodeQueries& queries, CodeHit* hits, uint8_t* dense);
  // Keeps those of the hits that the second level leaves, with its bounds, and returns how many.
  int (*refine)(const CodeRows& rows, const CodeQueries& queries, CodeHit* hits, int count);
  // Gives hits of the first of the queries the bounds of the second level; `rows` begin with the pool's first.
  void (*refine_pending)(const CodeRows& rows, const CodeQueries& queries, Pending* pending, uint32_t count);
  // Raises best[q][slots] to the scores as the first level estimates them; group g goes to slots 16 ((next + g) mod sets) ….
  void (*raise_maxima)(const CodeRows& rows, const CodeQueries& queries, float* best, int sets, int next);
  void (*begin)();
  void (*end)();
};

const CodeKernels& scalar_code_kernels();
#if defined(TGQ_X86)
const CodeKernels& avx2_code_kernels();
const CodeKernels& avx2vnni_code_kernels();
const CodeKernels& avx512vnni_code_kernels();
const CodeKernels& amx_code_kernels();
#endif

}  // namespace tgq
