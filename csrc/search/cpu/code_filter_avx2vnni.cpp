// The code filter of processors with AVX-VNNI: one instruction per 32 products.
#if defined(TGQ_X86)
#include "search/cpu/code_vector_avx2.h"

namespace tgq {
namespace {

struct Vnni {
  static __m256i add(__m256i sums, __m256i rows, __m256i query) { return _mm256_dpbusd_avx_epi32(sums, rows, query); }
};

}  // namespace

const CodeKernels& avx2vnni_code_kernels() {
  static const CodeKernels kernels{"avx2vnni", false, 0, filter<Halves<Vnni>>, refine<Halves<Vnni>>, refine_pending<Halves<Vnni>>, raise_maxima<Halves<Vnni>>, nothing, nothing};
  return kernels;
}

}  // namespace tgq
#endif
