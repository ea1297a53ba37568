// Products on the AMX matrix unit: 32 x 32 sums at a time, operands packed into tiles.
//
// fp32 values are split into three bf16 parts whose sum they are; of the nine products of parts the six largest are added, in
// fp32. The five small ones come first: their roundings then happen among small sums (docs/inference.md).
#if defined(TGQ_X86)
#include <immintrin.h>

#include "common/tile_config.h"
#include "inference/matrix.h"
#include "inference/vector_math.h"

namespace tgq {
namespace {

// ---- packing -----------------------------------------------------------------------------------------------------------

// 32 values from index i on, `count` of them real.
template <int Parts>
inline void load_parts(const Rows& from, int64_t i, int64_t count, __m512i* parts) {
  if (Parts == 1 && from.bfloat) {
    const __mmask32 mask = count >= 32 ? 0xffffffffu : (1u << count) - 1;
    parts[0] = _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from.data) + i);
    return;
  }
  split<Parts>(load16(from.data, i, from.bfloat, first_lanes(count)),
               load16(from.data, i + 16, from.bfloat, first_lanes(count - 16)), parts);
}

template <int Parts>
void pack_rows_of(const Rows& from, int64_t rows, int64_t width, int64_t steps, uint8_t* to) {
  const int64_t padded = (rows + kBlock - 1) / kBlock * kBlock;
  for (int64_t r = 0; r < padded; ++r) {
    uint8_t* at = to + r / kTile * row_tile_bytes(steps, Parts) + r % kTile * 64;
    for (int64_t s = 0; s < steps; ++s, at += Parts * kTileBytes) {
      __m512i parts[Parts] = {};
      const int64_t left = r < rows ? width - s * kStep : 0;
      if (left > 0) load_parts<Parts>(from, r * from.stride + s * kStep, left, parts);
      for (int p = 0; p < Parts; ++p) _mm512_store_si512(at + p * kTileBytes, parts[p]);
    }
  }
}

void pack_rows(const Rows& from, int64_t rows, int64_t width, int64_t steps, int parts, uint8_t* to) {
  parts == 1 ? pack_rows_of<1>(from, rows, width, steps, to) : pack_rows_of<kFloatParts>(from, rows, width, steps, to);
}

// Transposes 16 x 16 words in place.
inline void transpose(__m512i* rows) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Columns whose values lie side by side: 16 columns of 32 values are a tile turned over.
template <int Parts>
void pack_long_columns(const Rows& from, int columns, int64_t depth, int64_t steps, uint8_t* to) {
  for (int64_t s = 0; s < steps; ++s)
    for (int side = 0; side < 2; ++side) {
      __m512i tiles[Parts][16] = {};
      for (int c = 0; c < 16 && 16 * side + c < columns; ++c) {
        __m512i parts[Parts] = {};
        const int64_t left = depth - s * kStep;
        if (left > 0) load_parts<Parts>(from, (16 * side + c) * from.stride + s * kStep, left, parts);
        for (int p = 0; p < Parts; ++p) tiles[p][c] = parts[p];
      }
      for (int p = 0; p < Parts; ++p) {
        transpose(tiles[p]);
        uint8_t* at = to + ((s * Parts + p) * 2 + side) * kTileBytes;
        for (int r = 0; r < 16; ++r) _mm512_store_si512(at + 64 * r, tiles[p][r]);
      }
    }
}

// Columns that lie side by side: two rows of values of 16 columns, interleaved, are a row of a tile.
template <int Parts>
void pack_wide_columns(const Rows& from, int64_t depth_stride, int columns, int64_t depth, int64_t steps, uint8_t* to) {
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t s = 0; s < steps; ++s)
    for (int side = 0; side < 2; ++side) {
      const __mmask16 mask = first_lanes(columns - 16 * side);
      for (int r = 0; r < 16; ++r) {
        const int64_t d = s * kStep + 2 * r, i = d * depth_stride + 16 * side;
        const __mmask16 even_mask = d < depth ? mask : 0, odd_mask = d + 1 < depth ? mask : 0;
        __m512i parts[Parts];
        if (Parts == 1 && from.bfloat) {
          const auto* values = static_cast<const uint16_t*>(from.data);
          const __m256i even = _mm256_maskz_loadu_epi16(even_mask, values + i);
          parts[0] = _mm512_inserti64x4(_mm512_castsi256_si512(even), _mm256_maskz_loadu_epi16(odd_mask, values + i + depth_stride), 1);
        } else {
          split<Parts>(load16(from.data, i, from.bfloat, even_mask), load16(from.data, i + depth_stride, from.bfloat, odd_mask), parts);
        }
        for (int p = 0; p < Parts; ++p)
          _mm512_store_si512(to + ((s * Parts + p) * 2 + side) * kTileBytes + 64 * r, _mm512_permutexvar_epi16(pairs, parts[p]));
      }
    }
}

template <int Parts>
void pack_columns_of(const Rows& from, int64_t depth_stride, int columns, int64_t depth, int64_t steps, uint8_t* to) {
  depth_stride == 1 ? pack_long_columns<Parts>(from, columns, depth, steps, to)
                    : pack_wide_columns<Parts>(from, depth_stride, columns, depth, steps, to);
}

void pack_columns(const Rows& from, int64_t depth_stride, int columns, int64_t depth, int64_t steps, int parts, uint8_t* to) {
  parts == 1 ? pack_columns_of<1>(from, depth_stride, columns, depth, steps, to)
             : pack_columns_of<kFloatParts>(from, depth_stride, columns, depth, steps, to);
}

// ---- products ----------------------------------------------------------------------------------------------------------

inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Operands stream past the first-level cache: they are larger than it, and would flush the sums that are stored there
// (measured: 1.9 instead of 1.3 TFLOP/s of a core).
inline void load_rows(const uint8_t* upper, const uint8_t* lower) {
  _tile_stream_loadd(4, upper, 64);
  _tile_stream_loadd(5, lower, 64);
}

inline void load_columns(const uint8_t* panel) {
  _tile_stream_loadd(6, panel, 64);
  _tile_stream_loadd(7, panel + kTileBytes, 64);
}

// Adds one block's product to tiles 0 … 3. `turn` is called once per step: other work while the unit multiplies.
template <int Parts, typename Turn>
inline void add_product(const uint8_t* upper, const uint8_t* lower, const uint8_t* panel, int64_t steps, Turn&& turn) {
  if constexpr (Parts == 1) {
    for (int64_t s = 0; s < steps; ++s, upper += kTileBytes, lower += kTileBytes, panel += 2 * kTileBytes) {
      load_rows(upper, lower);
      load_columns(panel);
      multiply_tiles();
      turn();
    }
  } else {
    static_assert(Parts == kFloatParts);
    const auto row_part = [&](int64_t s, int p) {
      const int64_t at = (s * Parts + p) * kTileBytes;
      load_rows(upper + at, lower + at);
    };
    const auto column_part = [&](int64_t s, int p) { load_columns(panel + (s * Parts + p) * 2 * kTileBytes); };
    for (int64_t s = 0; s < steps; ++s) {
      row_part(s, 0);
      column_part(s, 2);
      multiply_tiles();
      column_part(s, 1);
      multiply_tiles();
      row_part(s, 1);
      multiply_tiles();
      column_part(s, 0);
      multiply_tiles();
      row_part(s, 2);
      multiply_tiles();
      turn();
    }
    for (int64_t s = 0; s < steps; ++s) {
      row_part(s, 0);
      column_part(s, 0);
      multiply_tiles();
    }
  }
}

inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void store_tiles(float* sums, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + kTile, bytes);
  _tile_stored(2, sums + kTile * stride, bytes);
  _tile_stored(3, sums + kTile * stride + kTile, bytes);
}

// Fetches the panel that comes next into the second-level cache, some lines per step.
class PanelPrefetcher {
 public:
  PanelPrefetcher(const uint8_t* ahead, int64_t steps, int parts, int64_t blocks)
      : at_(ahead), end_(ahead == nullptr ? nullptr : ahead + panel_bytes(steps, parts)),
        lines_((parts * 2 * kTileBytes / 64 + blocks - 1) / blocks) {}
  void turn() {
    for (int64_t i = 0; i < lines_ && at_ < end_; ++i, at_ += 64) _mm_prefetch(at_, _MM_HINT_T1);
  }

 private:
  const uint8_t *at_, *end_;
  int64_t lines_;
};

// What becomes of the sums of a block over part of the inner dimension: added to those of the parts before or, with the last
// part, finished.
class Take {
 public:
  Take(float* sums, int64_t stride, bool add, const Finish* finish) : sums_(sums), stride_(stride), add_(add), finish_(finish) {
    if (finish == nullptr) return;
    for (int side = 0; side < 2; ++side) {
      mask_[side] = first_lanes(finish->columns - kTile * side);
      bias_[side] = finish->bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask_[side], finish->bias + kTile * side);
    }
  }

  void row(const float* from, int64_t row) const {
    __m512 left = _mm512_load_ps(from), right = _mm512_load_ps(from + kTile);
    float* at = sums_ + row * stride_;
    if (add_) {
      left = _mm512_add_ps(left, _mm512_loadu_ps(at));
      right = _mm512_add_ps(right, _mm512_loadu_ps(at + kTile));
    }
    if (finish_ == nullptr) {
      _mm512_storeu_ps(at, left);
      _mm512_storeu_ps(at + kTile, right);
      return;
    }
    const Finish& f = *finish_;
    if (row >= f.rows) return;
    const __m512 scale = _mm512_set1_ps(f.row_scale == nullptr ? 1.0f : f.row_scale[row]);
    left = _mm512_fmadd_ps(left, scale, bias_[0]);
    right = _mm512_fmadd_ps(right, scale, bias_[1]);
    if (f.activation == Activation::gelu) {
      left = gelu(left);
      right = gelu(right);
    }
    if (f.row_tile > 0) {
      uint8_t* tile = static_cast<uint8_t*>(f.out) + row / kTile * f.row_tile + row % kTile * 64;
      __m512i parts[kFloatParts];
      if (f.bfloat) {
        split<1>(left, right, parts);
      } else {
        split<kFloatParts>(left, right, parts);
      }
      for (int p = 0; p < (f.bfloat ? 1 : kFloatParts); ++p) _mm512_store_si512(tile + p * kTileBytes, parts[p]);
    } else if (f.bfloat) {
      const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(right, left));
      _mm512_mask_storeu_epi16(static_cast<uint16_t*>(f.out) + row * f.stride, _mm512_kunpackw(mask_[1], mask_[0]), both);
    } else {
      float* out = static_cast<float*>(f.out) + row * f.stride;
      _mm512_mask_storeu_ps(out, mask_[0], left);
      _mm512_mask_storeu_ps(out + kTile, mask_[1], right);
    }
  }

 private:
  float* sums_;  // [rows, kBlock]
  int64_t stride_;
  bool add_;              // there are parts before
  const Finish* finish_;  // null: not the last part, or nothing to finish
  __mmask16 mask_[2];
  __m512 bias_[2];
};

// While the unit multiplies one block the vector unit takes the sums of the block before it.
template <int Parts>
void multiply_of(const uint8_t* rows, int64_t row_tile, int64_t blocks, const uint8_t* panel, int64_t steps, const Take& take,
                 const uint8_t* ahead) {
  alignas(64) float scratch[2][kBlock * kBlock];
  PanelPrefetcher prefetcher(ahead, steps, Parts, blocks);
  const int64_t rows_per_turn = (kBlock + steps - 1) / steps;
  for (int64_t b = 0; b <= blocks; ++b) {
    const float* before = scratch[(b + 1) % 2];
    int64_t taken = b == 0 ? kBlock : 0;
    const auto take_until = [&](int64_t until) {
      for (; taken < until; ++taken) take.row(before + taken * kBlock, (b - 1) * kBlock + taken);
    };
    if (b < blocks) {
      zero_tiles();
      const uint8_t* upper = rows + 2 * b * row_tile;
      add_product<Parts>(upper, upper + row_tile, panel, steps, [&] {
        prefetcher.turn();
        take_until(taken + rows_per_turn < kBlock ? taken + rows_per_turn : kBlock);
      });
      store_tiles(scratch[b % 2], kBlock);
    }
    take_until(kBlock);
  }
}

void multiply(const uint8_t* rows, int64_t row_tile, int64_t blocks, const uint8_t* panel, int64_t steps, int parts, bool add,
              float* sums, int64_t stride, const Finish* finish, const uint8_t* ahead) {
  const Take take(sums, stride, add, finish);
  parts == 1 ? multiply_of<1>(rows, row_tile, blocks, panel, steps, take, ahead)
             : multiply_of<kFloatParts>(rows, row_tile, blocks, panel, steps, take, ahead);
}

}  // namespace

const MatrixUnit& amx_matrix_unit() {
  static const MatrixUnit unit{begin, end, pack_rows, pack_columns, multiply};
  return unit;
}

}  // namespace tgq
#endif
