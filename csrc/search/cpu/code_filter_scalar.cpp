// The code filter in plain C++: what the other instruction sets compute, and runs everywhere.
#include <cmath>

#include "common/half.h"
#include "search/cpu/code_filter.h"

namespace tgq {
namespace {

struct Plain {
  struct Floats {
    float lane[kGroup];
  };
  struct Ints {
    int32_t lane[kGroup];
  };
  template <class F>
  static Floats each(F value) {
    Floats out;
    for (int i = 0; i < kGroup; ++i) out.lane[i] = value(i);
    return out;
  }
  static Floats set(float v) { return each([&](int) { return v; }); }
  static Floats load(const float* from) { return each([&](int i) { return from[i]; }); }
  static void store(float* to, const Floats& v) {
    for (int i = 0; i < kGroup; ++i) to[i] = v.lane[i];
  }
  static Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
    return each([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static Floats multiply(const Floats& a, const Floats& b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
  static Floats add(const Floats& a, const Floats& b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
  static Floats least(const Floats& a, const Floats& b) { return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
  static Floats largest(const Floats& a, const Floats& b) { return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
  static Floats to_float(const Ints& v) { return each([&](int i) { return static_cast<float>(v.lane[i]); }); }
  static uint32_t not_less(const Floats& a, const Floats& b) {
    uint32_t mask = 0;
    for (int i = 0; i < kGroup; ++i) mask |= static_cast<uint32_t>(!(a.lane[i] < b.lane[i])) << i;
    return mask;
  }
  static float dot_halves(const uint16_t* row, const float* query, int64_t size) {
    float sum = 0;
    for (int64_t d = 0; d < size; ++d) sum += half_value(row[d]) * query[d];
    return sum;
  }
  template <int Q>
  static void dot(const uint8_t* group, int64_t plane_stride, int lines, const int8_t* queries, int64_t stride, const int32_t* offset,
                  Ints* sums) {
    for (int q = 0; q < Q; ++q)
      for (int r = 0; r < kGroup; ++r) {
        uint32_t sum = static_cast<uint32_t>(offset[q]);  // wraps on the way, fits at the end
        for (int l = 0; l < lines; ++l)
          for (int d = 0; d < 64; ++d)
            sum += static_cast<uint32_t>(group[l * plane_stride + (d / 4 * kGroup + r) * 4 + d % 4] * queries[q * stride + 64 * l + d]);
        sums[q].lane[r] = static_cast<int32_t>(sum);
      }
  }
};

}  // namespace

const CodeKernels& scalar_code_kernels() {
  static const CodeKernels kernels{"scalar", false, 0, filter<Plain>, refine<Plain>, refine_pending<Plain>, raise_maxima<Plain>, nothing, nothing};
  return kernels;
}

}  // namespace tgq
