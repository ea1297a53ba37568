// The instruction set that runs: picked at run time from the processor and the operating system, never from build flags.
#pragma once

namespace tgq {

// Best last.
enum class Isa : int { scalar, avx2, avx2vnni, avx512, avx512vnni, amx };

// Those that this build and this machine can run, by name, best last; null-terminated.
const char* const* available_isas();

// What runs: the one that `name` or, where that is null, TGQ_ISA names, else the best. False where the name is unknown or the
// machine cannot run it.
bool find_isa(const char* name, Isa* found);

// The name of what runs, null where find_isa is false.
const char* resolve_isa(const char* name);

}  // namespace tgq
