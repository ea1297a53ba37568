// The certified filters on the AMX matrix unit: 32 rows by 32 queries per tile, bf16 or byte products. While the unit
// multiplies one tile, the vector unit looks through the tile before it and the next block of rows is fetched.
#if defined(TGQ_X86)
#include <immintrin.h>

#include "common/tile_config.h"
#include "search/cpu/kernels.h"

namespace tgq {
namespace {

void encode_bfloat(const float* rows, int64_t row_stride, int num_rows, int64_t width, int64_t row_bytes, uint8_t* codes,
                   float* scale, float* norm, float* error) {
  const int padded = (num_rows + kPanel - 1) / kPanel * kPanel;
  // Place of the bf16 value of which a float lane's upper half is made, for either half of 32 values.
  const __m512i pair = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i place[2] = {_mm512_slli_epi32(pair, 16), _mm512_slli_epi32(_mm512_add_epi32(pair, _mm512_set1_epi32(16)), 16)};
  for (int r = 0; r < padded; ++r) {
    uint8_t* to = codes + r * row_bytes;
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512 lost_squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const float* from = rows + r * row_stride;
    const int64_t size = r < num_rows ? width : 0;
    for (int64_t d = 0; 2 * d < row_bytes; d += 32) {
      const __m512 value[2] = {d < size ? _mm512_loadu_ps(from + d) : _mm512_setzero_ps(),
                               d + 16 < size ? _mm512_loadu_ps(from + d + 16) : _mm512_setzero_ps()};
      const __m512i rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(value[1], value[0]));
      _mm512_storeu_si512(to + 2 * d, rounded);
      for (int half = 0; half < 2; ++half) {
        const __m512 kept = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, place[half], rounded));
        const __m512 lost = _mm512_sub_ps(value[half], kept);  // exact: the error of a rounding is representable
        squares[half] = _mm512_fmadd_ps(kept, kept, squares[half]);
        lost_squares[half] = _mm512_fmadd_ps(lost, lost, lost_squares[half]);
      }
    }
    scale[r] = 1.0f;
    norm[r] = norm_upper_bound(_mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])));
    error[r] = norm_upper_bound(_mm512_reduce_add_ps(_mm512_add_ps(lost_squares[0], lost_squares[1])));
  }
}

// The unit reads denormals as zero; the bound of a zero error covers them.
void measure_bfloat(const uint16_t* rows, int64_t row_stride, int num_rows, int64_t width, float* norm, float* error) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int r = 0; r < num_rows; ++r) {
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t d = 0; d < width; d += 32) {
      const __m512i pairs = _mm512_loadu_si512(rows + r * row_stride + d);
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      squares[0] = _mm512_fmadd_ps(odd, odd, squares[0]);
      squares[1] = _mm512_fmadd_ps(even, even, squares[1]);
    }
    norm[r] = norm_upper_bound(_mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])));
    error[r] = norm_upper_bound(0.0f);
  }
}

// Scores of one tile, [row][query] as the unit leaves them: fp32, or int32 for byte codes.
struct alignas(64) Scores {
  uint32_t cells[kPanel * kPanel];
};

// Score of a row, by its number in the block and within the tile, and of sixteen queries.
template <bool Bytes>
inline __m512 to_scores(const FilterBlock& block, const FilterPanel& panel, const Scores& scores, int group, int row, int half) {
  const uint32_t* at = scores.cells + row * kPanel + 16 * half;
  if constexpr (!Bytes) return _mm512_load_ps(at);
  const __m512i whole = _mm512_add_epi32(_mm512_load_si512(at), _mm512_loadu_si512(panel.offset + 16 * half));
  const __m512 sum = _mm512_cvtepi32_ps(whole);
  const __m512 scaled = _mm512_mul_ps(sum, _mm512_set1_ps(block.scale[group * kPanel + row]));
  return _mm512_mul_ps(scaled, _mm512_loadu_ps(panel.scale + 16 * half));
}

// Looks for survivors.
template <bool Bytes, bool Symmetric>
struct Survivors {
  Survivors(const FilterBlock& rows, const FilterPanel& queries, FilterHit* to, uint8_t* over)
      : block(&rows), panel(&queries), out(to), dense(over) {}

  const FilterBlock* block;
  const FilterPanel* panel;
  FilterHit* out;
  uint8_t* dense;
  int total = 0;
  __m512 margin[2] = {}, threshold[2] = {};
  int rows = 0;  // of the tile at hand on which a query passed: which, and which queries
  uint8_t row_of[kPanel + 1];
  uint32_t queries_of[kPanel + 1];

  void begin(int group) {
    rows = 0;
    const __m512 norm = _mm512_set1_ps(block->group_norm[group]), error = _mm512_set1_ps(block->group_error[group]);
    for (int half = 0; half < 2; ++half) {
      const __m512 f = _mm512_loadu_ps(panel->threshold + 16 * half);
      __m512 m = _mm512_fmadd_ps(_mm512_loadu_ps(panel->slope + 16 * half), norm, _mm512_set1_ps(block->constant));
      m = _mm512_fmadd_ps(_mm512_loadu_ps(panel->lift + 16 * half), error, m);
      margin[half] = m;
      threshold[half] = _mm512_fnmadd_ps(_mm512_abs_ps(f), _mm512_set1_ps(0x1p-22f), _mm512_sub_ps(f, m));
    }
  }

  // Without a branch: which rows hold a survivor is not to be predicted.
  void look(const Scores& scores, int group, int from, int until) {
    int count = rows;
    for (int row = from; row < until; ++row) {
      __mmask16 passed[2];
      for (int half = 0; half < 2; ++half) {
        const __m512 value = to_scores<Bytes>(*block, *panel, scores, group, row, half);
        __mmask16 hit = _mm512_cmp_ps_mask(value, threshold[half], _CMP_NLT_UQ);
        if constexpr (Symmetric) {
          const __m512 needed = _mm512_set1_ps(block->row_threshold[group * kPanel + row]);
          const __m512 most = _mm512_add_ps(value, margin[half]);
          const __m512 bound = _mm512_fmadd_ps(_mm512_abs_ps(most), _mm512_set1_ps(0x1p-22f), most);
          hit |= _mm512_cmp_ps_mask(bound, needed, _CMP_NLT_UQ);
        }
        passed[half] = hit;
      }
      const uint32_t queries = _cvtmask32_u32(_mm512_kunpackw(passed[1], passed[0]));
      row_of[count] = static_cast<uint8_t>(row);
      queries_of[count] = queries;
      count += queries != 0;
    }
    rows = count;
  }

  // Appends the survivors of the tile that has been looked through.
  void end(const Scores& scores, int group) {
    FilterHit* to = out + total;
    int found = 0;
    for (int i = 0; i < rows; ++i) {
      const int row = row_of[i];
      for (uint32_t queries = queries_of[i]; queries != 0; queries &= queries - 1, ++found) {
        if (found >= kDense) continue;
        const int q = __builtin_ctz(queries);
        float value;
        if constexpr (Bytes) {
          const uint32_t whole = scores.cells[row * kPanel + q] + static_cast<uint32_t>(panel->offset[q]);
          value = static_cast<float>(static_cast<int32_t>(whole)) * block->scale[group * kPanel + row] * panel->scale[q];
        } else {
          __builtin_memcpy(&value, scores.cells + row * kPanel + q, sizeof value);
        }
        to[found] = {static_cast<uint16_t>(q), static_cast<uint16_t>(group * kPanel + row), value};
      }
    }
    dense[group] = found > kDense;
    if (found <= kDense) total += found;
  }
};

// Keeps the largest scores of a sample.
template <bool Bytes>
struct Largest {
  const FilterBlock* block;
  const FilterPanel* panel;
  Maxima maxima;
  float* best = nullptr;
  __m512 most[2] = {};

  void begin(int) {}
  void look(const Scores& scores, int group, int from, int until) {
    for (int row = from; row < until; ++row) {
      const bool begins = (row & (maxima.run - 1)) == 0, ends = ((row + 1) & (maxima.run - 1)) == 0;
      if (begins) best = maxima.turn();
      for (int half = 0; half < 2; ++half) {
        if (begins) most[half] = _mm512_loadu_ps(best + 16 * half);
        // Of a NaN and a number, the second operand.
        most[half] = _mm512_max_ps(to_scores<Bytes>(*block, *panel, scores, group, row, half), most[half]);
        if (ends) _mm512_storeu_ps(best + 16 * half, most[half]);
      }
    }
  }
  void end(const Scores&, int) {}
};

// Multiplies all row groups of a block by one panel; while the unit is at one tile, `visitor` looks through the one before.
template <bool Bytes, class Visitor>
void visit_tiles(const FilterBlock& block, const FilterPanel& panel, Visitor& visitor) {
  const int64_t steps = block.row_bytes / kCodeLine, stride = block.stride;
  const int look_rows = static_cast<int>((kPanel + steps - 1) / steps);
  Prefetcher prefetcher(block.ahead, block.groups * steps);
  Scores scores[2];
  for (int g = 0; g < block.groups; ++g) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const uint8_t* upper = block.codes + g * kPanel * stride;
    const uint8_t* lower = upper + 16 * stride;
    const uint32_t* queries = panel.codes;
    const Scores& before = scores[(g + 1) % 2];
    int looked = g == 0 ? kPanel : 0;
    for (int64_t s = 0; s < steps; ++s, upper += kCodeLine, lower += kCodeLine, queries += 512) {
      _tile_loadd(4, upper, stride);
      _tile_loadd(6, queries, 64);
      _tile_loadd(7, queries + 256, 64);
      _tile_loadd(5, lower, stride);
      if constexpr (Bytes) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      const int until = looked + look_rows < kPanel ? looked + look_rows : kPanel;
      visitor.look(before, g - 1, looked, until);
      looked = until;
      prefetcher.turn();
    }
    if (g > 0) visitor.end(before, g - 1);
    uint32_t* cells = scores[g % 2].cells;
    _tile_stored(0, cells, kPanel * sizeof(float));
    _tile_stored(1, cells + 16, kPanel * sizeof(float));
    _tile_stored(2, cells + 16 * kPanel, kPanel * sizeof(float));
    _tile_stored(3, cells + 16 * kPanel + 16, kPanel * sizeof(float));
    visitor.begin(g);
  }
  const int last = block.groups - 1;
  visitor.look(scores[last % 2], last, 0, kPanel);
  visitor.end(scores[last % 2], last);
}

template <bool Bytes, bool Symmetric>
int filter_tiles(const FilterBlock& block, const FilterPanel& panel, FilterHit* hits, uint8_t* dense) {
  Survivors<Bytes, Symmetric> survivors(block, panel, hits, dense);
  visit_tiles<Bytes>(block, panel, survivors);
  return survivors.total;
}

template <bool Bytes>
int filter_block(const FilterBlock& block, const FilterPanel& panel, FilterHit* hits, uint8_t* dense) {
  if (block.groups == 0) return 0;
  return block.row_threshold == nullptr ? filter_tiles<Bytes, false>(block, panel, hits, dense)
                                    : filter_tiles<Bytes, true>(block, panel, hits, dense);
}

template <bool Bytes>
void raise_maxima(const FilterBlock& block, const FilterPanel& panel, Maxima maxima) {
  if (block.groups == 0) return;
  Largest<Bytes> largest{&block, &panel, maxima};
  visit_tiles<Bytes>(block, panel, largest);
}

}  // namespace

const Filter& amx_filter() {
  static const Filter filter{"amx", 2, encode_bfloat, encode_bfloat, measure_bfloat, filter_block<false>, raise_maxima<false>, begin, end};
  return filter;
}

}  // namespace tgq
#endif
