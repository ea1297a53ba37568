// The certified filters on the AMX matrix unit: 32 rows by 32 queries per tile, bf16 or byte products. While the unit
// multiplies one tile, the vector unit looks through the tile before it and the next block of rows is fetched.
#if defined(TGQ_X86)
#include <immintrin.h>

#include "cpu/kernels.h"

namespace tgq {
namespace {

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
inline void round16(__m512 value, uint8_t* to, __m512& squares, __m512& lost_squares) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
  const __m512 kept = widen(rounded);
  const __m512 lost = _mm512_sub_ps(value, kept);  // exact: the error of a rounding is representable
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
  squares = _mm512_fmadd_ps(kept, kept, squares);
  lost_squares = _mm512_fmadd_ps(lost, lost, lost_squares);
}

void encode_bfloat(const float* rows, int64_t row_stride, int num_rows, int64_t width, int64_t row_bytes, uint8_t* codes,
                   float* scale, float* norm, float* error) {
  const int padded = (num_rows + kPanel - 1) / kPanel * kPanel;
  for (int r = 0; r < padded; ++r) {
    uint8_t* to = codes + r * row_bytes;
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512 lost[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const float* from = rows + r * row_stride;
    const int64_t size = r < num_rows ? width : 0;
    int64_t d = 0;
    for (; d + 32 <= size; d += 32)
      for (int half = 0; half < 2; ++half)
        round16(_mm512_loadu_ps(from + d + 16 * half), to + 2 * d + 32 * half, squares[half], lost[half]);
    for (; 2 * d < row_bytes; d += 16) {
      const __m512 value = d < size ? _mm512_loadu_ps(from + d) : _mm512_setzero_ps();
      round16(value, to + 2 * d, squares[0], lost[0]);
    }
    scale[r] = 1.0f;
    norm[r] = norm_upper_bound(_mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])));
    error[r] = norm_upper_bound(_mm512_reduce_add_ps(_mm512_add_ps(lost[0], lost[1])));
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

template <bool Bytes>
struct Tile {
  Tile(const FilterBlock& rows, const FilterPanel& queries) : block(&rows), panel(&queries) {}

  const FilterBlock* block;
  const FilterPanel* panel;
  int group = -1;
  __m512 margin[2], floor[2];
  alignas(64) uint16_t hits[2 * kPanel];  // bit q of hits[2r + half]: query 16 half + q passed on row r

  void bound(int g) {
    group = g;
    const __m512 norm = _mm512_set1_ps(block->group_norm[g]), error = _mm512_set1_ps(block->group_error[g]);
    for (int half = 0; half < 2; ++half) {
      const __m512 f = _mm512_loadu_ps(panel->floor + 16 * half);
      __m512 m = _mm512_fmadd_ps(_mm512_loadu_ps(panel->slope + 16 * half), norm, _mm512_set1_ps(block->constant));
      m = _mm512_fmadd_ps(_mm512_loadu_ps(panel->lift + 16 * half), error, m);
      margin[half] = m;
      floor[half] = _mm512_fnmadd_ps(_mm512_abs_ps(f), _mm512_set1_ps(0x1p-22f), _mm512_sub_ps(f, m));
    }
  }

  __m512 score(const Scores& scores, int row, int half) const {
    const uint32_t* at = scores.cells + row * kPanel + 16 * half;
    if constexpr (!Bytes) return _mm512_load_ps(at);
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(at));
    const __m512 scaled = _mm512_mul_ps(sum, _mm512_set1_ps(block->scale[group * kPanel + row]));
    return _mm512_mul_ps(scaled, _mm512_loadu_ps(panel->scale + 16 * half));
  }

  template <bool Symmetric>
  void look(const Scores& scores, int begin, int end) {
    for (int row = begin; row < end; ++row)
      for (int half = 0; half < 2; ++half) {
        const __m512 value = score(scores, row, half);
        __mmask16 hit = _mm512_cmp_ps_mask(value, floor[half], _CMP_NLT_UQ);
        if constexpr (Symmetric) {
          const __m512 needed = _mm512_set1_ps(block->row_floor[group * kPanel + row]);
          const __m512 most = _mm512_add_ps(value, margin[half]);
          const __m512 bound = _mm512_fmadd_ps(_mm512_abs_ps(most), _mm512_set1_ps(0x1p-22f), most);
          hit |= _mm512_cmp_ps_mask(bound, needed, _CMP_NLT_UQ);
        }
        _store_mask16(reinterpret_cast<__mmask16*>(hits + 2 * row + half), hit);
      }
  }

  // Appends the survivors of the tile that has been looked through; returns how many there are, written or not.
  int append(const Scores& scores, FilterHit* out) const {
    int found = 0;
    for (int upper = 0; upper < 2; ++upper) {
      const __m512i words = _mm512_load_si512(hits + kPanel * upper);
      for (uint32_t rows = _mm512_test_epi32_mask(words, words); rows != 0; rows &= rows - 1) {
        const int row = 16 * upper + __builtin_ctz(rows);
        uint32_t queries;
        __builtin_memcpy(&queries, hits + 2 * row, sizeof queries);
        for (; queries != 0; queries &= queries - 1, ++found) {
          if (found >= kDense) continue;
          const int q = __builtin_ctz(queries);
          float value;
          if constexpr (Bytes) {
            const float sum = static_cast<float>(static_cast<int32_t>(scores.cells[row * kPanel + q]));
            value = sum * block->scale[group * kPanel + row] * panel->scale[q];
          } else {
            __builtin_memcpy(&value, scores.cells + row * kPanel + q, sizeof value);
          }
          out[found] = {static_cast<uint16_t>(q), static_cast<uint16_t>(group * kPanel + row), value};
        }
      }
    }
    return found;
  }
};

template <bool Bytes, bool Symmetric>
int filter_tiles(const FilterBlock& block, const FilterPanel& panel, FilterHit* hits, uint8_t* dense) {
  const int64_t steps = block.row_bytes / kCodeLine, stride = block.stride;
  const int look_rows = static_cast<int>((kPanel + steps - 1) / steps);
  Prefetcher prefetcher(block.ahead, block.groups * steps);
  Scores scores[2];
  Tile<Bytes> tile(block, panel);
  int total = 0;
  const auto take = [&](const Scores& from) {
    const int found = tile.append(from, hits + total);
    dense[tile.group] = found > kDense;
    if (found <= kDense) total += found;
  };
  for (int g = 0; g < block.groups; ++g) {
    if constexpr (Bytes) {
      _tile_loadd(0, panel.offset, 0);
      _tile_loadd(1, panel.offset + 16, 0);
      _tile_loadd(2, panel.offset, 0);
      _tile_loadd(3, panel.offset + 16, 0);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
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
      tile.template look<Symmetric>(before, looked, until);
      looked = until;
      prefetcher.turn();
    }
    if (g > 0) take(before);
    uint32_t* cells = scores[g % 2].cells;
    _tile_stored(0, cells, kPanel * sizeof(float));
    _tile_stored(1, cells + 16, kPanel * sizeof(float));
    _tile_stored(2, cells + 16 * kPanel, kPanel * sizeof(float));
    _tile_stored(3, cells + 16 * kPanel + 16, kPanel * sizeof(float));
    tile.bound(g);
  }
  const Scores& last = scores[(block.groups + 1) % 2];
  tile.template look<Symmetric>(last, 0, kPanel);
  take(last);
  return total;
}

template <bool Bytes>
int filter_block(const FilterBlock& block, const FilterPanel& panel, FilterHit* hits, uint8_t* dense) {
  if (block.groups == 0) return 0;
  return block.row_floor == nullptr ? filter_tiles<Bytes, false>(block, panel, hits, dense)
                                    : filter_tiles<Bytes, true>(block, panel, hits, dense);
}

}  // namespace

const Filter& amx_filter() {
  static const Filter filter{"amx", 2, encode_bfloat, encode_bfloat, measure_bfloat, filter_block<false>, begin, end};
  return filter;
}

const Filter& amx_byte_filter() {
  const Filter& vector = avx512vnni_filter();  // part of every processor with this unit
  static const Filter filter{"amx bytes", 1, vector.encode_rows, vector.encode_queries, nullptr, filter_block<true>, begin, end};
  return filter;
}

}  // namespace tgq
#endif
