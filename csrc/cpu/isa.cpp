// Picks the instruction set at run time: from the processor and the operating system, never from build flags.
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "cpu/codes.h"
#include "cpu/cost.h"
#include "cpu/kernels.h"
#include "tgq/search.h"

#if defined(TGQ_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace tgq {
namespace {

constexpr int kMaxIsas = 6;

//                              exact    pair  column  bound  line  panel
constexpr Costs kScalar{         8.0,     0.0,  0.0,    20.0,  60.0, 1};
#if defined(TGQ_X86)
constexpr Costs kAvx2{           0.03,    0.4,  0.014,   1.0,  1.5,  1};
constexpr Costs kAvx2Vnni{       0.03,    0.4,  0.010,   0.9,  1.0,  1};
constexpr Costs kAvx512Vnni{     0.02,    0.2,  0.0078,  0.5,  0.67, 1};
constexpr Costs kAmx{            0.02,    0.1,  0.0017,  0.1,  0.125, 16};
#endif

struct Registry {
  Isa isas[kMaxIsas];
  const char* names[kMaxIsas + 1] = {};
  int count = 0;

  void add(const char* name, const Kernels& kernels, const Filter* filter, const CodeKernels& codes, const Costs& costs) {
    isas[count] = {name, &kernels, filter, &codes, &costs};
    names[count++] = name;
  }
};

#if defined(TGQ_X86)
enum class Register { eax, edx };

bool feature(unsigned leaf, unsigned part, Register in, int bit) {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(leaf, part, &eax, &ebx, &ecx, &edx)) return false;
  return ((in == Register::eax ? eax : edx) >> bit & 1u) != 0;
}

// Linux hands the tile registers out on request, once per process.
bool amx_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  const bool bf16 = feature(7, 1, Register::eax, 5);  // of AVX-512
  const bool unit = feature(7, 0, Register::edx, 22) && feature(7, 0, Register::edx, 24) && feature(7, 0, Register::edx, 25);
  return bf16 && unit && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const Registry& registry() {
  static const Registry found = [] {
    Registry r;
    r.add("scalar", scalar_kernels(), nullptr, scalar_code_kernels(), kScalar);
#if defined(TGQ_X86)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return r;
    r.add("avx2", avx2_kernels(), &avx2_filter(), avx2_code_kernels(), kAvx2);
    if (feature(7, 1, Register::eax, 4)) r.add("avx2vnni", avx2_kernels(), &avx2vnni_filter(), avx2vnni_code_kernels(), kAvx2Vnni);
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
      return r;
    r.add("avx512", avx512_kernels(), &avx2_filter(), avx2_code_kernels(), kAvx2);
    if (!__builtin_cpu_supports("avx512vnni")) return r;
    r.add("avx512vnni", avx512_kernels(), &avx512vnni_filter(), avx512vnni_code_kernels(), kAvx512Vnni);
    if (amx_permitted()) r.add("amx", avx512_kernels(), &amx_filter(), amx_code_kernels(), kAmx);
#endif
    return r;
  }();
  return found;
}

}  // namespace

const Isa* find_isa(const char* name) {
  const Registry& known = registry();
  if (name == nullptr) name = std::getenv("TGQ_ISA");
  if (name == nullptr || *name == '\0') return &known.isas[known.count - 1];
  for (int i = 0; i < known.count; ++i)
    if (std::strcmp(known.isas[i].name, name) == 0) return &known.isas[i];
  return nullptr;
}

const char* const* available_isas() { return registry().names; }

const char* resolve_isa(const char* isa) {
  const Isa* found = find_isa(isa);
  return found == nullptr ? nullptr : found->name;
}

}  // namespace tgq
