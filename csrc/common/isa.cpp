#include "common/isa.h"

#include <cstdlib>
#include <cstring>

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

struct Available {
  Isa isas[kMaxIsas];
  const char* names[kMaxIsas + 1] = {};
  int count = 0;

  void add(Isa isa, const char* name) {
    isas[count] = isa;
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

const Available& available() {
  static const Available found = [] {
    Available a;
    a.add(Isa::scalar, "scalar");
#if defined(TGQ_X86)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return a;
    a.add(Isa::avx2, "avx2");
    if (feature(7, 1, Register::eax, 4)) a.add(Isa::avx2vnni, "avx2vnni");
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
      return a;
    a.add(Isa::avx512, "avx512");
    if (!__builtin_cpu_supports("avx512vnni")) return a;
    a.add(Isa::avx512vnni, "avx512vnni");
    if (amx_permitted()) a.add(Isa::amx, "amx");
#endif
    return a;
  }();
  return found;
}

// Position among those available, -1: none of that name.
int find(const char* name) {
  const Available& known = available();
  if (name == nullptr) name = std::getenv("TGQ_ISA");
  if (name == nullptr || *name == '\0') return known.count - 1;
  for (int i = 0; i < known.count; ++i)
    if (std::strcmp(known.names[i], name) == 0) return i;
  return -1;
}

}  // namespace

const char* const* available_isas() { return available().names; }

bool find_isa(const char* name, Isa* found) {
  const int at = find(name);
  if (at >= 0) *found = available().isas[at];
  return at >= 0;
}

const char* resolve_isa(const char* name) {
  const int at = find(name);
  return at < 0 ? nullptr : available().names[at];
}

}  // namespace tgq
