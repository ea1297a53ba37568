// What each instruction set of this machine searches with.
#pragma once

#include <vector>

#include "check.h"
#include "common/isa.h"
#include "search/cpu/kernel_set.h"

namespace tgq {

struct NamedSet : KernelSet {
  const char* name;
};

inline std::vector<NamedSet> kernel_sets() {
  std::vector<NamedSet> sets;
  for (const char* const* name = available_isas(); *name != nullptr; ++name) {
    Isa isa;
    const bool found = find_isa(*name, &isa);
    CHECK(found);
    if (found) sets.push_back({kernel_set(isa), *name});
  }
  return sets;
}

}  // namespace tgq
