#include "search/cpu/kernel_set.h"

namespace tgq {
namespace {

//                              exact    pair  column  bound  line  panel
constexpr Costs kScalar{         8.0,     0.0,  0.0,    20.0,  60.0, 1};
#if defined(TGQ_X86)
constexpr Costs kAvx2{           0.03,    0.4,  0.014,   1.0,  1.5,  1};
constexpr Costs kAvx2Vnni{       0.03,    0.4,  0.010,   0.9,  1.0,  1};
constexpr Costs kAvx512Vnni{     0.02,    0.2,  0.0078,  0.5,  0.67, 1};
constexpr Costs kAmx{            0.02,    0.1,  0.0017,  0.1,  0.125, 16};
#endif

}  // namespace

KernelSet kernel_set(Isa isa) {
  switch (isa) {
#if defined(TGQ_X86)
    case Isa::avx2: return {&avx2_kernels(), &avx2_filter(), &avx2_code_kernels(), &kAvx2};
    case Isa::avx2vnni: return {&avx2_kernels(), &avx2vnni_filter(), &avx2vnni_code_kernels(), &kAvx2Vnni};
    case Isa::avx512: return {&avx512_kernels(), &avx2_filter(), &avx2_code_kernels(), &kAvx2};
    case Isa::avx512vnni: return {&avx512_kernels(), &avx512vnni_filter(), &avx512vnni_code_kernels(), &kAvx512Vnni};
    case Isa::amx: return {&avx512_kernels(), &amx_filter(), &amx_code_kernels(), &kAmx};
#endif
    default: return {&scalar_kernels(), nullptr, &scalar_code_kernels(), &kScalar};
  }
}

}  // namespace tgq
