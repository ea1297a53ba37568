// The code filter of processors with AMX: 16 queries by 16 rows by 64 columns in one instruction. Few queries go through vectors.
#if defined(TGQ_X86)
#include "common/tile_config.h"
#include "search/cpu/code_vector_avx512.h"

namespace tgq {
namespace {

constexpr int kTile = 16;       // queries, and rows, of one tile
constexpr int kMinQueries = 12;  // vectors are done sooner with fewer

// Sums of two groups of rows and 32 queries: [query][32 rows].
struct alignas(64) Sums {
  int32_t cell[kQueryPanel][2 * kGroup];
};

// Multiplies two groups of rows by up to 32 queries after another and lets `look` see the sums of the two before, a share of the
// queries at a time, while the unit is at work: more than the processor could look ahead by itself.
//   look.queries_of(sums, g, from, until): groups g and g + 1, queries [from, until)
//   look.end(sums, g, pair): all queries have been seen; only the first group counts where `pair` is false
template <class Look>
inline void visit_pairs(const CodeRows& rows, const CodeQueries& queries, Look& look) {
  const bool wide = queries.count > kTile, one_line = rows.lines == 1;
  const int panel = wide ? kQueryPanel : kTile, share = (panel + rows.lines - 1) / rows.lines;
  const int64_t stride = queries.columns;
  Sums sums[2];
  if (one_line) {  // the queries stay in tiles 4 and 5 from group to group
    _tile_loadd(4, queries.codes, 64);
    if (wide) _tile_loadd(5, queries.codes + kTile * 64, 64);
  }
  for (int g = 0; g < rows.groups; g += 2) {
    const int64_t place = g * rows.group_step;
    const uint8_t* left = rows.codes + place * kLineBytes;
    const uint8_t* right = g + 1 < rows.groups ? left + rows.group_step * kLineBytes : left;
    const int8_t* from = queries.codes;
    const Sums& before = sums[(g / 2 + 1) % 2];
    int seen = g == 0 ? panel : 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int l = 0; l < rows.lines; ++l, left += rows.plane_stride, right += rows.plane_stride, from += 64) {
      if (!one_line) _tile_loadd(4, from, stride);
      _tile_loadd(6, left, 64);
      _tile_loadd(7, right, 64);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if (wide) {
        if (!one_line) _tile_loadd(5, from + kTile * stride, stride);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
      const int until = seen + share < panel ? seen + share : panel;
      if (seen < until) look.queries_of(before, g - 2, seen, until);
      seen = until;
    }
    if (g > 0) look.end(before, g - 2, true);
    Sums& now = sums[g / 2 % 2];
    constexpr int kRow = sizeof now.cell[0];
    _tile_stored(0, now.cell[0], kRow);
    _tile_stored(1, now.cell[0] + kGroup, kRow);
    if (wide) {
      _tile_stored(2, now.cell[kTile], kRow);
      _tile_stored(3, now.cell[kTile] + kGroup, kRow);
    }
  }
  if (rows.groups == 0) return;
  const int last = (rows.groups - 1) / 2 * 2;
  look.queries_of(sums[last / 2 % 2], last, 0, panel);
  look.end(sums[last / 2 % 2], last, last + 1 < rows.groups);
}

// What the first level leaves. A bound is not below the threshold just where the sum of products (from zero, not from the offset) is not
// below
//   ((threshold - base) / unit) (1 / scale) - (reach / unit) (rest / scale) - (lift / unit + offset),
// two multiply-adds for sixteen rows; docs/topk.md says why its roundings do no harm.
template <bool Symmetric>
class Survivors {
 public:
  Survivors(const CodeRows& block, const CodeQueries& panel, CodeHit* to, uint8_t* over)
      : rows(block), queries(panel), hits(to), dense(over), real(panel.count < kQueryPanel ? (1u << panel.count) - 1 : ~0u) {
    const __m512 slack = _mm512_set1_ps(static_cast<float>(panel.columns) * 0x1p-5f), none = _mm512_setzero_ps();
    for (int q = 0; q < kQueryPanel; q += kTile) {
      const __m512 stored = _mm512_loadu_ps(queries.unit + q);
      const __m512 unit = _mm512_mask_mov_ps(stored, _mm512_cmp_ps_mask(stored, none, _CMP_EQ_OQ), _mm512_set1_ps(1.0f));
      const __m512 base = _mm512_loadu_ps(queries.base + q), up = _mm512_set1_ps(1.0f + 0x1p-18f);
      const __m512 lift = _mm512_fmadd_ps(_mm512_div_ps(_mm512_loadu_ps(queries.lift + q), unit), up, slack);
      const __m512 offset = _mm512_cvtepi32_ps(_mm512_loadu_si512(queries.offset + q));
      _mm512_store_ps(height + q, _mm512_div_ps(_mm512_sub_ps(_mm512_loadu_ps(queries.threshold + q), base), unit));
      _mm512_store_ps(reach + q, _mm512_mul_ps(_mm512_div_ps(_mm512_loadu_ps(queries.reach + q), unit), up));
      _mm512_store_ps(below + q, _mm512_sub_ps(_mm512_sub_ps(none, lift), offset));
      if (!Symmetric) continue;
      _mm512_store_ps(inverse + q, _mm512_div_ps(_mm512_set1_ps(1.0f), unit));
    }
  }

  // Which queries have a survivor is not to be predicted: masks first, without a branch.
  void queries_of(const Sums& sums, int g, int from, int until) {
    __m512 steps[2], rest[2], threshold[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t first = (g + half < rows.groups ? g + half : g) * kGroup;
      steps[half] = _mm512_loadu_ps(rows.inverse_scale + first);
      rest[half] = _mm512_loadu_ps(rows.scaled_rest + first);
      if (Symmetric) threshold[half] = _mm512_loadu_ps(rows.row_threshold + first);
    }
    for (int q = from; q < until; ++q) {
      const __m512 a = _mm512_set1_ps(height[q]), b = _mm512_set1_ps(reach[q]), c = _mm512_set1_ps(below[q]);
      for (int half = 0; half < 2; ++half) {
        __m512 needed = a;
        if (Symmetric) {  // of the row's threshold, where that is lower
          const __m512 above = _mm512_sub_ps(threshold[half], _mm512_set1_ps(queries.base[q]));
          needed = _mm512_min_ps(_mm512_mul_ps(above, _mm512_set1_ps(inverse[q])), a);  // of a NaN and a number, the second
        }
        const __m512 least = _mm512_fnmadd_ps(b, rest[half], _mm512_fmadd_ps(needed, steps[half], c));
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums.cell[q] + half * kGroup));
        masks[half][q] = static_cast<uint16_t>(_mm512_cmp_ps_mask(sum, least, _CMP_NLT_UQ));
      }
    }
  }

  // How many queries have survivors is not to be predicted either: one loop for both groups.
  void end(const Sums& sums, int g, bool pair) {
    uint64_t passed = 0;
    for (int half = 0; half < (pair ? 2 : 1); ++half) {
      const __m512i all = _mm512_load_si512(masks[half]);
      _mm512_mask_storeu_epi16(masks[half], ~real, _mm512_setzero_si512());
      int found = 0;
      for (int q = 0; q < kQueryPanel; q += 4) {
        uint64_t four;
        __builtin_memcpy(&four, masks[half] + q, sizeof four);
        found += __builtin_popcountll(four);
      }
      dense[g + half] = found > kDenseGroup;
      const uint64_t queries_with = real & _cvtmask32_u32(_mm512_test_epi16_mask(all, all));
      passed |= (found > kDenseGroup ? 0 : queries_with) << (half * kQueryPanel);
    }
    for (; passed != 0; passed &= passed - 1) {
      const int at = __builtin_ctzll(passed), half = at / kQueryPanel, q = at % kQueryPanel;
      const auto group = GroupView<Wide>::template of<false>(rows, (g + half) * kGroup);
      const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums.cell[q] + half * kGroup), _mm512_set1_epi32(queries.offset[q]));
      const uint32_t mask = masks[half][q];
      Wide::put(hits + total, mask, bound_of<Wide>(queries, q, group, sum), q, (g + half) * kGroup);
      total += __builtin_popcount(mask);
    }
  }

  int total = 0;

 private:
  const CodeRows& rows;
  const CodeQueries& queries;
  CodeHit* hits;
  uint8_t* dense;
  uint32_t real;
  alignas(64) float height[kQueryPanel], reach[kQueryPanel], below[kQueryPanel], inverse[kQueryPanel];
  alignas(64) uint16_t masks[2][kQueryPanel] = {};
};

// Keeps the largest estimates of a sample.
class Largest {
 public:
  Largest(const CodeRows& block, const CodeQueries& panel, float* to, int count, int first)
      : rows(block), queries(panel), best(to), sets(count), next(first) {}
  void queries_of(const Sums& sums, int g, int from, int until) {
    if (until > queries.count) until = queries.count;
    for (int half = 0; half < (g + 1 < rows.groups ? 2 : 1); ++half) {
      const int64_t first = (g + half) * rows.group_step * kGroup;
      const __m512 scale = _mm512_loadu_ps(rows.scale + first);
      for (int q = from; q < until; ++q) {
        const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums.cell[q] + half * kGroup), _mm512_set1_epi32(queries.offset[q]));
        raise<Wide>(rows, queries, q, first, scale, sum, best + (q * sets + (next + g + half) % sets) * kGroup);
      }
    }
  }
  void end(const Sums&, int, bool) {}

 private:
  const CodeRows& rows;
  const CodeQueries& queries;
  float* best;
  int sets, next;
};

template <bool Symmetric>
int filter_tiles(const CodeRows& rows, const CodeQueries& queries, CodeHit* hits, uint8_t* dense) {
  Survivors<Symmetric> survivors(rows, queries, hits, dense);
  visit_pairs(rows, queries, survivors);
  return survivors.total;
}

int filter_any(const CodeRows& rows, const CodeQueries& queries, CodeHit* hits, uint8_t* dense) {
  if (queries.count < kMinQueries) return filter<Wide>(rows, queries, hits, dense);
  return rows.row_threshold == nullptr ? filter_tiles<false>(rows, queries, hits, dense) : filter_tiles<true>(rows, queries, hits, dense);
}

void raise_any(const CodeRows& rows, const CodeQueries& queries, float* best, int sets, int next) {
  if (queries.count < kMinQueries) return raise_maxima<Wide>(rows, queries, best, sets, next);
  Largest largest(rows, queries, best, sets, next);
  visit_pairs(rows, queries, largest);
}

}  // namespace

const CodeKernels& amx_code_kernels() {
  static const CodeKernels kernels{"amx", false, kMinQueries, filter_any, refine<Wide>, refine_pending<Wide>, raise_any, begin, end};
  return kernels;
}

}  // namespace tgq
#endif
