// The code filter in AVX2. Products of two neighbouring columns meet in 16 bits: 255 * 128 < 2^15.
#if defined(TGQ_X86)
#include "search/cpu/code_vector_avx2.h"

namespace tgq {
namespace {

struct Pairs {
  static __m256i add(__m256i sums, __m256i rows, __m256i query) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(rows, query), _mm256_set1_epi16(1)));
  }
};

}  // namespace

const CodeKernels& avx2_code_kernels() {
  static const CodeKernels kernels{"avx2", true, 0, filter<Halves<Pairs>>, refine<Halves<Pairs>>, refine_pending<Halves<Pairs>>, raise_maxima<Halves<Pairs>>, nothing, nothing};
  return kernels;
}

}  // namespace tgq
#endif
