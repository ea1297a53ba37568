// Picks the instruction set at run time: from the processor and the operating system, never from build flags.
#include <cstdlib>
#include <cstring>
#include <iterator>

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

constexpr int kMaxIsas = 4;

struct Registry {
  Isa isas[kMaxIsas];
  const char* names[kMaxIsas + 1] = {};
  int count = 0;

  void add(const char* name, const Kernels& kernels, const Filter* filter) {
    isas[count] = {name, &kernels, filter};
    names[count++] = name;
  }
};

#if defined(TGQ_X86)
// Linux hands the tile registers out on request, once per process.
bool amx_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  if ((eax & kAvx512Bf16) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const Registry& registry() {
  static const Registry found = [] {
    Registry r;
    r.add("scalar", scalar_kernels(), nullptr);
#if defined(TGQ_X86)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return r;
    r.add("avx2", avx2_kernels(), nullptr);
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
      return r;
    r.add("avx512", avx512_kernels(), nullptr);
    if (amx_permitted()) r.add("amx", avx512_kernels(), &amx_filter());
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
