// The code filter of processors with AVX-512 VNNI: one instruction per 64 products.
#if defined(TGQ_X86)
#include "search/cpu/code_vector_avx512.h"

namespace tgq {

const CodeKernels& avx512vnni_code_kernels() {
  static const CodeKernels kernels{"avx512vnni", false, 0, filter<Wide>, refine<Wide>, refine_pending<Wide>, raise_maxima<Wide>, nothing, nothing};
  return kernels;
}

}  // namespace tgq
#endif
