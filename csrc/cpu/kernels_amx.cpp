// The certified filter on the AMX matrix unit: 32 rows by 32 queries per tile, bf16 products, fp32 sums.
#if defined(TGQ_X86)
#include <immintrin.h>

#include "cpu/kernels.h"

namespace tgq {
namespace {

constexpr int64_t kTileValues = kTileRows * kTileDepth;  // bf16 values of one tile: 1 KiB

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void begin() {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = 16;
  }
  _tile_loadconfig(&config);
  // gcc 12 does not know that the instruction reads the configuration and may drop the stores above.
  __asm__ volatile("" : : "r"(&config) : "memory");
}

void end() { _tile_release(); }

inline __m512 widen(__m256i bfloats) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloats), 16)); }

// Converts 16 values, stores them as bf16 and adds the squares of what is kept and of what is lost.
inline void round16(__m512 value, uint16_t* to, __m512& squares, __m512& lost_squares) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
  const __m512 kept = widen(rounded);
  const __m512 lost = _mm512_sub_ps(value, kept);  // exact: the error of a rounding is representable
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
  squares = _mm512_fmadd_ps(kept, kept, squares);
  lost_squares = _mm512_fmadd_ps(lost, lost, lost_squares);
}

void round_rows(const float* rows, int64_t row_stride, int num_rows, int64_t width, int64_t depth, uint16_t* tiles,
                float* norm, float* error) {
  const int64_t steps = depth / kTileDepth;
  const int padded = (num_rows + kPanel - 1) / kPanel * kPanel;
  for (int r = 0; r < padded; ++r) {
    uint16_t* to = tiles + (r / kTileRows) * steps * kTileValues + (r % kTileRows) * kTileDepth;
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512 lost[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const float* from = rows + r * row_stride;
    const int64_t size = r < num_rows ? width : 0;
    int64_t d = 0;
    for (; d + kTileDepth <= size; d += kTileDepth, to += kTileValues)
      for (int half = 0; half < 2; ++half)
        round16(_mm512_loadu_ps(from + d + 16 * half), to + 16 * half, squares[half], lost[half]);
    for (; d < depth; d += kTileDepth, to += kTileValues)
      for (int half = 0; half < 2; ++half) {
        const __m512 value = d + 16 * half < size ? _mm512_loadu_ps(from + d + 16 * half) : _mm512_setzero_ps();
        round16(value, to + 16 * half, squares[half], lost[half]);
      }
    norm[r] = norm_upper_bound(_mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])));
    error[r] = norm_upper_bound(_mm512_reduce_add_ps(_mm512_add_ps(lost[0], lost[1])));
  }
}

void pack_panel(const uint16_t* rounded_tiles, int64_t depth, uint16_t* panel) {
  const int64_t steps = depth / kTileDepth;
  for (int half = 0; half < 2; ++half)
    for (int64_t step = 0; step < steps; ++step) {
      const uint16_t* tile = rounded_tiles + (half * steps + step) * kTileValues;
      uint16_t* to = panel + (step * 2 + half) * kTileValues;
      for (int pair = 0; pair < 16; ++pair)
        for (int q = 0; q < 16; ++q) {
          to[(pair * 16 + q) * 2] = tile[q * kTileDepth + 2 * pair];
          to[(pair * 16 + q) * 2 + 1] = tile[q * kTileDepth + 2 * pair + 1];
        }
    }
}

// Scores of one 32 x 32 tile: scores[row * 32 + query].
inline void multiply(const uint16_t* rows, const uint16_t* panel, int64_t steps, float* scores) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint16_t* lower = rows + steps * kTileValues;
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, rows + s * kTileValues, 64);
    _tile_loadd(6, panel + 2 * s * kTileValues, 64);
    _tile_loadd(7, panel + (2 * s + 1) * kTileValues, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower + s * kTileValues, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, kPanel * sizeof(float));
  _tile_stored(1, scores + 16, kPanel * sizeof(float));
  _tile_stored(2, scores + 16 * kPanel, kPanel * sizeof(float));
  _tile_stored(3, scores + 16 * kPanel + 16, kPanel * sizeof(float));
}

struct Bounds {
  __m512 margin[2];
  __m512 floor[2];
};

inline Bounds bounds_of(const float* floor, const float* slope, const float* lift, float constant, float norm, float error) {
  Bounds b;
  for (int half = 0; half < 2; ++half) {
    const __m512 f = _mm512_loadu_ps(floor + 16 * half);
    __m512 m = _mm512_fmadd_ps(_mm512_loadu_ps(slope + 16 * half), _mm512_set1_ps(norm), _mm512_set1_ps(constant));
    m = _mm512_fmadd_ps(_mm512_loadu_ps(lift + 16 * half), _mm512_set1_ps(error), m);
    b.margin[half] = m;
    b.floor[half] = _mm512_fnmadd_ps(_mm512_abs_ps(f), _mm512_set1_ps(0x1p-22f), _mm512_sub_ps(f, m));
  }
  return b;
}

// Appends the survivors of one row; stops writing, but not counting, past kDense of the tile.
inline int append(uint32_t mask, const float* scores, int row, int found, FilterHit* hits) {
  for (; mask != 0; mask &= mask - 1, ++found) {
    const int q = __builtin_ctz(mask);
    if (found < kDense) hits[found] = {static_cast<uint16_t>(q), static_cast<uint16_t>(row), scores[q]};
  }
  return found;
}

template <bool Symmetric>
inline int collect_tile(const float* scores, const Bounds& b, int first_row, const float* row_floor, FilterHit* hits) {
  int found = 0;
  for (int r = 0; r < kPanel; ++r) {
    const __m512 left = _mm512_load_ps(scores + r * kPanel), right = _mm512_load_ps(scores + r * kPanel + 16);
    __mmask16 low = _mm512_cmp_ps_mask(left, b.floor[0], _CMP_NLT_UQ);
    __mmask16 high = _mm512_cmp_ps_mask(right, b.floor[1], _CMP_NLT_UQ);
    if constexpr (Symmetric) {
      const __m512 needed = _mm512_set1_ps(row_floor[first_row + r]), slack = _mm512_set1_ps(0x1p-22f);
      const __m512 l = _mm512_add_ps(left, b.margin[0]), h = _mm512_add_ps(right, b.margin[1]);
      low |= _mm512_cmp_ps_mask(_mm512_fmadd_ps(_mm512_abs_ps(l), slack, l), needed, _CMP_NLT_UQ);
      high |= _mm512_cmp_ps_mask(_mm512_fmadd_ps(_mm512_abs_ps(h), slack, h), needed, _CMP_NLT_UQ);
    }
    const uint32_t mask = static_cast<uint32_t>(low) | (static_cast<uint32_t>(high) << 16);
    if (mask != 0) found = append(mask, scores + r * kPanel, first_row + r, found, hits);
  }
  return found;
}

int filter_block(const uint16_t* tiles, int groups, int64_t depth, const uint16_t* panel, const float* floor,
                 const float* slope, const float* lift, float constant, const float* group_norm, const float* group_error,
                 const float* row_floor, FilterHit* hits, uint8_t* dense) {
  const int64_t steps = depth / kTileDepth;
  alignas(64) float scores[kPanel * kPanel];
  int total = 0;
  for (int g = 0; g < groups; ++g) {
    multiply(tiles + 2 * g * steps * kTileValues, panel, steps, scores);
    const Bounds b = bounds_of(floor, slope, lift, constant, group_norm[g], group_error[g]);
    const int found = row_floor == nullptr ? collect_tile<false>(scores, b, g * kPanel, nullptr, hits + total)
                                           : collect_tile<true>(scores, b, g * kPanel, row_floor, hits + total);
    dense[g] = found > kDense;
    if (!dense[g]) total += found;
  }
  return total;
}

}  // namespace

const Filter& amx_filter() {
  static const Filter filter{"amx", round_rows, pack_panel, filter_block, begin, end};
  return filter;
}

}  // namespace tgq
#endif
