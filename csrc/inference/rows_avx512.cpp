// What happens to rows between products: LayerNorm, softmax into tiles, and self-attention over short sequences.
#if defined(TGQ_X86)
#include <immintrin.h>

#include "inference/matrix.h"
#include "inference/vector_math.h"

namespace tgq {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

void normalise(const float* sums, int64_t stride, int64_t rows, int64_t width, const float* bias, const Rows& residual,
               const float* weight, const float* shift, float eps, void* out, int64_t out_stride) {
  const float share = 1.0f / static_cast<float>(width);
  for (int64_t r = 0; r < rows; ++r) {
    const auto value = [&](int64_t c, __mmask16 mask) {
      const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, sums + r * stride + c), _mm512_maskz_loadu_ps(mask, bias + c));
      return _mm512_add_ps(sum, load16(residual.data, r * residual.stride + c, residual.bfloat, mask));
    };
    if (weight == nullptr) {
      for (int64_t c = 0; c < width; c += 16) {
        const __mmask16 mask = first_lanes(width - c);
        store16(out, r * out_stride + c, residual.bfloat, value(c, mask), mask);
      }
      continue;
    }
    __m512 total = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += 16) total = _mm512_add_ps(total, value(c, first_lanes(width - c)));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) * share);
    for (int64_t c = 0; c < width; c += 16) {
      const __mmask16 mask = first_lanes(width - c);
      const __m512 centred = _mm512_maskz_sub_ps(mask, value(c, mask), mean);
      squares = _mm512_fmadd_ps(centred, centred, squares);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) * share + eps));
    for (int64_t c = 0; c < width; c += 16) {
      const __mmask16 mask = first_lanes(width - c);
      const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(value(c, mask), mean), scale);
      const __m512 result = _mm512_fmadd_ps(unit, _mm512_maskz_loadu_ps(mask, weight + c), _mm512_maskz_loadu_ps(mask, shift + c));
      store16(out, r * out_stride + c, residual.bfloat, result, mask);
    }
  }
}

void add_outer(float* sums, int64_t stride, int64_t rows, int64_t width, const float* column, const float* row, float factor) {
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 times = _mm512_set1_ps(factor * column[r]);
    for (int64_t c = 0; c < width; c += 16) {
      const __mmask16 mask = first_lanes(width - c);
      float* at = sums + r * stride + c;
      _mm512_mask_storeu_ps(at, mask, _mm512_fmadd_ps(times, _mm512_maskz_loadu_ps(mask, row + c), _mm512_maskz_loadu_ps(mask, at)));
    }
  }
}

inline __mmask16 seen(const uint8_t* visible, int64_t first, int64_t length) {
  const __mmask16 mask = first_lanes(length - first);
  if (visible == nullptr) return mask;
  const __m128i bytes = _mm_maskz_loadu_epi8(mask, visible + first);
  return _mm_test_epi8_mask(bytes, bytes);
}

// What is subtracted from the scores of a row before the exponential.
inline __m512 offset_of(__m512 most) {
  const float largest = _mm512_reduce_max_ps(most);
  return _mm512_set1_ps(largest == -__builtin_inff() ? 0.0f : largest);
}

template <int Parts>
void softmax_of(const float* scores, int64_t stride, int64_t length, float scale, const uint8_t* visible, int64_t steps,
                uint8_t* to, float* inverse) {
  const __m512 factor = _mm512_set1_ps(scale * kLog2E);
  for (int r = 0; r < kBlock; ++r) {
    const float* row = scores + r * stride;
    __m512 most = _mm512_set1_ps(-__builtin_inff());
    for (int64_t c = 0; c < length; c += 16)
      most = _mm512_mask_max_ps(most, seen(visible, c, length), most, _mm512_loadu_ps(row + c));
    const __m512 offset = offset_of(most);
    __m512 total = _mm512_setzero_ps();
    uint8_t* at = to + r / kTile * row_tile_bytes(steps, Parts) + r % kTile * 64;
    for (int64_t s = 0; s < steps; ++s, at += Parts * kTileBytes) {
      __m512 half[2];
      for (int h = 0; h < 2; ++h) {
        const int64_t c = s * kStep + 16 * h;
        const __mmask16 mask = seen(visible, c, length);
        half[h] = _mm512_maskz_mov_ps(mask, exp2_of(_mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, row + c), offset), factor)));
        total = _mm512_add_ps(total, half[h]);
      }
      __m512i parts[Parts];
      split<Parts>(half[0], half[1], parts);
      for (int p = 0; p < Parts; ++p) _mm512_store_si512(at + p * kTileBytes, parts[p]);
    }
    const float sum = _mm512_reduce_add_ps(total);
    inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;  // NaN stays
  }
}

void softmax(const float* scores, int64_t stride, int64_t length, float scale, const uint8_t* visible, int64_t steps, int parts,
             uint8_t* to, float* inverse) {
  parts == 1 ? softmax_of<1>(scores, stride, length, scale, visible, steps, to, inverse)
             : softmax_of<kFloatParts>(scores, stride, length, scale, visible, steps, to, inverse);
}

// ---- self-attention of one head over [anchored; exploratory; text] ------------------------------------------------------

struct Span {
  int first, last;
};

// Keys [width][padded] (turned over) and values [keys][width] of one head in fp32, and four rows at a time.
class StreamAttention {
 public:
  StreamAttention(const StreamHead& head, float* scratch) : head_(head) {
    num_queries_ = head.num_anchored + head.num_exploratory;
    num_keys_ = num_queries_ + head.num_text;
    padded_ = (num_keys_ + 31) / 32 * 32;
    keys_ = scratch;
    values_ = keys_ + padded_ * head.width;
    weights_ = values_ + padded_ * head.width;
    rows_ = weights_ + kRows * padded_;
    const __m512i lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(padded_));
    for (int i = 0; i < num_keys_; ++i) {
      const bool text = i >= num_queries_;
      const int64_t at = text ? (i - num_queries_) * head.text_stride : i * head.stride;
      for (int c = 0; c < head.width; c += 16) {
        const __m512 key = load16(text ? head.text_keys : head.keys, at + c, head.bfloat);
        _mm512_i32scatter_ps(keys_ + c * padded_ + i, lanes, key, 4);
        _mm512_storeu_ps(values_ + i * head.width + c, load16(text ? head.text_values : head.values, at + c, head.bfloat));
      }
    }
  }

  // Rows [rows.first, rows.last) of the sequence attend to the keys of two spans.
  void attend(Span rows, const Span (&seen_keys)[2]) {
    for (int first = rows.first; first < rows.last; first += kRows) {
      const int count = rows.last - first < kRows ? rows.last - first : kRows;
      for (int r = 0; r < kRows; ++r) load_row(first + (r < count ? r : count - 1), rows_ + r * head_.width);
      for (const Span& span : seen_keys) score(span);
      float inverse[kRows];
      for (int r = 0; r < kRows; ++r) inverse[r] = weigh(weights_ + r * padded_, seen_keys);
      for (int c = 0; c < head_.width; c += 16) mix(first, count, c, seen_keys, inverse);
    }
  }

 private:
  static constexpr int kRows = 4;

  void load_row(int row, float* to) const {
    const bool text = row >= num_queries_;
    const int64_t at = text ? (row - num_queries_) * head_.text_query_stride : row * head_.stride;
    for (int c = 0; c < head_.width; c += 16)
      _mm512_storeu_ps(to + c, load16(text ? head_.text_queries : head_.queries, at + c, head_.bfloat));
  }

  void score(Span span) {
    for (int k = span.first / 16 * 16; k < span.last; k += 16) {
      __m512 sums[kRows] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int c = 0; c < head_.width; ++c) {
        const __m512 key = _mm512_loadu_ps(keys_ + c * padded_ + k);
        for (int r = 0; r < kRows; ++r) sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(rows_[r * head_.width + c]), key, sums[r]);
      }
      for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(weights_ + r * padded_ + k, sums[r]);
    }
  }

  static __mmask16 inside(int k, Span span) {
    return first_lanes(span.last - k) & ~first_lanes(span.first - k);
  }

  // Scores → exponentials, in place; returns the inverse of their sum, or 0.
  float weigh(float* row, const Span (&seen_keys)[2]) const {
    __m512 most = _mm512_set1_ps(-__builtin_inff()), total = _mm512_setzero_ps();
    for (const Span& span : seen_keys)
      for (int k = span.first / 16 * 16; k < span.last; k += 16)
        most = _mm512_mask_max_ps(most, inside(k, span), most, _mm512_loadu_ps(row + k));
    const __m512 offset = offset_of(most), factor = _mm512_set1_ps(head_.scale * kLog2E);
    for (const Span& span : seen_keys)
      for (int k = span.first / 16 * 16; k < span.last; k += 16) {
        const __mmask16 mask = inside(k, span);
        const __m512 power = exp2_of(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + k), offset), factor));
        _mm512_mask_storeu_ps(row + k, mask, power);
        total = _mm512_mask_add_ps(total, mask, total, power);
      }
    const float sum = _mm512_reduce_add_ps(total);
    return sum == 0.0f ? 0.0f : 1.0f / sum;
  }

  void mix(int first, int count, int c, const Span (&seen_keys)[2], const float* inverse) const {
    __m512 sums[kRows] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (const Span& span : seen_keys)
      for (int k = span.first; k < span.last; ++k) {
        const __m512 value = _mm512_loadu_ps(values_ + k * head_.width + c);
        for (int r = 0; r < kRows; ++r) sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(weights_[r * padded_ + k]), value, sums[r]);
      }
    for (int r = 0; r < count; ++r) {
      const int row = first + r;
      const bool text = row >= num_queries_;
      const int64_t at = (text ? row - num_queries_ : row) * head_.out_stride + c;
      store16(text ? head_.text_out : head_.out, at, head_.bfloat, _mm512_mul_ps(sums[r], _mm512_set1_ps(inverse[r])));
    }
  }

  const StreamHead& head_;
  int num_queries_, num_keys_, padded_;
  float *keys_, *values_, *weights_, *rows_;
};

void attend(const StreamHead& head, float* scratch) {
  StreamAttention attention(head, scratch);
  const int anchored = head.num_anchored, queries = anchored + head.num_exploratory, keys = queries + head.num_text;
  const Span text{queries, keys}, none{0, 0};
  attention.attend({0, anchored}, {{0, head.anchored_see_exploratory ? queries : anchored}, text});
  attention.attend({anchored, queries},
                   {{head.exploratory_see_anchored ? 0 : anchored, queries}, head.exploratory_see_text ? text : none});
  if (head.text_queries != nullptr) attention.attend(text, {head.text_sees_queries ? Span{0, queries} : none, text});
}

}  // namespace

const RowKernels& avx512_row_kernels() {
  static const RowKernels kernels{normalise, add_outer, softmax, attend};
  return kernels;
}

}  // namespace tgq
#endif
