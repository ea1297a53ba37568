// The code filter of processors with AMX: 16 queries by 16 rows by 64 columns in one instruction. Few queries go through vectors.
#if defined(TGQ_X86)
#include "cpu/code_vector_avx512.h"
#include "cpu/tile_config.h"

namespace tgq {
namespace {

constexpr int kTile = 16;       // queries, and rows, of one tile
constexpr int kMinQueries = 8;  // fewer would leave most of a tile idle

// Sums of two groups of rows and 32 queries: [query][32 rows].
struct alignas(64) Sums {
  int32_t cell[kQueryPanel][2 * kGroup];
};

inline void store(Sums& sums) {
  constexpr int kRow = sizeof sums.cell[0];
  _tile_stored(0, sums.cell[0], kRow);
  _tile_stored(1, sums.cell[0] + kGroup, kRow);
  _tile_stored(2, sums.cell[kTile], kRow);
  _tile_stored(3, sums.cell[kTile] + kGroup, kRow);
}

// Two groups by 32 queries. With one line of codes the queries stay in tiles 4 and 5 from group to group.
template <bool OneLine>
inline void multiply(const CodeRows& rows, const CodeQueries& queries, int64_t group, int64_t other, Sums& sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint8_t* left = rows.codes + group * kLineBytes;
  const uint8_t* right = rows.codes + other * kLineBytes;
  const int8_t* from = queries.first.codes;
  const int64_t stride = queries.first.stride;
  for (int l = 0; l < (OneLine ? 1 : rows.lines); ++l, left += rows.plane_stride, right += rows.plane_stride, from += 64) {
    if (!OneLine) _tile_loadd(4, from, stride);
    _tile_loadd(6, left, 64);
    _tile_loadd(7, right, 64);
    if (!OneLine) _tile_loadd(5, from + kTile * stride, stride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  store(sums);
}

// Calls visit(g, pair, sums) for every two groups, of which only the first counts where `pair` is false; while it looks at two
// groups the unit is at the next.
template <bool OneLine, class Visit>
inline void visit_pairs(const CodeRows& rows, const CodeQueries& queries, Visit visit) {
  Sums sums[2];
  if (OneLine) {
    _tile_loadd(4, queries.first.codes, 64);
    _tile_loadd(5, queries.first.codes + kTile * 64, 64);
  }
  const auto start = [&](int g) {
    const int64_t place = g * rows.group_step;
    multiply<OneLine>(rows, queries, place, g + 1 < rows.groups ? place + rows.group_step : place, sums[g / 2 % 2]);
  };
  if (rows.groups > 0) start(0);
  for (int g = 0; g < rows.groups; g += 2) {
    if (g + 2 < rows.groups) start(g + 2);
    visit(g, g + 1 < rows.groups, sums[g / 2 % 2]);
  }
}

template <bool OneLine, bool Symmetric>
int filter_tiles(const CodeRows& rows, const CodeQueries& queries, CodeHit* hits, uint8_t* dense) {
  int total = 0;
  const uint32_t real = queries.count < kQueryPanel ? (1u << queries.count) - 1 : ~0u;
  visit_pairs<OneLine>(rows, queries, [&](int g, bool pair, const Sums& sums) {
    const int64_t place[2] = {g * rows.group_step, pair ? (g + 1) * rows.group_step : g * rows.group_step};
    const GroupView<Wide> group[2] = {GroupView<Wide>::of<Symmetric>(rows, place[0] * kGroup), GroupView<Wide>::of<Symmetric>(rows, place[1] * kGroup)};
    const auto sum = [&](int q, int half) {
      return _mm512_add_epi32(_mm512_load_si512(sums.cell[q] + half * kGroup), _mm512_set1_epi32(queries.first.offset[q]));
    };
    // Which queries have a survivor is not to be predicted: masks first, without a branch.
    alignas(64) uint16_t masks[2][kQueryPanel];
    for (int q = 0; q < kQueryPanel; ++q)
      for (int half = 0; half < 2; ++half) {
        __m512 bound;
        masks[half][q] = static_cast<uint16_t>(survivors<Wide, Symmetric>(queries, q, group[half], sum(q, half), bound));
      }
    for (int half = 0; half < (pair ? 2 : 1); ++half) {
      GroupHits found{hits + total};
      uint32_t passed = real & _cvtmask32_u32(_mm512_test_epi16_mask(_mm512_load_si512(masks[half]), _mm512_load_si512(masks[half])));
      for (; passed != 0; passed &= passed - 1) {
        const int q = __builtin_ctz(passed);
        __m512 bound;
        const uint32_t mask = survivors<Wide, Symmetric>(queries, q, group[half], sum(q, half), bound);
        found.add<Wide>(mask, bound, q, (g + half) * kGroup);
      }
      dense[g + half] = found.found > kDenseGroup;
      if (!dense[g + half]) total += found.found;
    }
  });
  return total;
}

template <bool OneLine>
int filter_lines(const CodeRows& rows, const CodeQueries& queries, CodeHit* hits, uint8_t* dense) {
  return rows.row_floor == nullptr ? filter_tiles<OneLine, false>(rows, queries, hits, dense)
                                   : filter_tiles<OneLine, true>(rows, queries, hits, dense);
}

int filter_any(const CodeRows& rows, const CodeQueries& queries, CodeHit* hits, uint8_t* dense) {
  if (queries.count < kMinQueries) return filter<Wide>(rows, queries, hits, dense);
  return rows.lines == 1 ? filter_lines<true>(rows, queries, hits, dense) : filter_lines<false>(rows, queries, hits, dense);
}

void raise_any(const CodeRows& rows, const CodeQueries& queries, float* best, int sets, int next) {
  if (queries.count < kMinQueries) return raise_maxima<Wide>(rows, queries, best, sets, next);
  visit_pairs<false>(rows, queries, [&](int g, bool pair, const Sums& sums) {
    for (int half = 0; half < (pair ? 2 : 1); ++half) {
      const int64_t first = (g + half) * rows.group_step * kGroup;
      const __m512 scale = _mm512_loadu_ps(rows.scale + first);
      for (int q = 0; q < queries.count; ++q) {
        const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums.cell[q] + half * kGroup), _mm512_set1_epi32(queries.first.offset[q]));
        raise<Wide>(rows, queries, q, first, scale, sum, best + (q * sets + (next + g + half) % sets) * kGroup);
      }
    }
  });
}

}  // namespace

const CodeKernels& amx_code_kernels() {
  static const CodeKernels kernels{"amx", false, filter_any, refine<Wide>, raise_any, begin, end};
  return kernels;
}

}  // namespace tgq
#endif
