// The byte filter of processors with AVX-VNNI: one instruction per 32 products.
#if defined(TGQ_X86)
#include "search/cpu/byte_filter_avx2.h"

namespace tgq {
namespace {

struct Vnni {
  using Range = FullRange;
  static constexpr int rows = 6, words = 1;  // twelve sums, two vectors of queries and one row in sixteen registers
  static __m256i add(__m256i sums, const __m256i* rows, const __m256i* queries) {
    return _mm256_dpbusd_avx_epi32(sums, rows[0], queries[0]);
  }
};

}  // namespace

const Filter& avx2vnni_filter() {
  static const Filter filter = byte_filter<Vnni>("avx2vnni");
  return filter;
}

}  // namespace tgq
#endif
